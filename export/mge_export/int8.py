"""INT8 in an export: graphs in FP16, their backbones quantized with ranges that are learned from images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx

from mge_calibration.int8.images import CalibrationImages
from mge_calibration.int8.quantize import Int8Options, quantize_chain
from mge_export.graph import OnnxGraph, externalize, inlined, weights_name
from mge_export.precision import Precision
from mge_runtime.errors import ExportError
from mge_runtime.manifest import Crops


@dataclass(frozen=True)
class Int8Request:
    """What `--int8` asks for."""

    images: CalibrationImages
    options: Int8Options

    def to_dict(self) -> dict[str, Any]:
        """For the manifest, in the plan of every quantized graph: enough to do it again."""
        return {
            "method": self.options.method,
            "max_drop": self.options.max_drop,
            "min_box_iou": self.options.min_box_iou,
            "seed": self.options.seed,
            "images": len(self.images.frames),
            "sha256": self.images.sha256,
            "digests": list(self.images.digests),
        }


@dataclass(frozen=True)
class LearnedGraph:
    """A graph and, if it was quantized, what was learned."""

    graph: OnnxGraph
    nodes: frozenset[str] = frozenset()  # names of those that were quantized
    learned: Mapping[str, Any] = field(default_factory=dict[str, Any])  # for the manifest


def is_backbone_weight(name: str) -> bool:
    """Whether an initializer is a layer of a `TypedBackbone`: neither a head's nor the part convolution's."""
    return ".backbone.layers." in f".{name}" and name.endswith(".weight")


def quantize_graphs(
    graphs: Sequence[OnnxGraph], boxes: Sequence[str], crops: Crops, request: Int8Request, say: Callable[[str], None]
) -> list[LearnedGraph]:
    """Quantize the backbones of a chain of written graphs, typed for INT8, which are left as they are.

    Args:
        graphs: in the order they run.
        boxes: names of the chain's boxes, in the order they are made.
        crops: what they are pixels of.
        request: images to learn from, and how.
        say: shows progress.

    Returns:
        The same graphs; one that stays in FP16 has no quantized nodes.

    Raises:
        ExportError: all of them stay in FP16.
    """
    names = {graph.spec.name: weights_name(graph.spec.name) for graph in graphs}
    models = {g.spec.name: inlined(g.model, {names[g.spec.name]: g.weights}) for g in graphs}
    specs = [graph.spec for graph in graphs]
    results = quantize_chain(
        specs, models, boxes, crops, is_backbone_weight, request.images.frames, request.options, say
    )
    done: list[LearnedGraph] = []
    for graph in graphs:
        result = results[graph.spec.name]
        made = replace(graph, precision=Precision.FP16)
        if result.layers:
            made = replace(graph, model=result.model, weights=externalize(result.model, names[graph.spec.name]))
        learned = {"quantized": result.to_dict(), "calibration": request.to_dict()}
        done.append(LearnedGraph(made, frozenset(layer.node for layer in result.layers), learned))
    if not any(made.nodes for made in done):
        options = request.options
        raise ExportError(
            f"no graph can be quantized within --max-drop {100 * options.max_drop:g} points and --min-box-iou "
            f"{options.min_box_iou:g}; expected at least one: allow more, calibrate on more images, or export "
            "with --fp16"
        )
    return done


def check_quantization(graph: str, model: onnx.ModelProto, nodes: Collection[str]) -> None:
    """Check a written graph against what was quantized: its nodes read dequantized tensors, and nothing else does.

    Args:
        graph: its name, for errors.
        model: the graph as written, every node named.
        nodes: names of the convolutions and sums that were quantized. Both terms of each come from a DequantizeLinear.

    Raises:
        ExportError: one of them is not there or reads something else; or anything else, an output of the graph
            included, reads what a Q or DQ makes.
    """
    kinds = {output: node.op_type for node in model.graph.node for output in node.output}
    missing = set(nodes) - {node.name for node in model.graph.node}
    if missing:
        raise ExportError(f"{graph}: no node {min(missing)!r} in the graph; expected it, since it was quantized")
    for node in model.graph.node:
        found = [index for index, name in enumerate(node.input) if kinds.get(name) == "DequantizeLinear"]
        wanted = [0, 1] if node.name in nodes else []
        if found != wanted:
            raise ExportError(
                f"{graph}: {node.op_type} {node.name!r} reads a DequantizeLinear at inputs {found}; expected {wanted}, "
                "since the quantized layers alone read them"
            )
        if node.op_type != "DequantizeLinear" and any(kinds.get(name) == "QuantizeLinear" for name in node.input):
            raise ExportError(
                f"{graph}: {node.op_type} {node.name!r} reads a QuantizeLinear; expected a DequantizeLinear between"
            )
    for output in model.graph.output:
        if kinds.get(output.name) in ("QuantizeLinear", "DequantizeLinear"):
            raise ExportError(f"{graph}: a {kinds[output.name]} makes the output {output.name!r}; expected none there")
