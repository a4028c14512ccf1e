"""Rows of a constant matrix: what a product with a one-hot vector picks, a Gather copies.

`mge.attention.class_gradient` picks the class of the highest score by a product: the backward of a gather would be
a ScatterElements. In the forward graph the product reads the whole matrix for one row of it. What is computed from that
row alone, as the division and the ReLU before Grad-CAM's average, is computed once for all rows instead. The table is a
second copy of the head's matrix: 1.6 MB for 200 classes of 2048 channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mge_export.surgery import replace_nodes

__all__ = ["gather_rows"]

_Array = NDArray[Any]


def gather_rows(model: onnx.ModelProto) -> int:
    """Replace `one_hot(ArgMax(scores)) @ constant` by a Gather, in place, with what follows each row by itself.

    The results are the same bit for bit, as long as the constant is finite.

    Args:
        model: with its weights; every node has a name.

    Returns:
        How many products were replaced.
    """
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter([*(name for node in graph.node for name in node.input), *(t.name for t in graph.output)])
    next_node = {name: node for node in graph.node for name in node.input}
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def constant(name: str) -> _Array | None:
        """An initializer, or what transposing makes of one: the exporter computes that for small ones alone."""
        if name in constants:
            return numpy_helper.to_array(constants[name])
        node = producers.get(name)
        source = constant(node.input[0]) if node is not None and node.op_type == "Transpose" else None
        order = next((list(one.ints) for one in node.attribute if one.name == "perm"), None) if node else None
        return None if source is None else source.transpose(order)

    added: dict[str, list[onnx.NodeProto]] = {}  # name of a replaced node -> what comes in its place
    for product in graph.node:
        rows = constant(product.input[1]) if product.op_type == "MatMul" else None
        index = _index(product.input[0], producers, constant) if rows is not None and rows.ndim == 2 else None
        if rows is None or index is None or not np.isfinite(rows).all():
            continue
        last = product
        while readers[last.output[0]] == 1 and last.output[0] in next_node:
            follower = next_node[last.output[0]]
            computed = _each_row(follower, last.output[0], rows, constant)
            if computed is None:
                break
            added[follower.name] = []
            rows, last = computed, follower
        table = f"{last.output[0]}_rows"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(rows), table))
        gather = helper.make_node("Gather", [table, index], [last.output[0]], name=product.name, axis=0)
        added[product.name] = []
        added[last.name] = [gather]
    if added:
        replace_nodes(graph, added)
    return sum(map(len, added.values()))


def _index(one_hot: str, producers: dict[str, onnx.NodeProto], constant: Callable[[str], _Array | None]) -> str | None:
    """The class numbers [B] that a tensor [B, C] is the one-hot form of, as the model computes it; None: it is not."""
    cast = producers.get(one_hot)
    equal = producers.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
    if equal is None or equal.op_type != "Equal":
        return None
    for numbers, column in (equal.input, reversed(equal.input)):
        counted = constant(numbers)
        unsqueeze = producers.get(column)
        if counted is None or unsqueeze is None or unsqueeze.op_type != "Unsqueeze":
            continue
        first = producers.get(unsqueeze.input[0])
        axes = constant(unsqueeze.input[1])
        is_column = axes is not None and axes.reshape(-1).tolist() in ([1], [-1])
        if first is not None and first.op_type == "ArgMax" and is_column and _is_flat_argmax(first):
            return unsqueeze.input[0] if np.array_equal(counted, np.arange(counted.size)) else None
    return None


def _is_flat_argmax(node: onnx.NodeProto) -> bool:
    values = {attribute.name: attribute.i for attribute in node.attribute}
    return values.get("axis", 0) in (1, -1) and values.get("keepdims", 1) == 0


def _each_row(
    node: onnx.NodeProto, source: str, rows: _Array, constant: Callable[[str], _Array | None]
) -> _Array | None:
    """What a node makes of each row, for all rows at once; None where it mixes rows, or is unknown here."""
    others = [constant(name) for name in node.input if name != source]
    if any(other is None for other in others) or node.input[0] != source:
        return None
    scalars = [other for other in others if other is not None]
    if node.op_type == "Relu":
        return np.maximum(rows, rows.dtype.type(0))
    if node.op_type == "Div" and scalars[0].size == 1 and scalars[0].ndim <= rows.ndim:
        return rows / scalars[0].reshape(()).astype(rows.dtype)
    if node.op_type == "Unsqueeze" and all(axis > 0 for axis in scalars[0].reshape(-1)):
        return np.expand_dims(rows, tuple(int(axis) for axis in scalars[0].reshape(-1)))
    if node.op_type == "ReduceMean" and scalars:
        keeps = {attribute.name: attribute.i for attribute in node.attribute}.get("keepdims", 1)
        axes = [int(axis) for axis in scalars[0].reshape(-1)]
        if keeps and all(axis > 0 and rows.shape[axis] == 1 for axis in axes):
            return rows  # the mean of one number
    return None
