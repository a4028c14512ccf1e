"""Compare tensors of a chain with their reference, image by image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mge_export.runners import Tensors
from mge_runtime.manifest import GraphSpec
from mge_runtime.preprocess import Viewport, compose_boxes

__all__ = ["ChainDifferences", "GraphDifferences", "box_area", "box_iou", "class_margins"]


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Area of half-open boxes [..., 4] in square pixels."""
    return np.maximum(boxes[..., 2] - boxes[..., 0], 0) * np.maximum(boxes[..., 3] - boxes[..., 1], 0)


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [..., 4], pair by pair."""
    low, high = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    inner = box_area(np.concatenate([low, high], -1))
    return inner / (box_area(boxes) + box_area(others) - inner)


def class_margins(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far the reference's own class leads the class found, of its largest magnitude; 0 where they agree.

    Args:
        logits: found, [B, C].
        reference: [B, C].
    """
    theirs = reference.astype(np.float64)
    lead = theirs.max(1) - np.take_along_axis(theirs, logits.argmax(1)[:, None], 1)[:, 0]
    return lead / np.maximum(np.abs(theirs).max(1), np.finfo(np.float32).tiny)


@dataclass
class GraphDifferences:
    """One graph fed the reference's inputs: per image and tensor."""

    spec: GraphSpec
    absolute: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    relative: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of the image's largest value
    class_changes: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))  # of tensors of logits
    class_margins: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # see `class_margins`
    box_iou: list[float] = field(default_factory=list)

    def add(self, found: Tensors, reference: Tensors) -> None:
        """Take in a batch. An image cropped by another box is another image, so it is left out (its box is not)."""
        same_box = np.ones(len(reference["frame"]), bool)
        for tensor in self.spec.outputs:
            name, ours, theirs = tensor.name, found[tensor.name], reference[tensor.name]
            if name.startswith("box_"):
                self.box_iou += box_iou(ours, theirs).tolist()
                same_box = (ours == theirs).all(1)
            if name.startswith("logits"):
                self.class_changes[name] += (ours.argmax(1) != theirs.argmax(1)).tolist()
                self.class_margins[name] += class_margins(ours, theirs).tolist()
        for tensor in self.spec.outputs:
            if tensor.name.startswith("box_"):
                continue
            keep = same_box if tensor.name.startswith("image_") else np.ones_like(same_box)
            ours, theirs = found[tensor.name][keep], reference[tensor.name][keep]
            axes = tuple(range(1, ours.ndim))
            # In double, so that infinities stay and equal zeros are no difference.
            difference = np.abs(ours.astype(np.float64) - theirs).max(axes)
            scale = np.abs(theirs.astype(np.float64)).max(axes)
            self.absolute[tensor.name] += difference.tolist()
            quotient = np.divide(difference, scale, out=np.full_like(scale, np.inf), where=scale > 0)
            self.relative[tensor.name] += np.where(difference == 0, 0.0, quotient).tolist()


@dataclass
class ChainDifferences:
    """The whole chain on its own intermediate results: per image."""

    answer: str  # the tensor that answers
    boxes: Sequence[str]  # box_1 .. box_{K-1}
    size: int  # pixels, S
    class_changes: list[bool] = field(default_factory=list)
    class_margins: list[float] = field(default_factory=list)  # see `class_margins`
    relative: list[float] = field(default_factory=list)  # of the answer
    box_iou: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # in pixels of the frame

    def add(self, found: Tensors, reference: Tensors) -> None:
        """Take in a batch."""
        ours, theirs = found[self.answer].astype(np.float64), reference[self.answer].astype(np.float64)
        self.class_changes += (ours.argmax(1) != theirs.argmax(1)).tolist()
        self.class_margins += class_margins(ours, theirs).tolist()
        scale = np.maximum(np.abs(theirs).max(1), np.finfo(np.float32).tiny)
        self.relative += (np.abs(ours - theirs).max(1) / scale).tolist()
        for index in range(len(ours)):
            mine, wanted = self._seen(found, index), self._seen(reference, index)
            for name, iou in zip(self.boxes, box_iou(mine, wanted), strict=True):
                self.box_iou[name].append(float(iou))

    def _seen(self, tensors: Tensors, index: int) -> np.ndarray:
        """What experts 2..K saw, [K - 1, 4] in pixels of the frame: a later box means nothing without the earlier."""
        boxes = np.array([tensors[name][index] for name in self.boxes]).reshape(-1, 4)
        frame = Viewport(0, 0, self.size, self.size, self.size, self.size)
        return compose_boxes(boxes, frame, self.size)[1:]
