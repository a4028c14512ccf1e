"""Quantize one graph: learn ranges, measure every layer, leave the worst ones float until the chain agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx

from mge_calibration.int8.insert import Layer, find_layers, insert_quantization
from mge_calibration.int8.ranges import WORKERS, Run, learn_ranges, open_graph, run_all

__all__ = ["Agreement", "Int8Options", "Judge", "QuantizedGraph", "quantize_graph", "relative_error"]

SENSITIVITY_IMAGES = 32  # each layer is quantized alone on so many: a norm over logits and maps needs no more
_ROUNDING = 1e-9  # a share times a number of images is a whole number up to this


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


def quantize_graph(
    model: onnx.ModelProto,
    backbone_weight: Callable[[str], bool],
    tensors: Mapping[str, np.ndarray],
    judge: Judge,
    options: Int8Options,
) -> QuantizedGraph:
    """Quantize a graph's backbone, or leave it in floats where most of its layers must stay there.

    Args:
        model: with its weights; left as it is.
        backbone_weight: whether an initializer is a convolution's weight in the backbone.
        tensors: the graph's inputs over all calibration images, by name, in an order that is a random draw; others are
            ignored.
        judge: a variant of the graph -> how the chain then agrees, and whether that is enough.
        options: how.
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

        def error(layer: Layer) -> float:
            run = open_graph(insert_quantization(model, [layer], ranges, means))
            return relative_error(run_all(run, few, workers=1), reference)

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


def relative_error(found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """Mean over images and tensors of |found - reference| / |reference|, Euclidean norms.

    Args:
        found: a graph's outputs; images and boxes are left out: one follows from the other, and the box from the heat
            map, which is in.
        reference: of the float graph on the same inputs.
    """
    errors: list[float] = []
    for name, values in found.items():
        if values.ndim > 3 or name.startswith("box_"):
            continue
        wide = reference[name].astype(np.float64)
        axes = tuple(range(1, wide.ndim))
        distance = np.sqrt(((values - wide) ** 2).sum(axes))
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
