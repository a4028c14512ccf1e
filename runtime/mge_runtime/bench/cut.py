"""Cut a stage's graph down to a part of it, without the package `onnx`.

The bare trunk of a stage is every node that its last feature map c5 depends on: what a plain classifier's trunk would
cost. Field numbers are those of onnx.proto3, as in `bundle.onnx_graph` and `bundle.onnx_merge`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mge_runtime.bundle.onnx_nodes import (
    INITIALIZER,
    INPUT,
    NODE,
    OUTPUT,
    Node,
    graph_fields,
    graph_nodes,
    member_name,
    tensor_dims,
)
from mge_runtime.bundle.wire import fields, wire_field
from mge_runtime.errors import BundleError

__all__ = ["TRUNK_WEIGHTS", "Trunk", "cut_graph", "find_trunk"]

TRUNK_WEIGHTS = ".trunk.layers."  # in the name of every weight of a trunk, as `mge-export` writes them
_POOLING = ("ReduceMean", "GlobalAveragePool")
_TYPES = 13  # field of GraphProto


@dataclass(frozen=True)
class Trunk:
    """Where the trunk of a stage begins and ends."""

    image: str  # the graph's input that the trunk reads
    c5: str  # its last feature map, as the heads pool it
    channels: int  # of its last convolution
    convolutions: int  # with weights of the trunk; all of them are ancestors of c5


def find_trunk(graph: bytes) -> Trunk | None:
    """Find the trunk of a stage: from its last convolution on, the map that is pooled first.

    Activation, residual sum, cast and a folded norm behind the last convolution belong to it. Poolings inside the
    trunk, such as those of squeeze-and-excitation, lie before its last convolution.

    Args:
        graph: serialised ModelProto of a stage.

    Returns:
        None where no convolution has weights of a trunk: `ingest`, `mixture`, or a graph of another exporter.

    Raises:
        BundleError: the bytes are no ONNX model, or the trunk's end cannot be told.
    """
    parts = graph_fields(graph)
    nodes = graph_nodes(parts)
    weights = {member_name(value, 8) for number, value in parts if number == INITIALIZER}
    weights = {name for name in weights if TRUNK_WEIGHTS in name}
    of_trunk: list[Node] = []
    for node in nodes:
        if node.operator == "Conv" and node.inputs[1] in weights:
            of_trunk.append(node)
        elif len(node.inputs) and node.operator in ("DequantizeLinear", "Cast") and node.inputs[0] in weights:
            weights.update(node.outputs)
    if not of_trunk:
        return None
    reached = set(of_trunk[-1].outputs)
    for node in nodes:
        if reached.isdisjoint(node.inputs):
            continue
        if node.operator in _POOLING:
            c5 = node.inputs[0]
            break
        reached.update(node.outputs)
    else:
        raise BundleError("a stage's trunk is never pooled; expected a graph that mge-export wrote: export it again")
    kept, needed = _ancestors(nodes, [c5])
    if any(node not in kept for node in of_trunk):
        raise BundleError("a stage's last feature map does not depend on its whole trunk; export it again")
    images = [name for number, value in parts if number == INPUT and (name := member_name(value, 1)) in needed]
    if len(images) != 1:
        raise BundleError(f"a stage's trunk reads {images}; expected one image: export it again")
    return Trunk(images[0], c5, _channels(parts, nodes, of_trunk[-1]), len(of_trunk))


def cut_graph(graph: bytes, outputs: Sequence[str], names: Mapping[str, str] | None = None) -> bytes:
    """Keep what some tensors depend on, and put these out instead.

    Args:
        graph: serialised ModelProto.
        outputs: names of tensors.
        names: new names for tensors, by old ones; a tensor of the new name must not exist.

    Returns:
        A serialised ModelProto; inputs, weights and nodes that are not needed are gone. Outputs that were none before
        have no type: whoever opens the graph infers it.

    Raises:
        BundleError: the bytes are no ONNX model, nothing puts out such a tensor, or a node holds a graph of its own.
    """
    parts = graph_fields(graph)
    nodes = graph_nodes(parts)
    if missing := sorted(set(outputs) - {name for node in nodes for name in node.outputs}):
        raise BundleError(f"no node of a stage puts out {missing[0]!r}; export the bundle again")
    kept, needed = _ancestors(nodes, outputs)
    new = names or {}
    known = {member_name(value, 1): value for number, value in parts if number == OUTPUT}
    made: list[bytes] = []
    for number, value in parts:
        if number == INITIALIZER:
            wanted = member_name(value, 8) in needed
        elif number == INPUT:
            wanted = member_name(value, 1) in needed
        else:
            wanted = number not in (NODE, OUTPUT, _TYPES)
        if wanted:
            made.append(wire_field(number, _renamed(value, (1,), new) if number == INPUT else bytes(value)))
    made += [wire_field(NODE, _renamed(node.value, (1, 2), new)) for node in kept]
    made += [
        wire_field(OUTPUT, _renamed(known.get(name, memoryview(wire_field(1, name.encode()))), (1,), new))
        for name in outputs
    ]
    body = wire_field(7, b"".join(made))
    return b"".join(body if number == 7 else bytes(raw) for number, raw, _ in fields(memoryview(graph)))


def _ancestors(nodes: Sequence[Node], tensors: Collection[str]) -> tuple[list[Node], set[str]]:
    """The nodes that tensors depend on, in order, and all tensors they read or make."""
    needed = set(tensors)
    kept: list[Node] = []
    for node in reversed(nodes):  # a graph's nodes are in topological order
        if not needed.isdisjoint(node.outputs):
            kept.append(node)
            needed.update(name for name in node.inputs if name)
    return kept[::-1], needed


def _renamed(message: memoryview, numbers: Collection[int], names: Mapping[str, str]) -> bytes:
    """A node or a ValueInfo with other names of tensors."""
    return b"".join(
        wire_field(number, names[name].encode())
        if number in numbers and (name := bytes(value).decode()) in names
        else bytes(raw)
        for number, raw, value in fields(message)
    )


def _channels(parts: Sequence[tuple[int, memoryview]], nodes: Sequence[Node], convolution: Node) -> int:
    """How many channels a convolution puts out: the first axis of its weight."""
    sources = _ancestors(nodes, [convolution.inputs[1]])[1]
    for number, value in parts:
        if number == INITIALIZER and TRUNK_WEIGHTS in (name := member_name(value, 8)) and name in sources:
            dims = tensor_dims(value)
            if len(dims) == 4:
                return dims[0]
    return 0
