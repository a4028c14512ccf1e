"""INT8 in an export: stages in FP16, their trunks quantised with ranges that are learned from images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from mge_calibration.int8.chain import quantize_chain
from mge_calibration.int8.images import CalibrationImages
from mge_calibration.int8.stage import Int8Options
from mge_export.graph import StageGraph, externalize, inlined, weights_name
from mge_export.precision import Precision
from mge_export.stages import Stage
from mge_runtime.errors import ExportError

__all__ = ["Int8Request", "LearnedGraph", "check_quantization", "is_trunk_weight", "quantize_graphs"]


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
            "min_box_iou": self.options.min_box_iou,
            "seed": self.options.seed,
            "crops": "float" if self.options.float_crops else "quantised",
            "images": len(self.images.frames),
            "sha256": self.images.sha256,
            "digests": list(self.images.digests),
        }


@dataclass(frozen=True)
class LearnedGraph:
    """A stage's graph and, if it was quantised, what was learned."""

    graph: StageGraph
    nodes: frozenset[str] = frozenset()  # names of those that were quantised
    learned: Mapping[str, Any] = field(default_factory=dict[str, Any])  # for the manifest


def is_trunk_weight(name: str) -> bool:
    """Whether an initialiser is a layer of a `TypedTrunk`: neither a head's nor the part convolution's."""
    return ".trunk.layers." in f".{name}" and name.endswith(".weight")


def quantize_graphs(
    stages: Sequence[Stage],
    graphs: Mapping[str, StageGraph],
    answer: str,
    request: Int8Request,
    say: Callable[[str], None],
) -> dict[str, LearnedGraph]:
    """Quantise the trunks of a chain of written stages.

    Args:
        stages: typed for INT8.
        graphs: of all stages, by name; left as they are.
        answer: the tensor [B, C] that answers after the whole chain, the last segment's.
        request: images and options.
        say: shows progress.

    Returns:
        By name, of stages with a trunk; one that stays in FP16 has no quantised nodes.

    Raises:
        ExportError: all of them stay in FP16.
    """
    models = {name: inlined(graph) for name, graph in graphs.items()}
    specs = [stage.spec for stage in stages]
    frames = request.images.frames
    results = quantize_chain(specs, models, is_trunk_weight, frames, answer, request.options, say)
    done: dict[str, LearnedGraph] = {}
    for stage in stages:
        name = stage.spec.name
        if stage.precision is not Precision.INT8:
            continue
        result = results.get(name)
        if result is None:
            continue
        graph = graphs[name]
        if result.layers:
            graph = StageGraph(stage.spec, result.model, externalize(result.model, weights_name(name)))
        learned = {"quantized": result.to_dict(), "calibration": request.to_dict()}
        done[name] = LearnedGraph(graph, frozenset(layer.node for layer in result.layers), learned)
    if not any(made.nodes for made in done.values()):
        options = request.options
        raise ExportError(
            f"no stage can be quantised within --max-drop {100 * options.max_drop:g} points and --min-box-iou "
            f"{options.min_box_iou:g}; expected at least one: allow more, calibrate on more images, or export "
            "with --fp16"
        )
    return done


def check_quantization(stage: str, model: onnx.ModelProto, nodes: Collection[str]) -> None:
    """Hold a written graph to what was quantised: its nodes read dequantised tensors, and nothing else does.

    Args:
        stage: its name, for errors.
        model: the graph as written, every node named.
        nodes: names of the convolutions and sums that were quantised. Both terms of each come from a DequantizeLinear.

    Raises:
        ExportError: one of them reads something else, or is not there; or anything else, an output of the graph
            included, reads what a Q or DQ puts out.
    """
    kinds = {output: node.op_type for node in model.graph.node for output in node.output}
    missing = set(nodes) - {node.name for node in model.graph.node}
    if missing:
        raise ExportError(f"{stage}: no node {min(missing)!r} in the graph; expected it, since it was quantised")
    for node in model.graph.node:
        found = [index for index, name in enumerate(node.input) if kinds.get(name) == "DequantizeLinear"]
        wanted = [0, 1] if node.name in nodes else []
        if found != wanted:
            raise ExportError(
                f"{stage}: {node.op_type} {node.name!r} reads a DequantizeLinear at inputs {found}; expected {wanted}, "
                "since the quantised layers alone read them"
            )
        if node.op_type != "DequantizeLinear" and any(kinds.get(name) == "QuantizeLinear" for name in node.input):
            raise ExportError(
                f"{stage}: {node.op_type} {node.name!r} reads a QuantizeLinear; expected a DequantizeLinear between"
            )
    for output in model.graph.output:
        if kinds.get(output.name) in ("QuantizeLinear", "DequantizeLinear"):
            raise ExportError(f"{stage}: a {kinds[output.name]} puts out {output.name!r}; expected none at an output")
