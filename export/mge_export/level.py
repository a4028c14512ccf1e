"""Maps that are level: the gradient of a head that averages is the same at every cell, so one cell will do.

Behind a global average the vector-Jacobian product expands one number a channel to the whole map, which the attention
then scales, cuts at zero and averages again. The mean of a level map is its one value, so the expansion is left out.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import numpy_helper, shape_inference

from mge_export.surgery import replace_nodes

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
    producers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inferred = shape_inference.infer_shapes(model).graph
    shapes = {
        # An axis of which nothing is known equals no other.
        value.name: [axis.dim_param or axis.dim_value or object() for axis in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *graph.input)
    }

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

    def keeps_batch(node: onnx.NodeProto) -> bool:
        """Whether the shape that it expands to begins with the batch of an input, as its own tensor does."""
        target = producers.get(node.input[1])
        first = producers.get(target.input[0]) if target is not None and target.op_type == "Concat" else None
        if first is None or first.op_type != "Shape":
            return False
        part = {attribute.name: attribute.i for attribute in first.attribute}
        return (part.get("start", 0), part.get("end")) == (0, 1) and (
            shapes.get(first.input[0], [0])[0] == shapes.get(node.input[0], [None])[0]
        )

    dropped: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "Expand" or not is_averaged(node.output[0]) or not keeps_batch(node):
            continue
        small, large = shapes.get(node.input[0], []), shapes.get(node.output[0], [])
        if len(small) == len(large) == 4 and small[2:] == [1, 1] and small[1] == large[1]:
            dropped[node.output[0]] = node.input[0]
    if dropped:
        for node in graph.node:
            node.input[:] = [dropped.get(name, name) for name in node.input]
        replace_nodes(graph, {})
    return len(dropped)
