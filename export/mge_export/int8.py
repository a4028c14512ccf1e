"""INT8 in an export: stages in FP16, their trunks quantised with ranges that are learned from images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from mge_calibration.int8.chain import quantize_chain
from mge_calibration.int8.images import CalibrationImages
from mge_calibration.int8.stage import Int8Options
from mge_export.graph import StageGraph, externalize, inlined, weights_name
from mge_export.precision import Precision
from mge_export.stages import Stage
from mge_runtime.errors import ExportError
from mge_runtime.spec import StageSpec

__all__ = ["Int8Request", "check_quantization", "is_trunk_weight", "quantize_graphs"]


@dataclass(frozen=True)
class Int8Request:
    """What `--int8` asks for."""

    images: CalibrationImages
    options: Int8Options

    def to_dict(self) -> dict[str, Any]:
        """For the manifest, in the plan of every quantised stage: enough to do it again."""
        return {
            "method": self.options.method,
            "max_drop": self.options.max_drop,
            "seed": self.options.seed,
            "crops": "float" if self.options.float_crops else "quantised",
            "images": len(self.images.frames),
            "source": self.images.source,
            "sha256": self.images.sha256,
        }


def is_trunk_weight(name: str) -> bool:
    """Whether an initialiser is a layer of a `TypedTrunk`: neither a head's nor the part convolution's."""
    return ".trunk.layers." in f".{name}" and name.endswith(".weight")


def quantize_graphs(
    stages: Sequence[Stage], graphs: Mapping[str, StageGraph], request: Int8Request, say: Callable[[str], None]
) -> dict[str, tuple[StageGraph, dict[str, Any]]]:
    """Quantise the trunks of a chain of written stages.

    Args:
        stages: typed for INT8.
        graphs: of all stages, by name; left as they are.
        request: images and options.
        say: shows progress.

    Returns:
        By name, of stages with a trunk: the graph, and what was measured, for the manifest.

    Raises:
        ExportError: a trunk has nothing to quantise.
    """
    models = {name: inlined(graph) for name, graph in graphs.items()}
    specs = [stage.spec for stage in stages]
    frames, answers = request.images.frames, _answers(specs)
    results = quantize_chain(specs, models, is_trunk_weight, frames, answers, request.options, say)
    done: dict[str, tuple[StageGraph, dict[str, Any]]] = {}
    for stage in stages:
        name = stage.spec.name
        if stage.precision is not Precision.INT8:
            continue
        result = results.get(name)
        if result is None or not result.layers:
            raise ExportError(
                f"{name}: no layer can be quantised within --max-drop {100 * request.options.max_drop:g} points; "
                "expected at least one: allow more, calibrate on more images, or export with --fp16"
            )
        weights = externalize(result.model, weights_name(name))
        done[name] = (
            StageGraph(stage.spec, result.model, weights),
            {"quantized": result.to_dict(), "calibration": request.to_dict()},
        )
    return done


def _answers(stages: Sequence[StageSpec]) -> list[str]:
    """What the chain answers with: an expert that crops may be the last that runs, the last stage is."""
    names = [[tensor.name for tensor in stage.outputs] for stage in stages]
    early = [name for made in names if any(n.startswith("box_") for n in made) for name in made if "answer" in name]
    last = next(name for name in names[-1] if name == "logits" or name.startswith("answer_"))
    return [*early, last]


def check_quantization(stage: str, model: onnx.ModelProto, convolutions: int) -> None:
    """Hold a written graph to what was quantised, and the rest of it to FP16 and FP32.

    Args:
        stage: its name, for errors.
        model: the graph as written.
        convolutions: how many are quantised; both inputs of each come from a DequantizeLinear.

    Raises:
        ExportError: it has another number, or a Q/DQ that no convolution and no residual sum reads.
    """
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    coded = {output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    found = sum(node.op_type == "Conv" and coded.issuperset(node.input[:2]) for node in model.graph.node)
    if found != convolutions:
        raise ExportError(f"{stage}: {found} convolutions read two DequantizeLinear; expected {convolutions}")
    for name in sorted(coded):
        if not readers.get(name, set()) <= {"Conv", "Add"}:
            raise ExportError(
                f"{stage}: {sorted(readers[name])} read {name!r}; expected Conv and Add alone in the trunk"
            )
