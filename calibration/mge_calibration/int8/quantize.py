"""Quantize a chain of graphs, each on what the quantized ones before it really compute.

In each graph ranges are learned, every layer is measured, and the worst ones stay float until the chain agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from mge_calibration.int8.insert import Layer, find_layers, insert_quantization
from mge_calibration.int8.ranges import WORKERS, Run, Tensors, learn_ranges, open_graph, run_all
from mge_runtime.compare import chain_box_iou
from mge_runtime.manifest import Crops, GraphSpec

SENSITIVITY_IMAGES = 32  # each layer is quantized alone on so many: a norm over logits and maps needs no more
_ROUNDING = 1e-9  # a share times a number of images is a whole number up to this
# A later expert still has to be quantized, and its own box must not then fall below the limit. Measured on photographs
# with EfficientNet-Lite0: that costs the median IoU up to 0.005, and 122 images leave it a standard error of 0.01.
_HEADROOM = 0.01


@dataclass(frozen=True)
class Agreement:
    """A chain with quantized graphs against the float chain, over N images."""

    images: int
    changed: int  # of them, with another class at the end of the chain
    box_iou: Mapping[str, float]  # box -> median over images, in pixels of the frame
    error: float  # of the graph alone, see `relative_error`

    @property
    def same_class(self) -> float:
        """Share of images."""
        return 1 - self.changed / self.images

    def within(self, max_drop: float, min_box_iou: Mapping[str, float]) -> bool:
        """Whether the class changed on no more than a share of `max_drop`, and every box stayed.

        Unless the share is 0, one image may change: with few images that is more than the share, but a class that was
        a tie tells nothing of a layer.
        """
        allowed = max(max_drop * self.images + _ROUNDING, 1 if max_drop else 0)
        return self.changed <= allowed and all(iou >= min_box_iou[name] for name, iou in self.box_iou.items())

    def to_dict(self) -> dict[str, object]:
        """Plain values for a manifest."""
        boxes = {name: round(iou, 4) for name, iou in self.box_iou.items()}
        return {"images": self.images, "changed": self.changed, "box_iou": boxes, "error": round(self.error, 6)}


Judge = Callable[[Run], tuple[Agreement, bool]]


@dataclass(frozen=True)
class Int8Options:
    """How INT8 is learned."""

    method: str = "mse"  # of `ranges.METHODS`
    max_drop: float = 0.005  # share of images whose class may change at the end of the chain, in [0, 1)
    min_box_iou: float = 0.9  # least median over images, of each box of the chain with the float chain's; 0: any
    seed: int = 0


@dataclass(frozen=True)
class QuantizedGraph:
    """A graph with its Q/DQ nodes, and what was measured on the way."""

    model: onnx.ModelProto
    layers: tuple[Layer, ...]  # that are quantized
    left: tuple[Layer, ...]  # that stayed float, the worst first
    sensitivity: Mapping[str, float]  # layer name -> relative error with it alone quantized; empty: all could be
    all_layers: Agreement  # with every layer quantized
    agreement: Agreement  # as it is

    def to_dict(self) -> dict[str, object]:
        """Plain values for a manifest: what was quantized, what was not, and why."""
        return {
            "convolutions": sum(layer.operator == "Conv" for layer in self.layers),
            "adds": sum(layer.operator == "Add" for layer in self.layers),
            "left_float": [layer.name for layer in self.left],
            "agreement": self.agreement.to_dict(),
            "agreement_all_layers": self.all_layers.to_dict(),
            "sensitivity": {name: float(f"{error:.3g}") for name, error in self.sensitivity.items()},
        }


def quantize_chain(
    graphs: Sequence[GraphSpec],
    models: Mapping[str, onnx.ModelProto],
    boxes: Sequence[str],
    crops: Crops,
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
        boxes: names of the chain's boxes, in the order they are made.
        crops: what they are pixels of.
        backbone_weight: whether an initializer is a convolution's weight in a backbone.
        frames: uint8 [N, S, S, 3], the chain's input.
        options: how.
        say: shows progress.

    Returns:
        The quantized graphs by name.
    """
    chain = _FloatChain(graphs, models, boxes, crops, frames)
    tensors: Tensors = dict(chain.input)
    done: dict[str, QuantizedGraph] = {}
    for index, graph in enumerate(graphs):
        judge = chain.judge(index, tensors, options)
        result = quantize_graph(models[graph.name], backbone_weight, tensors, judge, options, boxes)
        done[graph.name] = result
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
        self,
        graphs: Sequence[GraphSpec],
        models: Mapping[str, onnx.ModelProto],
        boxes: Sequence[str],
        crops: Crops,
        frames: NDArray[np.uint8],
    ) -> None:
        self.input = {graphs[0].inputs[0].name: frames}
        self._graphs, self._boxes, self._crops = graphs, boxes, crops
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
        outputs = {tensor.name for graph in self._graphs[index:] for tensor in graph.outputs}
        moved = [name for name in self._boxes if name in outputs]  # boxes that move with the graph
        least = {name: _least(options.min_box_iou, later) for later, name in enumerate(moved)}
        logits = self._graphs[-1].logits
        classes = self._reference[logits].argmax(1)

        def judge(run: Run) -> tuple[Agreement, bool]:
            found = run_all(lambda batch: _small(self._finish({**batch, **run(batch)}, index + 1)), tensors)
            changed = int((found[logits].argmax(1) != classes).sum())
            ious = chain_box_iou(self._boxes, found, self._reference, self._crops)
            medians = {name: float(np.median(ious[name])) for name in moved}
            error = relative_error(found, own, [name for name in own if name not in self._boxes])
            agreement = Agreement(len(classes), changed, medians, error)
            return agreement, agreement.within(options.max_drop, least)

        return judge

    def _finish(self, tensors: Mapping[str, np.ndarray], start: int) -> Tensors:
        """Run the graphs from number `start` on for one batch; return the tensors, with those that follow."""
        known = dict(tensors)
        for run in self._runs[start:]:
            known |= run(known)
        return known


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


