"""How far a quantised graph, and the chain that goes on from it, is from the float one on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Agreement", "box_iou", "relative_error"]

_ROUNDING = 1e-9  # a share times a number of images is a whole number up to this


@dataclass(frozen=True)
class Agreement:
    """A chain with quantised graphs against the float chain, over N images."""

    images: int
    changed: int  # of them, with another class at the end of the chain
    box_iou: Mapping[str, float]  # box -> median over images, in pixels of the frame
    error: float  # of the graph alone, see `relative_error`

    @property
    def same_class(self) -> float:
        """Share of images."""
        return 1 - self.changed / self.images

    def within(self, max_drop: float, min_box_iou: Mapping[str, float]) -> bool:
        """Whether the answer changed on no more than a share of `max_drop`, and every box stayed.

        Unless the share is 0, one image may change: with few images that is more than the share, but an answer that was
        a tie tells nothing of a layer.
        """
        allowed = max(max_drop * self.images + _ROUNDING, 1 if max_drop else 0)
        return self.changed <= allowed and all(iou >= min_box_iou[name] for name, iou in self.box_iou.items())

    def to_dict(self) -> dict[str, object]:
        """Plain values for a manifest."""
        boxes = {name: round(iou, 4) for name, iou in self.box_iou.items()}
        return {"images": self.images, "changed": self.changed, "box_iou": boxes, "error": round(self.error, 6)}


def relative_error(found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """Mean over images and tensors of |found - reference| / |reference|, Euclidean norms.

    Args:
        found: a graph's outputs; images and boxes are left out: one follows from the other, and the box from the heat
            map, which is in.
        reference: of the float graph on the same inputs, maybe for more images.
    """
    errors: list[float] = []
    for name, values in found.items():
        if values.ndim > 3 or name.startswith("box_"):
            continue
        wide = reference[name][: len(values)].astype(np.float64)
        axes = tuple(range(1, wide.ndim))
        distance = np.sqrt(((values - wide) ** 2).sum(axes))
        length = np.maximum(np.sqrt((wide**2).sum(axes)), np.finfo(np.float32).tiny)
        errors.append(float((distance / length).mean()))
    return float(np.mean(errors))


def box_iou(boxes: NDArray[np.floating], others: NDArray[np.floating]) -> NDArray[np.floating]:
    """Intersection over union of boxes [..., 4] that are not empty, pair by pair."""
    low, high = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    both = np.concatenate([low, high], -1)
    inner, one, other = ((b[..., 2:] - b[..., :2]).clip(0).prod(-1) for b in (both, boxes, others))
    return inner / (one + other - inner)
