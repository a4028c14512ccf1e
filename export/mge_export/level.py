"""Maps that are level: the gradient of a head that averages is the same at every cell, so one cell will do.

Behind a global average the vector-Jacobian product expands one number a channel to the whole map, which the attention
then scales, cuts at zero and averages again. The mean of a level map is its one value, so the expansion is left out.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import numpy_helper, shape_inference

__all__ = ["drop_expansions"]

_EACH_BY_ITSELF = frozenset({"Cast", "Div", "Mul", "Relu"})  # on a map and a scalar


def drop_expansions(model: onnx.ModelProto) -> int:
    """Leave out each Expand of one cell to a map that is averaged over both axes, in place.

    Args:
        model: with its weights.

    Returns:
        How many were left out.
    """
    graph = model.graph
    readers = Counter([*(name for node in graph.node for name in node.input), *(t.name for t in graph.output)])
    next_node = {name: node for node in graph.node for name in node.input}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inferred = shape_inference.infer_shapes(model).graph
    shapes = {v.name: [axis.dim_value for axis in v.type.tensor_type.shape.dim] for v in inferred.value_info}

    def is_averaged(tensor: str) -> bool:
        node = next_node.get(tensor)
        if node is None or readers[tensor] != 1:
            return False
        others = [name for name in node.input if name != tensor]
        if node.op_type == "ReduceMean":
            axes = constants.get(others[0]) if others else None
            return axes is not None and sorted(numpy_helper.to_array(axes).tolist()) == [2, 3]
        scalars = all(name in constants and numpy_helper.to_array(constants[name]).size == 1 for name in others)
        return node.op_type in _EACH_BY_ITSELF and scalars and is_averaged(node.output[0])

    dropped: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "Expand" or not is_averaged(node.output[0]):
            continue
        small, large = shapes.get(node.input[0], []), shapes.get(node.output[0], [])
        if small[2:] == [1, 1] and len(large) == 4 and 0 < small[1] == large[1]:
            dropped[node.output[0]] = node.input[0]
    if dropped:
        nodes = [node for node in graph.node if not dropped.keys() & set(node.output)]
        for node in nodes:
            node.input[:] = [dropped.get(name, name) for name in node.input]
        graph.ClearField("node")
        graph.node.extend(nodes)
    return len(dropped)
