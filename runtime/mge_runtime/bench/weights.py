"""How large a bundle's weights are as FP32, whatever they are stored as."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mge_runtime.bundle.layout import stage_graph
from mge_runtime.bundle.wire import fields, varint

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle

__all__ = ["fp32_bytes", "tensor_dims"]

_GRAPH, _INITIALIZER, _DIMS, _TYPE = 7, 5, 1, 2  # fields of ModelProto, GraphProto, TensorProto
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


def tensor_dims(tensor: memoryview) -> list[int]:
    """Sizes of the axes of a TensorProto, written one by one or packed."""
    dims: list[int] = []
    for number, raw, value in fields(tensor):
        if number == _DIMS:
            position, packed = 0, raw[0] & 7 == 2
            while position < len(value):
                size, position = varint(value, position)
                dims.append(size)
                if not packed:
                    break
    return dims


def _elements(tensor: memoryview) -> int:
    kind = next((varint(value, 0)[0] for number, _, value in fields(tensor) if number == _TYPE), 0)
    return math.prod(tensor_dims(tensor)) if kind in _WEIGHTS else 0
