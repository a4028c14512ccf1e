"""How far an export may be from its checkpoint, and why.

A percentage of few images is no percentage. From `FEW_IMAGES` on, boxes are held by their 1st percentile itself, as it
is printed, and classes by their share. With fewer, at most one box may lie below that limit (the median still holds a
lone one), and in FP32 no class may change at all, save on a tie: the reference's own margin between the two classes,
relative to its largest logit, lies within `relative`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mge_export.precision import Precision

__all__ = ["FEW_IMAGES", "TOLERANCES", "Tolerances"]

FEW_IMAGES = 100  # with fewer, one image is more than one percent


@dataclass(frozen=True)
class Tolerances:
    """Limits of one parity check. Relative differences are of the largest magnitude in an image's tensor."""

    relative: float  # of any tensor of a graph that was fed the reference's inputs
    classes: float  # share of images that may change their class, rounded up to whole images
    box_iou_median: float
    classes_of_few: int  # how many of fewer than `FEW_IMAGES` may change their class; at 0, ties are excused
    box_iou_p1: float  # 1st percentile
    outliers: float  # share of images that may have another heat map, rounded up to whole images
    chain_boxes: bool  # whether boxes are held in the whole chain, too, not only graph by graph
    reason: str

    def allowed_changes(self, images: int) -> int:
        """How many of so many images may change their class."""
        return self.classes_of_few if images < FEW_IMAGES else math.ceil(images * self.classes)

    def outliers_of(self, images: int) -> int:
        """How many of so many images may have another heat map."""
        return math.ceil(images * self.outliers)


TOLERANCES = {
    Precision.FP32: Tolerances(
        relative=1e-4,
        classes=1 / 538,
        classes_of_few=0,
        box_iou_median=1.0,
        box_iou_p1=0.95,
        outliers=0.01,
        chain_boxes=True,
        reason="the same FP32 sums in another order: differences of 1e-6 to 1e-5 are usual, a box may flip by a pixel "
        "where a value lies on the threshold",
    ),
    Precision.FP16: Tolerances(
        relative=5e-2,
        classes=0.01,
        classes_of_few=1,
        box_iou_median=0.97,
        box_iou_p1=0.80,
        outliers=0.01,
        chain_boxes=False,
        reason="each FP16 activation is rounded by up to 2**-11 = 5e-4; through some fifty layers that adds up to "
        "about 1e-2, and an edge of a box moves where the map is nearly level; in the chain one pixel there resamples "
        "the whole next view, so its boxes are reported and its answers are held",
    ),
    Precision.INT8: Tolerances(
        relative=1.0,  # an answer that is as far off as it is large: rounding does not do that, a wrong scale does
        classes=0.02,  # of experts and chain; what INT8 is for is the same class on 98 %
        classes_of_few=2,
        box_iou_median=0.9,
        # Where a class changes, the heat map is that of another class and the box may lie anywhere: no image is held.
        box_iou_p1=0.0,
        outliers=1.0,
        chain_boxes=False,
        reason="INT8 keeps 127 magnitudes of each activation; each layer adds a noise of one or two percent, some "
        "fifty layers about a tenth of the largest logit, so classes and each graph's median box are held, no single "
        "image; a box in a crop that moved itself moves twice: those of the chain are held while INT8 is learned, and "
        "reported here",
    ),
}
