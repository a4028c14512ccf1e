"""The comparison of two runs of a chain on the same images: classes, logits, boxes, and how far they may be apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.manifest import Crops
from mge_runtime.preprocess import Viewport, compose_boxes

if TYPE_CHECKING:
    from numpy.typing import NDArray


FEW_IMAGES = 100  # with fewer, one image is more than one percent


@dataclass(frozen=True)
class Tolerances:
    """How far a run may be from its reference. Relative differences are of the largest magnitude in an image's tensor.

    A percentage of few images is no percentage. From `FEW_IMAGES` on, boxes are checked by the 1st percentile of their
    IoU and classes by their share. With fewer, one box may lie below that limit (the median still checks a lone one).
    """

    relative: float  # of any tensor whose inputs are the same
    classes: float  # share of images that may change their class, rounded up to whole images
    classes_of_few: int  # how many of fewer than `FEW_IMAGES` may; at 0, ties within `relative` are excused
    box_iou_median: float
    box_iou_p1: float  # 1st percentile
    outliers: float  # share of images that may have another heat map, rounded up to whole images
    chain_boxes: bool  # whether boxes after the first are checked in the whole chain, too, not only graph by graph
    reason: str

    def allowed_changes(self, images: int) -> int:
        """How many of so many images may change their class."""
        return self.classes_of_few if images < FEW_IMAGES else math.ceil(images * self.classes)

    def allowed_outliers(self, images: int) -> int:
        """How many of so many images may have another heat map."""
        return math.ceil(images * self.outliers)


# By precision: "fp32", "fp16", "int8".
TOLERANCES = {
    "fp32": Tolerances(
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
    "fp16": Tolerances(
        relative=5e-2,
        classes=0.01,
        classes_of_few=1,
        box_iou_median=0.97,
        box_iou_p1=0.80,
        outliers=0.01,
        chain_boxes=False,
        reason="each FP16 activation is rounded by up to 2**-11 = 5e-4; through some fifty layers that adds up to "
        "about 1e-2, and an edge of a box moves where the map is nearly level; in the chain one pixel there resamples "
        "the whole next view, so its boxes are reported and its classes are checked",
    ),
    "int8": Tolerances(
        relative=1.0,  # logits that are as far off as they are large: rounding does not do that, a wrong scale does
        classes=0.02,  # of experts and chain; what INT8 is for is the same class on 98 %
        classes_of_few=2,
        box_iou_median=0.9,
        # Where a class changes, the heat map is another class's and the box may lie anywhere: no single image is
        # checked.
        box_iou_p1=0.0,
        outliers=1.0,
        chain_boxes=False,
        reason="INT8 keeps 127 magnitudes of each activation; each layer adds a noise of one or two percent, some "
        "fifty layers about a tenth of the largest logit, so classes and each graph's median box are checked, no "
        "single image; a box in a crop that moved itself moves twice: those of the chain are checked while INT8 is "
        "learned, and reported here",
    ),
}


_SAME_PIXEL = 1e-2  # pixels; sides of 4096 are rounded to 2e-4


def box_area(boxes: NDArray[Any]) -> NDArray[np.float64]:
    """Area of boxes [..., 4] (x0, y0, x1, y1), half-open, in square pixels: [...]."""
    return np.maximum(boxes[..., 2:].astype(np.float64) - boxes[..., :2], 0).prod(-1)


def box_iou(boxes: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """Intersection over union of boxes [..., 4] that are not empty, pair by pair: [...], 0 to 1."""
    low, high = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    inner = box_area(np.concatenate([low, high], -1))
    return inner / (box_area(boxes) + box_area(others) - inner)


def same_boxes(boxes: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether boxes [..., 4] are the same but for rounding, pair by pair: [...].

    They are whole pixels, or where crops are cut from the frame composed of such by a few products.
    """
    return np.asarray((np.abs(boxes.astype(np.float64) - others) <= _SAME_PIXEL).all(-1))


