"""Read what is needed of an ONNX graph, and move its references to external weights, without the package `onnx`.

A device has no `onnx`; the few fields needed are read from the protocol-buffer wire format (protobuf.dev, "Encoding").
Field numbers are those of onnx.proto3: ModelProto.graph 7, GraphProto.node 1, NodeProto.name 3, .op_type 4,
GraphProto.initializer 5, TensorProto.name 8, .external_data 13 (key 1, value 2), .data_location 14.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mge_runtime.bundle.onnx_nodes import tensor_dims
from mge_runtime.bundle.wire import WireError, fields, varint, wire_field
from mge_runtime.errors import BundleError

__all__ = ["ExternalTensor", "external_tensors", "node_operators", "relocate"]

_EXTERNAL = 1  # TensorProto.DataLocation
_KEY = b"location"  # of a tensor's external_data, however the message around it is encoded
# Where tensors may hide besides GraphProto.initializer, as field numbers by message.
_NESTED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


@dataclass(frozen=True)
class ExternalTensor:
    """One initialiser whose data lies in another file."""

    name: str
    location: str  # file name, relative to the model's
    offset: int  # bytes
    length: int  # bytes
    data_type: int  # TensorProto.DataType
    dims: tuple[int, ...]


def external_tensors(graph: bytes) -> list[ExternalTensor]:
    """List the external initialisers of a serialised ModelProto.

    Raises:
        BundleError: the bytes are no ONNX model, or data outside the main graph's initialisers is external.
    """
    try:
        found = [t for _, _, value in _initializers(graph) if (t := _external(value)) is not None]
        # Every reference to another file spells out this key; so most graphs need not be searched to their depths.
        if graph.count(_KEY) != len(found) and _count_external(memoryview(graph), "model", 0) != len(found):
            raise WireError("a tensor outside the graph's initialisers keeps its data in another file")
    except (WireError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"a stage's graph is no ONNX model ({error}); expected one that mge-export wrote") from error
    return found


def node_operators(graph: bytes) -> dict[str, str]:
    """The operator of each named node of a serialised ModelProto's main graph, by the node's name.

    Raises:
        BundleError: the bytes are no ONNX model.
    """
    operators: dict[str, str] = {}
    try:
        for number, _, model_value in fields(memoryview(graph)):
            for part, _, node in fields(model_value) if number == 7 else ():
                if part == 1:
                    texts = {n: bytes(value).decode() for n, _, value in fields(node) if n in (3, 4)}
                    operators[texts.get(3, "")] = texts.get(4, "")
    except (WireError, UnicodeDecodeError) as error:
        raise BundleError(f"a stage's graph is no ONNX model ({error}); expected one that mge-export wrote") from error
    operators.pop("", None)
    return operators


def relocate(graph: bytes, *, expected: str, size: int, location: str, start: int) -> bytes:
    """Point a graph's external weights to a place inside another file.

    Args:
        graph: serialised ModelProto.
        expected: the only file name its weights may refer to.
        size: bytes of that file.
        location: file name to refer to instead.
        start: where `expected` begins inside `location`, bytes.

    Returns:
        A serialised ModelProto, equal but for the references.

    Raises:
        BundleError: the bytes are no ONNX model, or its weights refer to another file or beyond the end of this one.
    """
    tensors = external_tensors(graph)
    for tensor in tensors:
        if tensor.location != expected:
            raise BundleError(
                f"weight {tensor.name!r} refers to the file {tensor.location!r}; expected {expected!r}: export again"
            )
        if tensor.offset < 0 or tensor.length < 0 or tensor.offset + tensor.length > size:
            raise BundleError(
                f"weight {tensor.name!r} ends at byte {tensor.offset + tensor.length} of {expected}; "
                f"expected at most {size}: export again"
            )
    if not tensors:
        return graph
    return b"".join(
        wire_field(7, _moved_graph(value, location, start)) if number == 7 else bytes(raw)
        for number, raw, value in fields(memoryview(graph))
    )


def _moved_graph(graph: memoryview, location: str, start: int) -> bytes:
    parts: list[bytes | memoryview] = []
    for number, raw, value in fields(graph):
        tensor = _external(value) if number == 5 else None
        parts.append(raw if tensor is None else wire_field(5, _moved_tensor(value, tensor, location, start)))
    return b"".join(parts)


def _moved_tensor(value: memoryview, tensor: ExternalTensor, location: str, start: int) -> bytes:
    kept = b"".join(raw for number, raw, _ in fields(value) if number != 13)
    pairs = {"location": location, "offset": str(start + tensor.offset), "length": str(tensor.length)}
    return kept + b"".join(
        wire_field(13, wire_field(1, k.encode()) + wire_field(2, v.encode())) for k, v in pairs.items()
    )


def _initializers(graph: bytes) -> Iterator[tuple[int, memoryview, memoryview]]:
    for number, _, model_value in fields(memoryview(graph)):
        if number == 7:
            yield from (item for item in fields(model_value) if item[0] == 5)


def _external(tensor: memoryview) -> ExternalTensor | None:
    """Read a TensorProto; None where its data lies in the graph itself."""
    name, external, data_type = "", False, 0
    pairs: dict[str, str] = {}
    for number, _, value in fields(tensor):
        if number == 8:
            name = bytes(value).decode()
        elif number == 2:
            data_type = varint(value, 0)[0]
        elif number == 14:
            external = varint(value, 0)[0] == _EXTERNAL
        elif number == 13:
            pair = {n: bytes(v).decode() for n, _, v in fields(value)}
            pairs[pair.get(1, "")] = pair.get(2, "")
    if not external and not pairs:
        return None
    if "location" not in pairs or "length" not in pairs:
        raise WireError(f"weight {name!r} does not say in which file it lies and how long it is")
    offset, length = int(pairs.get("offset", "0")), int(pairs["length"])
    return ExternalTensor(name, pairs["location"], offset, length, data_type, tuple(tensor_dims(tensor)))


def _count_external(message: memoryview, kind: str, depth: int) -> int:
    """Count the external tensors anywhere in a message."""
    if kind == "tensor":
        return int(_external(message) is not None)
    if depth > 32:
        raise WireError("its graphs are nested more than 32 deep")
    nested = _NESTED[kind]
    return sum(
        _count_external(value, nested[number], depth + 1) for number, _, value in fields(message) if number in nested
    )
