"""How large a bundle's weights are as FP32, whatever they are stored as."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mge_runtime.bundle.layout import stage_graph
from mge_runtime.bundle.onnx_nodes import tensor_dims
from mge_runtime.bundle.wire import fields, varint

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle

__all__ = ["fp32_bytes"]

_GRAPH, _INITIALIZER, _TYPE = 7, 5, 2  # fields of ModelProto, GraphProto, TensorProto
_WEIGHTS = (1, 3, 10)  # TensorProto.DataType: FLOAT, INT8, FLOAT16


def fp32_bytes(bundle: Bundle) -> int:
    """Four bytes for each element of each floating or INT8 initialiser of each stage.

    Raises:
        BundleError: a graph was damaged.
    """
    count = 0
    for stage in bundle.manifest.stages:
        for number, _, graph in fields(memoryview(bundle.read(stage_graph(stage.name)))):
            for part, _, tensor in fields(graph) if number == _GRAPH else ():
                if part == _INITIALIZER:
                    count += _elements(tensor)
    return 4 * count


def _elements(tensor: memoryview) -> int:
    kind = next((varint(value, 0)[0] for number, _, value in fields(tensor) if number == _TYPE), 0)
    return math.prod(tensor_dims(tensor)) if kind in _WEIGHTS else 0
