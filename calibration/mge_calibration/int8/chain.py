"""Quantise a chain of stages, each on what the quantised ones before it really put out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from mge_calibration.int8.agreement import Classes
from mge_calibration.int8.sessions import Tensors, run_batches
from mge_calibration.int8.stage import BATCH, Int8Options, QuantizedStage, quantize_stage
from mge_runtime.spec import StageSpec

__all__ = ["quantize_chain"]


def quantize_chain(
    stages: Sequence[StageSpec],
    models: Mapping[str, onnx.ModelProto],
    trunk_weight: Callable[[str], bool],
    frames: np.ndarray,
    options: Int8Options,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, QuantizedStage]:
    """Quantise the trunks of a chain.

    A stage without a trunk is run as it is. Expert k so sees the crops that quantised experts make of the images, which
    are not quite those of the float model (`options.float_crops` calibrates on the latter). The gate puts out no class:
    its class is that of the mixture, made of its weights and of the experts' answers.

    Args:
        stages: in the order they run.
        models: by stage name, with their weights; left as they are.
        trunk_weight: whether an initialiser is a convolution's weight in a trunk.
        frames: uint8 [N, S, S, 3], the chain's input.
        options: how.
        say: shows progress.

    Returns:
        By name, the stages that have a trunk.
    """
    (first,) = stages[0].inputs
    tensors: Tensors = {first.name: frames}
    done: dict[str, QuantizedStage] = {}
    for index, stage in enumerate(stages):
        inputs = {tensor.name: tensors[tensor.name] for tensor in stage.inputs}
        if not any(node.op_type == "Conv" for node in models[stage.name].graph.node):
            tensors |= _run(models[stage.name], inputs)
            continue
        classes = _classes(stage, stages[index + 1 :], models, tensors)
        result = quantize_stage(models[stage.name], trunk_weight, inputs, classes, options)
        done[stage.name] = result
        tensors |= result.float_outputs if options.float_crops else result.outputs
        say(_line(stage.name, result))
        # Images are large and only the next expert wants them.
        wanted = {tensor.name for later in stages[index + 1 :] for tensor in later.inputs}
        tensors = {name: value for name, value in tensors.items() if name in wanted}
    return done


def _classes(
    stage: StageSpec, later: Sequence[StageSpec], models: Mapping[str, onnx.ModelProto], known: Tensors
) -> Classes:
    """What class follows from a stage's outputs: of its own logits, else of the stage that takes them in."""
    own = next((tensor.name for tensor in stage.outputs if tensor.name.startswith("logits")), None)
    if own is not None:
        return lambda outputs: outputs[own].argmax(1)
    names = {tensor.name for tensor in stage.outputs}
    mixture = next(other for other in later if names & {tensor.name for tensor in other.inputs})

    def classes(outputs: Tensors) -> np.ndarray:
        inputs = {tensor.name: (known | outputs)[tensor.name] for tensor in mixture.inputs}
        return _run(models[mixture.name], inputs)[mixture.outputs[0].name].argmax(1)

    return classes


def _run(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> Tensors:
    count = min(len(value) for value in inputs.values())
    parts = ({name: value[i : i + BATCH] for name, value in inputs.items()} for i in range(0, count, BATCH))
    return run_batches(model, parts)


def _line(stage: str, result: QuantizedStage) -> str:
    total = len(result.layers) + len(result.left)
    text = (
        f"{stage}: {len(result.layers)} of {total} layers in INT8, {100 * result.agreement.same_class:.1f} % same class"
        f" ({100 * result.all_layers.same_class:.1f} % with all)"
    )
    if result.agreement.box_iou is not None:
        text += f", box IoU {result.agreement.box_iou:.3f}"
    if result.left:
        shown = ", ".join(layer.name for layer in result.left[:6])
        text += f"; left in FP16: {shown}" + (f" and {len(result.left) - 6} more" if len(result.left) > 6 else "")
    return text
