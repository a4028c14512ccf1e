"""Quantise one stage: learn ranges, measure every layer, leave the worst ones float until the answers stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import onnx

from mge_calibration.int8.agreement import Agreement, Classes, compare, relative_error
from mge_calibration.int8.insert import insert_quantization
from mge_calibration.int8.ranges import METHODS
from mge_calibration.int8.sessions import Tensors, default_workers, learn_ranges, run_batches
from mge_calibration.int8.sites import Layer, find_layers

__all__ = ["Int8Options", "QuantizedStage", "quantize_stage"]

BATCH = 4
SENSITIVITY_IMAGES = 32  # each layer is quantised alone on so many: a norm over answers and maps needs no more


@dataclass(frozen=True)
class Int8Options:
    """How INT8 is learned.

    Raises:
        ValueError: a method or a drop that is none.
    """

    method: str = "mse"  # of `ranges.METHODS`
    max_drop: float = 0.005  # share of images whose class may change in a stage
    seed: int = 0
    float_crops: bool = False  # calibrate expert k on crops of the float experts before it: for comparison

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if not 0 <= self.max_drop < 1:
            raise ValueError(f"max_drop is {self.max_drop}; expected a share in [0, 1)")


@dataclass(frozen=True)
class QuantizedStage:
    """A stage with its Q/DQ nodes, and what was measured on the way."""

    model: onnx.ModelProto
    layers: tuple[Layer, ...]  # that are quantised
    left: tuple[Layer, ...]  # that stayed float, the worst first
    sensitivity: Mapping[str, float]  # layer name -> relative error with it alone quantised; empty: all could be
    all_layers: Agreement  # with every layer quantised
    agreement: Agreement  # as it is
    outputs: Tensors = field(repr=False)  # of the quantised stage over all images
    float_outputs: Tensors = field(repr=False)

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


def quantize_stage(
    model: onnx.ModelProto,
    trunk_weight: Callable[[str], bool],
    inputs: Mapping[str, np.ndarray],
    classes: Classes,
    options: Int8Options,
) -> QuantizedStage:
    """Quantise a stage's trunk.

    Args:
        model: with its weights; left as it is.
        trunk_weight: whether an initialiser is a convolution's weight in the trunk.
        inputs: the stage's inputs over all calibration images, by name.
        classes: what follows from the stage's outputs; its changes are held to `options.max_drop`.
        options: how.
    """
    layers = find_layers(model, trunk_weight)
    tensors = list(dict.fromkeys(name for layer in layers for name in layer.activations))

    def batches(most: int | None = None) -> Iterator[Mapping[str, np.ndarray]]:
        count = min(len(value) for value in inputs.values())
        for start in range(0, count if most is None else min(most, count), BATCH):
            yield {name: value[start : start + BATCH] for name, value in inputs.items()}

    ranges, means = learn_ranges(model, tensors, batches, options.method)
    reference = run_batches(model, batches())
    few = {name: value[:SENSITIVITY_IMAGES] for name, value in reference.items()}

    def error(layer: Layer) -> float:
        found = run_batches(insert_quantization(model, [layer], ranges, means), batches(SENSITIVITY_IMAGES))
        return relative_error(found, {name: value[: len(found[name])] for name, value in few.items()})

    def attempt(chosen: Sequence[Layer]) -> tuple[onnx.ModelProto, Tensors, Agreement]:
        changed = insert_quantization(model, chosen, ranges, means)
        outputs = run_batches(changed, batches()) if chosen else reference
        return changed, outputs, compare(outputs, reference, classes)

    quantised, outputs, agreement = attempt(layers)
    everything, left, sensitivity = agreement, (), {}
    if not agreement.within(options.max_drop):
        with ThreadPoolExecutor(default_workers()) as pool:
            errors = dict(zip(layers, pool.map(error, layers), strict=True))
        worst = sorted(layers, key=lambda layer: -errors[layer])
        sensitivity = {layer.name: errors[layer] for layer in worst}
        for count in _steps(len(layers)):
            left = tuple(worst[:count])
            quantised, outputs, agreement = attempt([layer for layer in layers if layer not in left])
            if agreement.within(options.max_drop):
                break
    return QuantizedStage(
        quantised,
        tuple(layer for layer in layers if layer not in left),
        left,
        sensitivity,
        everything,
        agreement,
        outputs,
        reference,
    )


def _steps(layers: int) -> Sequence[int]:
    """How many layers to leave float, one attempt after the other: one more each time, later an eighth more."""
    found = [1]
    while found[-1] < layers:
        found.append(min(layers, found[-1] + max(1, found[-1] // 8)))
    return found
