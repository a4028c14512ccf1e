"""What a chain answers when some of its graphs are quantised and the later ones are still floats."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from mge_calibration.int8.agreement import box_iou
from mge_calibration.int8.sessions import Run, Tensors, default_workers, open_graph, run_all
from mge_runtime.manifest import GraphSpec
from mge_runtime.preprocess import Viewport, compose_boxes

__all__ = ["FloatChain", "small"]


class FloatChain:
    """A chain in floats, and what it answers to the calibration images: the reference.

    Args:
        graphs: in the order they run.
        models: by graph name, in floats, with their weights.
        frames: the first graph's input, uint8 [N, S, S, 3].
    """

    def __init__(
        self,
        graphs: Sequence[GraphSpec],
        models: Mapping[str, onnx.ModelProto],
        frames: NDArray[np.uint8],
    ) -> None:
        self.graphs = graphs
        self._logits = graphs[-1].logits
        self._size = frames.shape[2]
        self._runs: dict[str, Run] = {graph.name: open_graph(models[graph.name]) for graph in graphs}
        self._boxes = [tensor.name for graph in graphs for tensor in graph.outputs if tensor.name.startswith("box_")]
        (first,) = graphs[0].inputs
        self.input = {first.name: frames}
        # Pictures are large, and every one can be made again.
        self._reference = run_all(lambda batch: small(self.finish(batch, batch)), self.input, workers=default_workers())
        self._views = self._frame_boxes(self._reference)

    def run(self, graph: GraphSpec, tensors: Mapping[str, np.ndarray]) -> Tensors:
        """One graph over all images."""
        inputs = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        return run_all(self._runs[graph.name], inputs, workers=default_workers())

    def finish(self, tensors: Mapping[str, np.ndarray], changed: Collection[str]) -> Tensors:
        """Run every graph that reads what changed, for one batch.

        Args:
            tensors: what there is, the float graphs' own for all that did not change.
            changed: names among them of what is not the float chain's; of a new frame, the frame.

        Returns:
            The tensors, with those that follow.
        """
        known, differs = dict(tensors), set(changed)
        for graph in self.graphs:
            outputs = {tensor.name for tensor in graph.outputs}
            if not outputs & differs and any(tensor.name in differs for tensor in graph.inputs):
                known |= self._runs[graph.name](known)
                differs |= outputs
        return known

    def reference(self, names: Collection[str]) -> Tensors:
        """What the float chain made of the images; pictures are not kept."""
        return {name: self._reference[name] for name in names if name in self._reference}

    def boxes_moved_by(self, graph: GraphSpec) -> list[str]:
        """Boxes that change with a graph's outputs."""
        differs = {tensor.name for tensor in graph.outputs}
        for other in self.graphs:
            if any(tensor.name in differs for tensor in other.inputs):
                differs |= {tensor.name for tensor in other.outputs}
        return [name for name in self._boxes if name in differs]

    def changed_classes(self, found: Mapping[str, np.ndarray]) -> int:
        """Images whose class is not the float chain's."""
        return int((found[self._logits].argmax(1) != self._reference[self._logits].argmax(1)).sum())

    def median_iou(self, found: Mapping[str, np.ndarray], boxes: Sequence[str]) -> dict[str, float]:
        """Median over images of each box's IoU with the float chain's, both in pixels of the frame."""
        if not boxes:
            return {}
        iou = np.median(box_iou(self._frame_boxes(found), self._views), axis=0)
        return {name: float(value) for name, value in zip(self._boxes, iou, strict=True) if name in boxes}

    def _frame_boxes(self, tensors: Mapping[str, np.ndarray]) -> NDArray[np.floating]:
        """All boxes, [N, K - 1, 4]: one in pixels of a crop says nothing without the crop's own."""
        if not self._boxes:
            return np.zeros((0, 0, 4))
        frame = Viewport(0, 0, self._size, self._size, self._size, self._size)
        of_images = np.stack([tensors[name] for name in self._boxes], 1)
        return np.stack([compose_boxes(boxes, frame, self._size)[1:] for boxes in of_images])


def small(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """All but the pictures."""
    return {name: value for name, value in tensors.items() if value.ndim < 4}
