"""A graph as a library reads it: with its weights where they lie inside the bundle's file, without the package `onnx`.

A device has no `onnx`, so the few fields that are needed are read from the protocol-buffer wire format (protobuf.dev,
"Encoding"). Field numbers are those of onnx.proto3: ModelProto.graph 7, GraphProto.node 1, .initializer 5,
NodeProto.name 3, .op_type 4, TensorProto.dims 1, .data_type 2, .name 8, .external_data 13 (key 1, value 2),
.data_location 14.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mge_runtime.bundle.archive import cpu_graph_entry, graph_entry, weights_entry
from mge_runtime.errors import BundleError

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle

__all__ = ["ExternalTensor", "external_tensors", "located_graph", "node_operators", "relocate"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
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
    """One initializer whose data lies in another file."""

    name: str
    location: str  # file name, relative to the model's
    offset: int  # bytes
    length: int  # bytes
    data_type: int  # TensorProto.DataType
    dims: tuple[int, ...]


def located_graph(bundle: Bundle, name: str, *, cpu: bool = False) -> bytes:
    """A graph, checked against its hash; its weights refer to their place in the bundle and are not checked.

    Args:
        bundle: open.
        name: of the graph.
        cpu: its variant for CPUs, where the bundle has one.

    Raises:
        BundleError: the graph is damaged, or refers to anything but its own weights.
    """
    variant = cpu_graph_entry(name)
    graph = bundle.read(variant if cpu and variant in bundle.sizes else graph_entry(name))
    location, start, size = "", 0, 0
    if weights_entry(name) in bundle.sizes:
        region = bundle.region(weights_entry(name))
        location, start, size = region.path.name, region.offset, region.size
    return relocate(graph, expected=f"{name}.weights", size=size, location=location, start=start)


def external_tensors(graph: bytes) -> list[ExternalTensor]:
    """List the external initializers of a serialized ModelProto.

    Raises:
        BundleError: the bytes are no ONNX model, or data outside the main graph's initializers is external.
    """
    with _reading():
        found = [t for _, _, value in _initializers(graph) if (t := _external(value)) is not None]
        # Every reference to another file spells out this key; so most graphs need not be searched to their depths.
        if graph.count(_KEY) != len(found) and _count_external(memoryview(graph), "model", 0) != len(found):
            raise _WireError("a tensor outside the graph's initializers keeps its data in another file")
    return found


def node_operators(graph: bytes) -> dict[str, str]:
    """The operator of each named node of a serialized ModelProto's main graph, by the node's name.

    Raises:
        BundleError: the bytes are no ONNX model.
    """
    operators: dict[str, str] = {}
    with _reading():
        for number, _, model_value in _fields(memoryview(graph)):
            for part, _, node in _fields(model_value) if number == 7 else ():
                if part == 1:
                    texts = {n: bytes(value).decode() for n, _, value in _fields(node) if n in (3, 4)}
                    operators[texts.get(3, "")] = texts.get(4, "")
    operators.pop("", None)
    return operators


def relocate(graph: bytes, *, expected: str, size: int, location: str, start: int) -> bytes:
    """Point a graph's external weights to a place inside another file.

    Args:
        graph: serialized ModelProto.
        expected: the only file name its weights may refer to.
        size: bytes of that file.
        location: file name to refer to instead.
        start: where `expected` begins inside `location`, bytes.

    Returns:
        A serialized ModelProto, equal but for the references.

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
        _field(7, _moved_graph(value, location, start)) if number == 7 else bytes(raw)
        for number, raw, value in _fields(memoryview(graph))
    )


def _moved_graph(graph: memoryview, location: str, start: int) -> bytes:
    parts: list[bytes | memoryview] = []
    for number, raw, value in _fields(graph):
        tensor = _external(value) if number == 5 else None
        parts.append(raw if tensor is None else _field(5, _moved_tensor(value, tensor, location, start)))
    return b"".join(parts)


def _moved_tensor(value: memoryview, tensor: ExternalTensor, location: str, start: int) -> bytes:
    kept = b"".join(raw for number, raw, _ in _fields(value) if number != 13)
    pairs = {"location": location, "offset": str(start + tensor.offset), "length": str(tensor.length)}
    return kept + b"".join(_field(13, _field(1, k.encode()) + _field(2, v.encode())) for k, v in pairs.items())


def _initializers(graph: bytes) -> Iterator[tuple[int, memoryview, memoryview]]:
    for number, _, model_value in _fields(memoryview(graph)):
        if number == 7:
            yield from (item for item in _fields(model_value) if item[0] == 5)


def _external(tensor: memoryview) -> ExternalTensor | None:
    """Read a TensorProto; None where its data lies in the graph itself."""
    name, external, data_type = "", False, 0
    pairs: dict[str, str] = {}
    for number, _, value in _fields(tensor):
        if number == 8:
            name = bytes(value).decode()
        elif number == 2:
            data_type = _varint(value, 0)[0]
        elif number == 14:
            external = _varint(value, 0)[0] == _EXTERNAL
        elif number == 13:
            pair = {n: bytes(v).decode() for n, _, v in _fields(value)}
            pairs[pair.get(1, "")] = pair.get(2, "")
    if not external and not pairs:
        return None
    if "location" not in pairs or "length" not in pairs:
        raise _WireError(f"weight {name!r} does not say in which file it lies and how long it is")
    offset, length = int(pairs.get("offset", "0")), int(pairs["length"])
    return ExternalTensor(name, pairs["location"], offset, length, data_type, tuple(_dims(tensor)))


def _count_external(message: memoryview, kind: str, depth: int) -> int:
    """Count the external tensors anywhere in a message."""
    if kind == "tensor":
        return int(_external(message) is not None)
    if depth > 32:
        raise _WireError("its graphs are nested more than 32 deep")
    nested = _NESTED[kind]
    return sum(
        _count_external(value, nested[number], depth + 1) for number, _, value in _fields(message) if number in nested
    )


def _dims(tensor: memoryview) -> Iterator[int]:
    """Sizes of a TensorProto's axes, written one by one or packed."""
    for number, raw, value in _fields(tensor):
        if number == 1:
            position, packed = 0, raw[0] & 7 == _BYTES
            while position < len(value):
                size, position = _varint(value, position)
                yield size
                if not packed:
                    break


@contextmanager
def _reading() -> Generator[None]:
    try:
        yield
    except (_WireError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(
            f"a graph of the bundle is no ONNX model ({error}); expected one that mge-export wrote"
        ) from error


class _WireError(Exception):
    """The bytes are no protocol-buffer message."""


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield (number, the whole field, its value) of each field of a message.

    Raises:
        _WireError: it is no message.
    """
    position = 0
    while position < len(message):
        tag, start = _varint(message, position)
        kind = tag & 7
        if kind == _VARINT:
            end = _varint(message, start)[1]
        elif kind == _BYTES:
            length, start = _varint(message, start)
            end = start + length
        elif kind in (_FIXED64, _FIXED32):
            end = start + (8 if kind == _FIXED64 else 4)
        else:
            raise _WireError(f"unknown wire type {kind}")
        if end > len(message):
            raise _WireError("it is cut short")
        yield tag >> 3, message[position:end], message[start:end]
        position = end


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Read one variable-length integer: its value and the position behind it.

    Raises:
        _WireError: there is none.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise _WireError("it is cut short")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _WireError("an integer is too long")


def _field(number: int, value: bytes) -> bytes:
    """A field of length-delimited bytes: a string, or a message."""
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + value


def _encoded(value: int) -> bytes:
    """A variable-length integer."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
