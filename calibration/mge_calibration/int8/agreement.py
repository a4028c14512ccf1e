"""How far a quantised stage is from the one it was made of, on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mge_calibration.int8.sessions import Tensors

__all__ = ["Agreement", "Classes", "compare", "relative_error"]

Classes = Callable[[Tensors], np.ndarray]  # what a stage puts out -> class indices [N] that follow from it
BOX_IOU = 0.9  # least median IoU of its box with the float stage's: the next expert must see the same thing


@dataclass(frozen=True)
class Agreement:
    """A quantised stage against the float one, over N images."""

    images: int
    changed: int  # of them, with another class
    box_iou: float | None  # median; None: the stage has no box
    error: float  # see `relative_error`

    @property
    def same_class(self) -> float:
        """Share of images."""
        return 1 - self.changed / self.images

    def within(self, max_drop: float) -> bool:
        """Whether the boxes stayed, and all classes but a share of `max_drop`, rounded up to whole images."""
        allowed = math.ceil(max_drop * self.images)
        return self.changed <= allowed and (self.box_iou is None or self.box_iou >= BOX_IOU)

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for a manifest."""
        box = None if self.box_iou is None else round(self.box_iou, 4)
        return {"images": self.images, "changed": self.changed, "box_iou": box, "error": round(self.error, 6)}


def compare(found: Tensors, reference: Tensors, classes: Classes) -> Agreement:
    """Compare what two variants of a stage put out."""
    changed = classes(found) != classes(reference)
    boxes = [name for name in reference if name.startswith("box_")]
    iou = float(np.median([_iou(found[name], reference[name]) for name in boxes])) if boxes else None
    return Agreement(len(changed), int(changed.sum()), iou, relative_error(found, reference))


def relative_error(found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """Mean over images and tensors of |found - reference| / |reference|, Euclidean norms.

    Images and boxes are left out: one follows from the other, and the box from the heat map, which is in.
    """
    errors: list[float] = []
    for name, wanted in reference.items():
        if wanted.ndim > 3 or name.startswith("box_"):
            continue
        axes = tuple(range(1, wanted.ndim))
        wide = wanted.astype(np.float64)
        distance = np.sqrt(((found[name] - wide) ** 2).sum(axes))
        length = np.maximum(np.sqrt((wide**2).sum(axes)), np.finfo(np.float32).tiny)
        errors.append(float((distance / length).mean()))
    return float(np.mean(errors))


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(boxes[:, :2], others[:, :2]), np.minimum(boxes[:, 2:], others[:, 2:])
    inner, one, other = ((b[:, 2:] - b[:, :2]).clip(0).prod(1) for b in (np.hstack([low, high]), boxes, others))
    return inner / (one + other - inner)