def frame_boxes(boxes: Sequence[NDArray[Any]], crops: Crops) -> NDArray[np.float32]:
    """What experts 2..K saw, in pixels of the frame: a box in a crop means nothing without the crop's own.

    Args:
        boxes: `box_1` .. `box_{K-1}`, each [N, 4].
        crops: what they are pixels of.

    Returns:
        [K - 1, N, 4].
    """
    if not boxes:
        return np.zeros((0, 0, 4), np.float32)
    size = crops.frame or crops.sizes[0]
    frame = Viewport(0, 0, size, size, size, size)
    return np.stack([compose_boxes(of_image, frame, crops)[1:] for of_image in np.stack(boxes, 1)], 1)


def chain_box_iou(
    boxes: Sequence[str], found: Mapping[str, NDArray[Any]], reference: Mapping[str, NDArray[Any]], crops: Crops
) -> dict[str, NDArray[np.float64]]:
    """IoU [N] of each of a chain's boxes with the reference's, by name, both in pixels of the frame.

    Args:
        boxes: names of `box_1` .. `box_{K-1}`.
        found: tensors, these boxes among them.
        reference: the same.
        crops: what they are pixels of.
    """
    ours, theirs = (frame_boxes([tensors[name] for name in boxes], crops) for tensors in (found, reference))
    return dict(zip(boxes, box_iou(ours, theirs), strict=True))


def relative_difference(found: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """The largest difference in each image of [N, ...], as a share of the reference's largest magnitude there: [N].

    It is 0 where both are equal, infinite where the reference alone is all zeros.
    """
    axes = tuple(range(1, reference.ndim))
    theirs = reference.astype(np.float64)  # in double, so that infinities stay
    difference, scale = np.abs(found - theirs).max(axes), np.abs(theirs).max(axes)
    quotient = np.divide(difference, scale, out=np.full_like(scale, np.inf), where=scale > 0)
    return np.where(difference == 0, 0.0, quotient)


def class_margins(logits: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """How far the reference's class leads the class found: [N], 0 where they agree.

    It is measured in the reference's logits, both [N, C], as a share of their largest magnitude.
    """
    theirs = reference.astype(np.float64)
    lead = theirs.max(1) - np.take_along_axis(theirs, logits.argmax(1)[:, None], 1)[:, 0]
    return lead / np.maximum(np.abs(theirs).max(1), np.finfo(np.float32).tiny)


def class_failures(where: str, changes: Sequence[bool], margins: Sequence[float], tolerances: Tolerances) -> list[str]:
    """One line if more images than allowed change their class.

    Args:
        where: named in the line.
        changes: of each image, whether the class is another one than the reference's.
        margins: of each image, see `class_margins`.
        tolerances: how many may change.
    """
    allowed = tolerances.allowed_changes(len(changes))
    counted = sum(changes)
    if allowed == 0:
        excused = tolerances.relative
        counted = sum(change and not margin <= excused for change, margin in zip(changes, margins, strict=True))
    if counted <= allowed:
        return []
    return [f"{where}: {counted} of {len(changes)} images change their class; expected at most {allowed}"]


def box_failures(where: str, ious: Sequence[float], tolerances: Tolerances) -> list[str]:
    """Lines about boxes that are too far from the reference's.

    Args:
        where: named in the lines.
        ious: of each image, see `box_iou`; none: there is nothing to check.
        tolerances: how far they may be.
    """
    if not ious:
        return []
    found: list[str] = []
    median, least = float(np.median(ious)), tolerances.box_iou_p1
    if not median >= tolerances.box_iou_median:
        found.append(f"{where}: median box IoU {median:.3f}; expected at least {tolerances.box_iou_median:g}")
    if len(ious) < FEW_IMAGES:
        low = sum(not iou >= least for iou in ious)
        if low > 1:
            found.append(f"{where}: {low} of {len(ious)} boxes have an IoU below {least:g}; expected at most 1")
    elif not (percentile := float(np.percentile(ious, 1))) >= least:
        found.append(f"{where}: 1st percentile of box IoU {percentile:.3f}; expected at least {least:g}")
    return found


def finite(value: float | np.floating[Any]) -> float | str:
    """A number for JSON, which has no infinity: six digits of it, or its name."""
    return float(f"{value:.6g}") if np.isfinite(value) else str(float(value))
