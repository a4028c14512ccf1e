"""The maximum over a convolution's map as the pooling that runtimes know it by.

PyTorch's exporter writes `amax((2, 3))` as ReduceMax. ONNX Runtime's CPU provider lays convolutions out in blocks of
channels, in which GlobalMaxPool reads them as they are; before a ReduceMax it first copies the map back. For the part
convolution that copy and the reduction took three times as long as the pooling, on a map of 2000 x 28 x 28.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import helper, numpy_helper

from mge_export.surgery import replace_nodes

__all__ = ["pool_maxima"]


def pool_maxima(model: onnx.ModelProto) -> int:
    """Replace ReduceMax over both axes of a convolution's output by GlobalMaxPool and Flatten, in place.

    A Cast between the two goes behind them: widening keeps the order of numbers, so the maximum is the same. (On a map
    that holds NaN the two operators differ, and differ between runtimes; it has no maximum.)

    Args:
        model: with its weights; every node has a name.

    Returns:
        How many were replaced.
    """
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter([*(name for node in graph.node for name in node.input), *(t.name for t in graph.output)])
    constants = {tensor.name: tensor for tensor in graph.initializer}
    added: dict[str, list[onnx.NodeProto]] = {}  # name of a replaced node -> what comes in its place
    replaced = 0
    for node in graph.node:
        if node.op_type != "ReduceMax" or len(node.input) != 2 or not _both_axes(node, constants.get(node.input[1])):
            continue
        source = producers.get(node.input[0])
        cast = source if source is not None and source.op_type == "Cast" and readers[source.output[0]] == 1 else None
        conv = source if cast is None else producers.get(cast.input[0])
        if conv is None or conv.op_type != "Conv" or len(constants[conv.input[1]].dims) != 4:
            continue
        replaced += 1
        (result,) = node.output
        pooled, flat = f"{result}_pooled", result if cast is None else f"{result}_flat"
        added[node.name] = [
            helper.make_node("GlobalMaxPool", [conv.output[0]], [pooled], name=f"{node.name}_pool"),
            helper.make_node("Flatten", [pooled], [flat], name=node.name, axis=1),
        ]
        if cast is not None:
            moved = helper.make_node("Cast", [flat], [result], name=cast.name)
            moved.attribute.extend(cast.attribute)
            added[node.name].append(moved)
            added[cast.name] = []
    if added:
        replace_nodes(graph, added)
    return replaced


def _both_axes(node: onnx.NodeProto, axes: onnx.TensorProto | None) -> bool:
    kept = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
    return axes is not None and not kept and sorted(numpy_helper.to_array(axes).reshape(-1).tolist()) == [2, 3]
