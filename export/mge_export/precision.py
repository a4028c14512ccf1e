"""Precision as a property of the written graph: read it back, and refuse a graph that is not what was asked for."""

from __future__ import annotations

from collections import Counter
from enum import Enum

import onnx
import torch

from mge_runtime.errors import ExportError

# Types of numbers whose precision matters; integers, booleans and shapes are exact.
_FLOATS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
}
# Operators of the heads, the attention and the crop, which no backbone has: FP32 in every precision. L2 norms and
# softmax saturate in FP16, positions in an image of 448 pixels have an error of a quarter of a pixel.
_ISLANDS = frozenset({"ArgMax", "GatherElements", "GatherND", "GridSample", "ReduceL2", "ReduceMin"})


class Precision(Enum):
    """What backbones compute in, and part convolutions (of INT8: in FP16); everything else is FP32."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"  # Q/DQ in the backbone; what is not quantized there is FP16

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's type, of INT8 that around its Q/DQ."""
        return torch.float32 if self is Precision.FP32 else torch.float16

    @property
    def onnx_name(self) -> str:
        """The type's name in a precision plan."""
        return "float32" if self is Precision.FP32 else "float16"


def infer_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph with the type and, as far as it is known, the shape of every tensor.

    Raises:
        ExportError: they contradict each other.
    """
    try:
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"the types or shapes of the graph contradict each other: {error}") from error


def read_precision(model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """Count the nodes of each operator by the floating types of their tensors.

    Args:
        model: of `infer_types`: the plan tells what was written, not what was meant.

    Returns:
        operator -> "float16", "float32", or "float16/float32" where a node has tensors of both (casts) -> nodes;
        sorted by name. Nodes without floating tensors are left out.

    Raises:
        ExportError: a tensor's type is unknown.
    """
    graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for tensor in (*graph.input, *graph.output, *graph.value_info):
        types[tensor.name] = tensor.type.tensor_type.elem_type
    counts: Counter[tuple[str, str]] = Counter()
    for node in graph.node:
        tensors = [name for name in (*node.input, *node.output) if name]
        if unknown := [name for name in tensors if name not in types]:
            raise ExportError(f"the type of tensor {unknown[0]!r} ({node.op_type}) is unknown; expected a typed graph")
        floats = sorted({_FLOATS[types[name]] for name in tensors if types[name] in _FLOATS})
        if floats:
            counts[node.op_type, "/".join(floats)] += 1
    plan: dict[str, dict[str, int]] = {}
    for (operator, kind), number in sorted(counts.items()):
        plan.setdefault(operator, {})[kind] = number
    return plan


def check_precision(name: str, model: onnx.ModelProto, precision: Precision) -> dict[str, dict[str, int]]:
    """Check a graph, by `infer_types`, against the precision that was asked for.

    Every convolution must have all its tensors in that precision, the attention's and the heads' own operators and the
    graph's inputs and outputs must be FP32.

    Returns:
        The plan that was read back, see `read_precision`.

    Raises:
        ExportError: they are not, e.g. a graph that stayed FP32 where FP16 was asked for; it begins with `name`.
    """
    plan = read_precision(model)
    wanted = precision.onnx_name
    if "Conv" not in plan:  # which would prove nothing
        raise ExportError(f"{name}: the graph has no convolution; expected a backbone in {wanted}")
    for kind, number in plan.get("Conv", {}).items():
        if kind != wanted:
            raise ExportError(f"{name}: {number} convolutions are {kind}; expected {wanted} as asked for")
    for operator in sorted(_ISLANDS & set(plan)):
        for kind, number in plan[operator].items():
            if kind != "float32":
                raise ExportError(f"{name}: {number} {operator} are {kind}; expected float32 in every precision")
    for tensor in (*model.graph.input, *model.graph.output):
        kind = _FLOATS.get(tensor.type.tensor_type.elem_type, "float32")
        if kind != "float32":
            raise ExportError(f"{name}: the input or output {tensor.name!r} is {kind}; expected float32")
    return plan
