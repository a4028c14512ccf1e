"""What rewriting a graph shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

__all__ = ["replace_nodes"]


def replace_nodes(graph: onnx.GraphProto, added: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put new nodes in place of old ones, and leave out nodes and initializers that nobody reads any more.

    Args:
        graph: changed in place; every node has a name.
        added: what comes in place of a node, by its name; none: the node goes.
    """
    nodes = [new for node in graph.node for new in added.get(node.name, [node])]
    outputs = {tensor.name for tensor in graph.output}
    while True:
        read = outputs | {name for node in nodes for name in node.input}
        kept = [node for node in nodes if read & set(node.output)]
        if len(kept) == len(nodes):
            break
        nodes = kept
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    for field, parts in (("node", nodes), ("initializer", tensors)):
        graph.ClearField(field)
        getattr(graph, field).extend(parts)
