"""Quantize a chain of graphs, each on what the quantized ones before it really compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from mge_calibration.int8.graph import Agreement, Int8Options, Judge, QuantizedGraph, quantize_graph, relative_error
from mge_calibration.int8.ranges import Run, Tensors, open_graph, run_all
from mge_runtime.compare import box_iou, frame_boxes
from mge_runtime.manifest import GraphSpec

__all__ = ["quantize_chain"]

# A later expert still has to be quantized, and its own box must not then fall below the limit. Measured on photographs
# with EfficientNet-Lite0: that costs the median IoU up to 0.005, and 122 images leave it a standard error of 0.01.
_HEADROOM = 0.01


def quantize_chain(
    graphs: Sequence[GraphSpec],
    models: Mapping[str, onnx.ModelProto],
    backbone_weight: Callable[[str], bool],
    frames: np.ndarray,
    options: Int8Options,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, QuantizedGraph]:
    """Quantize the backbones of a chain.

    Expert k sees the crops that quantized experts make of the images, which are not quite those of the float model.
    Each graph is judged by what it does to the chain: the graphs before it quantized, those after it still in floats,
    logits and boxes against the float chain's. So after the last graph the limits hold for the chain as it will run. A
    box needs more than its own expert: a crop that moved by a pixel is another image to the next expert, whose box then
    moves further.

    Args:
        graphs: in the order they run, each with a backbone.
        models: by graph name, with their weights; left as they are.
        backbone_weight: whether an initializer is a convolution's weight in a backbone.
        frames: uint8 [N, S, S, 3], the chain's input.
        options: how.
        say: shows progress.

    Returns:
        The quantized graphs by name.
    """
    chain = _FloatChain(graphs, models, frames)
    tensors: Tensors = dict(chain.input)
    done: dict[str, QuantizedGraph] = {}
    for index, graph in enumerate(graphs):
        judge = chain.judge(index, tensors, options)
        result = done[graph.name] = quantize_graph(models[graph.name], backbone_weight, tensors, judge, options)
        say(_line(graph.name, result))
        # Images are large and only the next experts want them.
        wanted = {tensor.name for later in graphs[index + 1 :] for tensor in later.inputs}
        made = run_all(open_graph(result.model), tensors)
        tensors = {name: value for name, value in (tensors | made).items() if value.ndim < 4 or name in wanted}
    layers = sum(len(result.layers) for result in done.values())
    left = sum(len(result.left) for result in done.values())
    if layers < left:
        say(
            f"hint: {layers} of {layers + left} layers are in INT8, which saves little; boxes that may move further "
            "(--min-box-iou) or more classes that may change (--max-drop) let more in"
        )
    return done


class _FloatChain:
    """A chain in floats, and what it makes of the calibration images: the reference."""

    def __init__(
        self, graphs: Sequence[GraphSpec], models: Mapping[str, onnx.ModelProto], frames: NDArray[np.uint8]
    ) -> None:
        self.input = {graphs[0].inputs[0].name: frames}
        self._graphs, self._size = graphs, frames.shape[2]
        self._runs = [open_graph(models[graph.name]) for graph in graphs]
        # Images are large, and every one can be made again.
        self._reference = run_all(lambda batch: _small(self._finish(batch, 0)), self.input)

    def judge(self, index: int, tensors: Tensors, options: Int8Options) -> Judge:
        """Judge variants of a graph by what they do to the chain.

        Args:
            index: of the graph.
            tensors: what the graphs before it made of all images.
            options: the limits.

        Returns:
            Run of a variant -> its agreement, and whether it is within the limits.
        """
        own = run_all(lambda batch: _small(self._runs[index](batch)), tensors)
        moved = _boxes(self._graphs[index:])  # boxes that move with the graph
        least = {name: _least(options.min_box_iou, later) for later, name in enumerate(moved)}
        logits = self._graphs[-1].logits
        classes = self._reference[logits].argmax(1)

        def judge(run: Run) -> tuple[Agreement, bool]:
            found = run_all(lambda batch: _small(self._finish({**batch, **run(batch)}, index + 1)), tensors)
            changed = int((found[logits].argmax(1) != classes).sum())
            ious = {name: iou for name, iou in self._median_iou(found).items() if name in moved}
            error = relative_error({name: found[name] for name in own}, own)
            agreement = Agreement(len(classes), changed, ious, error)
            return agreement, agreement.within(options.max_drop, least)

        return judge

    def _finish(self, tensors: Mapping[str, np.ndarray], start: int) -> Tensors:
        """Run the graphs from number `start` on for one batch; return the tensors, with those that follow."""
        known = dict(tensors)
        for run in self._runs[start:]:
            known |= run(known)
        return known

    def _median_iou(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Median over images of each box's IoU with the float chain's, both in pixels of the frame."""
        boxes = _boxes(self._graphs)
        ours, theirs = (frame_boxes([t[name] for name in boxes], self._size) for t in (found, self._reference))
        return {name: float(np.median(iou)) for name, iou in zip(boxes, box_iou(ours, theirs), strict=True)}


def _boxes(graphs: Sequence[GraphSpec]) -> list[str]:
    return [tensor.name for graph in graphs for tensor in graph.outputs if tensor.name.startswith("box_")]


def _least(min_box_iou: float, later: int) -> float:
    """What a box must keep where so many experts still move it; never more than half of what is left to 1."""
    return min_box_iou + min(_HEADROOM * later, (1 - min_box_iou) / 2) if min_box_iou else 0.0


def _small(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """All but the images."""
    return {name: value for name, value in tensors.items() if value.ndim < 4}


def _line(graph: str, result: QuantizedGraph) -> str:
    total, found = len(result.layers) + len(result.left), result.agreement
    text = (
        f"{graph}: {len(result.layers)} of {total} layers in INT8; the chain has the same class on "
        f"{100 * found.same_class:.1f} % ({100 * result.all_layers.same_class:.1f} % with all)"
    )
    if found.box_iou:
        text += "; box IoU: " + ", ".join(f"{name} {iou:.3f}" for name, iou in found.box_iou.items())
    if result.left:
        shown = ", ".join(layer.name for layer in result.left[:6])
        text += f"; left in FP16: {shown}" + (f" and {len(result.left) - 6} more" if len(result.left) > 6 else "")
    return text
