"""Precision as a property of the written graph: read it back, and refuse a graph that is not what was asked for."""

from __future__ import annotations

from collections import Counter
from enum import Enum

import onnx
import torch

from mge_runtime.errors import ExportError

__all__ = ["Precision", "check_precision", "read_precision"]

# Types of numbers whose precision matters; integers, booleans and shapes are exact.
_FLOATS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
}
# Operators of the heads, the attention and the crop, which no trunk has: FP32 in every precision. L2 norms and softmax
# saturate in FP16, positions in an image of 448 pixels have an error of a quarter of a pixel.
_ISLANDS = frozenset({"ArgMax", "GatherElements", "GatherND", "GridSample", "ReduceL2", "ReduceMin"})


class Precision(Enum):
    """What trunks compute in, and part convolutions (of INT8: in FP16); everything else is FP32."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"  # Q/DQ in the trunk; what is not quantised there is FP16

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's type, of INT8 that around its Q/DQ."""
        return torch.float32 if self is Precision.FP32 else torch.float16

    @property
    def onnx_name(self) -> str:
        """The type's name in a precision plan."""
        return "float32" if self is Precision.FP32 else "float16"


def read_precision(model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """Count the nodes of each operator by the floating types of their tensors.

    Types are inferred from the graph itself (`onnx.shape_inference`): the plan tells what was written, not what was
    meant.

    Returns:
        operator -> "float16", "float32", or "float16/float32" where a node has tensors of both (casts) -> nodes;
        sorted by name. Nodes without floating tensors are left out.

    Raises:
        ExportError: a tensor's type is unknown.
    """
    types = _tensor_types(model)
    counts: Counter[tuple[str, str]] = Counter()
    for node in model.graph.node:
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


def check_precision(
    stage: str, model: onnx.ModelProto, precision: Precision, *, has_trunk: bool
) -> dict[str, dict[str, int]]:
    """Hold a written graph to the precision that was asked for.

    Every convolution must have all its tensors in that precision, the attention's and the heads' own operators and the
    stage's border must be FP32.

    Args:
        stage: its name, for errors.
        model: the graph as written.
        precision: what was asked for.
        has_trunk: whether convolutions are expected; a trunk without any would prove nothing.

    Returns:
        The plan that was read back, see `read_precision`.

    Raises:
        ExportError: they are not, e.g. a graph that stayed FP32 where FP16 was asked for.
    """
    plan = read_precision(model)
    wanted = precision.onnx_name
    if has_trunk and "Conv" not in plan:
        raise ExportError(f"{stage}: the graph has no convolution; expected a trunk in {wanted}")
    for kind, number in plan.get("Conv", {}).items():
        if kind != wanted:
            raise ExportError(f"{stage}: {number} convolutions are {kind}; expected {wanted} as asked for")
    for operator in sorted(_ISLANDS & set(plan)):
        for kind, number in plan[operator].items():
            if kind != "float32":
                raise ExportError(f"{stage}: {number} {operator} are {kind}; expected float32 in every precision")
    for tensor in (*model.graph.input, *model.graph.output):
        kind = _FLOATS.get(tensor.type.tensor_type.elem_type, "float32")
        if kind != "float32":
            raise ExportError(f"{stage}: tensor {tensor.name!r} at the border is {kind}; expected float32")
    return plan


def _tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for tensor in (*inferred.input, *inferred.output, *inferred.value_info):
        types[tensor.name] = tensor.type.tensor_type.elem_type
    return types