def quantize_graph(
    model: onnx.ModelProto,
    backbone_weight: Callable[[str], bool],
    tensors: Mapping[str, np.ndarray],
    judge: Judge,
    options: Int8Options,
    boxes: Collection[str] = (),
) -> QuantizedGraph:
    """Quantize a graph's backbone, or leave it in floats where most of its layers must stay there.

    Args:
        model: with its weights; left as it is.
        backbone_weight: whether an initializer is a convolution's weight in the backbone.
        tensors: the graph's inputs over all N calibration images, [N, ...] by name, in an order that is a random draw;
            others are ignored.
        judge: a variant of the graph -> how the chain then agrees, and whether that is enough.
        options: how.
        boxes: outputs that tell nothing of a layer: each follows from a heat map.
    """
    inputs = {tensor.name: tensors[tensor.name] for tensor in model.graph.input}
    layers = find_layers(model, backbone_weight)
    names = list(dict.fromkeys(name for layer in layers for name in layer.activations))
    ranges, means = learn_ranges(model, names, inputs, options.method)

    def attempt(left: Sequence[Layer]) -> _Attempt:
        chosen = [layer for layer in layers if layer not in left]
        changed = insert_quantization(model, chosen, ranges, means)
        return _Attempt(changed, tuple(chosen), tuple(left), *judge(open_graph(changed)))

    everything = best = attempt(())
    sensitivity: dict[str, float] = {}
    if not best.good:
        few = {name: value[:SENSITIVITY_IMAGES] for name, value in inputs.items()}
        reference = run_all(open_graph(model), few)
        measured = [name for name, values in reference.items() if values.ndim < 4 and name not in boxes]

        def error(layer: Layer) -> float:
            run = open_graph(insert_quantization(model, [layer], ranges, means))
            return relative_error(run_all(run, few, workers=1), reference, measured)

        with ThreadPoolExecutor(WORKERS) as pool:
            errors = dict(zip(layers, pool.map(error, layers), strict=True))
        worst = sorted(layers, key=lambda layer: -errors[layer])
        sensitivity = {layer.name: errors[layer] for layer in worst}
        best = _fewest(len(layers), lambda count: attempt(worst[:count]))
        if len(best.layers) < len(best.left):
            # Islands of INT8 among floats cost more in codes than they save: a graph with 13 of 57 layers in INT8 took
            # twice its time in floats (EfficientNet-Lite0, ONNX Runtime 1.31 on a CPU with VNNI).
            best = attempt(layers)
    return QuantizedGraph(best.model, best.layers, best.left, sensitivity, everything.agreement, best.agreement)


def relative_error(found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], names: Iterable[str]) -> float:
    """Mean over images and tensors of |found - reference| / |reference|, Euclidean norms.

    Args:
        found: a graph's outputs.
        reference: of the float graph on the same inputs.
        names: of the outputs to compare: neither images nor boxes, which follow from the heat map.
    """
    errors: list[float] = []
    for name in names:
        wide = reference[name].astype(np.float64)
        axes = tuple(range(1, wide.ndim))
        distance = np.sqrt(((found[name] - wide) ** 2).sum(axes))
        length = np.maximum(np.sqrt((wide**2).sum(axes)), np.finfo(np.float32).tiny)
        errors.append(float((distance / length).mean()))
    return float(np.mean(errors))


@dataclass(frozen=True)
class _Attempt:
    model: onnx.ModelProto
    layers: tuple[Layer, ...]  # quantized
    left: tuple[Layer, ...]
    agreement: Agreement
    good: bool


def _fewest(layers: int, attempt: Callable[[int], _Attempt]) -> _Attempt:
    """Leave as few layers float as needed: twice as many each time until it is good, then half-way back, to an eighth.

    More layers in floats are not always better for single images, so the fewest is only nearly the fewest; what is
    returned was tried and good, unless nothing is.
    """
    bad, count = 0, 1
    while not (best := attempt(count)).good and count < layers:
        bad, count = count, min(2 * count, layers)
    while count - bad > max(1, count // 8):
        middle = (bad + count) // 2
        if (found := attempt(middle)).good:
            best, count = found, middle
        else:
            bad = middle
    return best
