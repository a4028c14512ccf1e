"""How far answers may be apart that should be the same: the export's own tolerances.

A bundle carries the tolerances that its export was held to, in its parity report. For bundles without one they stand
here again, with the export's reasons (`mge_export.tolerances`, which the runtime cannot import; a test compares them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from mge_runtime.manifest import Manifest

__all__ = ["FEW_IMAGES", "LIMITS", "Limits"]

FEW_IMAGES = 100  # with fewer, one image is more than one percent


@dataclass(frozen=True)
class Limits:
    """Limits of a comparison. Relative differences are of the largest magnitude in an image's tensor."""

    relative: float  # of tensors whose inputs are the same
    classes: float  # share of images that may change their class, rounded up to whole images
    classes_of_few: int  # how many of fewer than `FEW_IMAGES` may; at 0, ties within `relative` are excused
    box_iou_median: float
    box_iou_p1: float  # 1st percentile; of fewer than `FEW_IMAGES`, one box may lie below
    chain_boxes: bool  # whether boxes after the first are held, too: each is found in what the one before cut out
    source: str = ""  # where the limits come from, for people

    def allowed_changes(self, images: int) -> int:
        """How many of so many images may change their class."""
        return self.classes_of_few if images < FEW_IMAGES else math.ceil(images * self.classes)

    @classmethod
    def of(cls, manifest: Manifest) -> Limits:
        """Those of a bundle: its own export's, else those of its precision."""
        kinds = {str(plan.get("type")) for plan in manifest.precision.values()}
        kind = "int8" if manifest.is_int8 else "fp32" if kinds <= {"fp32"} else "fp16"
        parity: Mapping[str, Any] = manifest.parity or {}
        return _stored(parity.get("tolerances")) or replace(LIMITS[kind], source=f"mge's for {kind}")


# FP32: the same sums in another order differ by 1e-6 to 1e-5, and a box may flip by a pixel where a value lies on the
# threshold. FP16: each activation is rounded by up to 2**-11 = 5e-4; through some fifty layers that adds up to about
# 1e-2, and an edge of a box moves where the map is nearly level; one pixel there resamples the whole next view. INT8
# keeps 127 magnitudes of an activation: classes and the median box are held, no single image.
LIMITS = {
    "fp32": Limits(1e-4, 1 / 538, 0, 1.0, 0.95, chain_boxes=True),
    "fp16": Limits(5e-2, 0.01, 1, 0.97, 0.80, chain_boxes=False),
    "int8": Limits(1.0, 0.02, 2, 0.9, 0.0, chain_boxes=False),
}


def _stored(values: object) -> Limits | None:
    """What the export wrote; None where it is not of this form: a parity report is free JSON to the runtime."""
    if not isinstance(values, dict):
        return None
    table = cast("dict[str, Any]", values)
    found: dict[str, Any] = {}
    for wanted in fields(Limits):
        if wanted.name == "source":
            continue
        value = table.get(wanted.name)
        if wanted.name == "chain_boxes":
            if not isinstance(value, bool):
                return None
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            return None
        found[wanted.name] = value
    return Limits(**found, source="the export's, from the bundle's parity report")
