"""The layers of a bundle's graphs, with shapes as ONNX Runtime infers them: what their arithmetic is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mge_runtime.backends.ort import import_onnxruntime, session_options
from mge_runtime.bundle.located import located_graph
from mge_runtime.bundle.onnx_nodes import INITIALIZER, OUTPUT, graph_fields, graph_nodes, member_name, tensor_dims
from mge_runtime.bundle.wire import wire_field
from mge_runtime.errors import BackendError, brief

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle

__all__ = ["Layer", "stage_layers"]

_LAYERS = ("Conv", "Gemm", "MatMul")
_GRAPH = 7  # field of ModelProto


@dataclass(frozen=True)
class Layer:
    """A convolution or a matrix product."""

    macs: int  # multiply-accumulates of one image
    weights: int  # elements of its second operand
    maps: int  # elements that it reads and puts out for one image


def stage_layers(bundle: Bundle) -> dict[str, tuple[Layer, ...]]:
    """Convolutions and matrix products of every stage, in the order of the manifest.

    Each stage is opened on the CPU for its shapes alone: nothing is computed, weights are mapped and not packed.

    Raises:
        BundleError: a graph is damaged.
        BackendError: ONNX Runtime is missing or cannot open a stage, or a shape cannot be inferred.
    """
    ort = import_onnxruntime()
    return {stage.name: _layers(ort, bundle, stage.name) for stage in bundle.manifest.stages}


def _layers(ort: Any, bundle: Bundle, stage: str) -> tuple[Layer, ...]:
    graph = located_graph(bundle, stage)
    parts = graph_fields(graph)
    nodes = graph_nodes(parts)
    layers = [node for node in nodes if node.operator in _LAYERS]
    made = {name for node in nodes for name in node.outputs}
    made -= {member_name(value, 1) for number, value in parts if number == OUTPUT}
    asked = [name for node in layers for name in (*node.inputs[:2], node.outputs[0]) if name in made]
    shapes = {member_name(value, 8): tensor_dims(value) for number, value in parts if number == INITIALIZER}
    # A second occurrence of the field is merged into the first (protobuf.dev, "Encoding"): more outputs.
    outputs = b"".join(wire_field(OUTPUT, wire_field(1, name.encode())) for name in dict.fromkeys(asked))
    for tensor in _border(ort, bundle, stage, graph + wire_field(_GRAPH, outputs)):
        # The first axis is the batch where its size is open; after some operators it has no name any more.
        first, *others = tensor.shape or [1]
        shapes[tensor.name] = [first if isinstance(first, int) else 1, *others]
    return tuple(
        _layer(stage, node.operator, *(shapes.get(name, [None]) for name in (*node.inputs[:2], node.outputs[0])))
        for node in layers
    )


def _border(ort: Any, bundle: Bundle, stage: str, graph: bytes) -> list[Any]:
    """Inputs and outputs of a graph, as a session that changes nothing says."""
    options = session_options(ort, bundle)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no base class but Exception
        raise BackendError(f"ONNX Runtime {ort.__version__} cannot open stage {stage}: {brief(error)}") from error
    return [*session.get_inputs(), *session.get_outputs()]


def _layer(
    stage: str, operator: str, first: Sequence[int | None], second: Sequence[int | None], out: Sequence[int | None]
) -> Layer:
    sizes = [[size for size in shape if isinstance(size, int)] for shape in (first, second, out)]
    if any(len(known) != len(shape) for known, shape in zip(sizes, (first, second, out), strict=True)):
        raise BackendError(f"ONNX Runtime cannot infer the shapes of a {operator} of stage {stage}")
    read, weights, made = sizes
    if operator == "Conv":
        depth = math.prod(weights[1:])  # input channels of the group x kernel
    elif operator == "Gemm":
        depth = math.prod(weights) // made[-1]
    else:
        depth = weights[-2] if len(weights) > 1 else weights[0]
    return Layer(math.prod(made) * depth, math.prod(weights), math.prod(read) + math.prod(made))
