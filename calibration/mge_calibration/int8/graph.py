"""Quantise one graph: learn ranges, measure every layer, leave the worst ones float until the answers stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass

import numpy as np
import onnx

from mge_calibration.int8.agreement import Agreement, relative_error
from mge_calibration.int8.insert import insert_quantization
from mge_calibration.int8.ranges import METHODS
from mge_calibration.int8.sessions import Run, default_workers, learn_ranges, open_graph, run_all
from mge_calibration.int8.sites import Layer, find_layers

__all__ = ["Int8Options", "Judge", "QuantizedGraph", "quantize_graph"]

SENSITIVITY_IMAGES = 32  # each layer is quantised alone on so many: a norm over answers and maps needs no more

Judge = Callable[[Run], tuple[Agreement, bool]]


@dataclass(frozen=True)
class Int8Options:
    """How INT8 is learned.

    Raises:
        ValueError: a method or a drop that is none.
    """

    method: str = "mse"  # of `ranges.METHODS`
    _: KW_ONLY
    max_drop: float = 0.005  # share of images whose class may change at the end of the chain
    min_box_iou: float = 0.9  # least median over images, of each box of the chain with the float chain's; 0: any
    seed: int = 0
    float_crops: bool = False  # calibrate expert k on crops of the float experts before it: for comparison

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if not 0 <= self.max_drop < 1:
            raise ValueError(f"max_drop is {self.max_drop}; expected a share in [0, 1)")
        if not 0 <= self.min_box_iou < 1:
            raise ValueError(f"min_box_iou is {self.min_box_iou}; expected an IoU in [0, 1)")


@dataclass(frozen=True)
class QuantizedGraph:
    """A graph with its Q/DQ nodes, and what was measured on the way."""

    model: onnx.ModelProto
    layers: tuple[Layer, ...]  # that are quantised
    left: tuple[Layer, ...]  # that stayed float, the worst first
    sensitivity: Mapping[str, float]  # layer name -> relative error with it alone quantised; empty: all could be
    all_layers: Agreement  # with every layer quantised
    agreement: Agreement  # as it is

    def to_dict(self) -> dict[str, object]:
        """Plain values for a manifest: what was quantised, what was not, and why."""
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
    trunk_weight: Callable[[str], bool],
    tensors: Mapping[str, np.ndarray],
    judge: Judge,
    options: Int8Options,
) -> QuantizedGraph:
    """Quantise a graph's trunk, or leave it in floats where most of its layers must stay there.

    Args:
        model: with its weights; left as it is.
        trunk_weight: whether an initialiser is a convolution's weight in the trunk.
        tensors: the graph's inputs over all calibration images, by name, in an order that is a random draw; others are
            ignored.
        judge: a variant of the graph -> how the chain then agrees, and whether that is enough.
        options: how.
    """
    inputs = {tensor.name: tensors[tensor.name] for tensor in model.graph.input}
    layers = find_layers(model, trunk_weight)
    names = list(dict.fromkeys(name for layer in layers for name in layer.activations))
    ranges, means = learn_ranges(model, names, inputs, options.method)

    def attempt(left: Sequence[Layer]) -> _Attempt:
        chosen = [layer for layer in layers if layer not in left]
        changed = insert_quantization(model, chosen, ranges, means)
        agreement, good = judge(open_graph(changed))
        return _Attempt(changed, tuple(chosen), tuple(left), agreement, good)

    everything = best = attempt(())
    sensitivity: dict[str, float] = {}
    if not best.good:
        few = run_all(open_graph(model), inputs, most=SENSITIVITY_IMAGES, workers=default_workers())

        def error(layer: Layer) -> float:
            run = open_graph(insert_quantization(model, [layer], ranges, means))
            return relative_error(run_all(run, inputs, most=SENSITIVITY_IMAGES), few)

        with ThreadPoolExecutor(default_workers()) as pool:
            errors = dict(zip(layers, pool.map(error, layers), strict=True))
        worst = sorted(layers, key=lambda layer: -errors[layer])
        sensitivity = {layer.name: errors[layer] for layer in worst}
        best = _fewest(len(layers), lambda count: attempt(worst[:count]))
        if len(best.layers) < len(best.left):
            # Islands of INT8 among floats cost more in codes than they save: a graph with 13 of 57 layers in INT8 took
            # twice its time in floats (EfficientNet-Lite0, ONNX Runtime 1.31 on a CPU with VNNI).
            best = attempt(layers)
    return QuantizedGraph(best.model, best.layers, best.left, sensitivity, everything.agreement, best.agreement)


@dataclass(frozen=True)
class _Attempt:
    model: onnx.ModelProto
    layers: tuple[Layer, ...]  # quantised
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
