"""A graph as a library reads it: with its weights where they lie inside the bundle's file, without the package `onnx`.

A device has no `onnx`, so the few fields that are needed are read from the protocol-buffer wire format (protobuf.dev,
"Encoding"). Field numbers are those of onnx.proto3: ModelProto.graph 7, GraphProto.node 1, .initializer 5,
NodeProto.name 3, .op_type 4, TensorProto.dims 1, .data_type 2, .name 8, .external_data 13 (key 1, value 2).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from mge_runtime.bundle.archive import cpu_graph_entry, graph_entry, weights_entry
from mge_runtime.errors import BundleError

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle


_GRAPH, _NODE, _INITIALIZER, _EXTERNAL_DATA = 7, 1, 5, 13
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
# Where ONNX keeps tensors: for each message, the fields that lead to one, and the message in them.
_TENSORS_IN = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
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
        BundleError: the graph is damaged, or refers to anything but the bundle's weights.
    """
    variant = cpu_graph_entry(name)
    graph = bundle.read(variant if cpu and variant in bundle.sizes else graph_entry(name))
    names = (weights_entry(spec.name) for spec in bundle.manifest.graphs)
    places = {PurePath(n).name: (bundle.entry(n).offset, bundle.sizes[n]) for n in names if n in bundle.sizes}
    return relocate(graph, places, location=bundle.path.name)


def external_tensors(graph: bytes) -> list[ExternalTensor]:
    """List the external initializers of a serialized ModelProto.

    Raises:
        BundleError: the bytes are no ONNX model.
    """
    with _reading():
        return [tensor for value in _in_graph(graph, _INITIALIZER) if (tensor := _external(value)) is not None]


def node_operators(graph: bytes) -> dict[str, str]:
    """The operator of each named node of a serialized ModelProto's main graph, by the node's name.

    Raises:
        BundleError: the bytes are no ONNX model.
    """
    with _reading():
        nodes = ({n: bytes(value) for n, _, value in _fields(node)} for node in _in_graph(graph, _NODE))
        return {node[3].decode(): node[4].decode() for node in nodes if node.get(3) and 4 in node}


def relocate(graph: bytes, places: Mapping[str, tuple[int, int]], *, location: str) -> bytes:
    """Point a graph's external weights to a place inside another file.

    Args:
        graph: serialized ModelProto.
        places: by the name of each file that its weights may refer to: where it begins inside `location`, and its
            size, bytes.
        location: file name to refer to instead.

    Returns:
        A serialized ModelProto, equal but for the references.

    Raises:
        BundleError: the bytes are no ONNX model, its weights refer to another file or beyond the end of one, or
            something but an initializer keeps its data in a file.
    """
    external = 0
    expected = " or ".join(f"the {size} bytes of {name!r}" for name, (_, size) in places.items()) or "the graph itself"

    def moved(initializer: memoryview) -> bytes | memoryview:
        nonlocal external
        tensor = _external(initializer)
        if tensor is None:
            return initializer
        external += 1
        end = tensor.offset + tensor.length
        start, size = places.get(tensor.location, (0, -1))
        if tensor.offset < 0 or tensor.length < 0 or end > size:
            raise BundleError(
                f"weight {tensor.name!r} lies in bytes {tensor.offset} to {end} of {tensor.location!r}; "
                f"expected them in {expected}: export again"
            )
        kept = b"".join(raw for number, raw, _ in _fields(initializer) if number != _EXTERNAL_DATA)
        place = {"location": location, "offset": str(start + tensor.offset), "length": str(tensor.length)}
        pairs = (_field(1, key.encode()) + _field(2, value.encode()) for key, value in place.items())
        return kept + b"".join(_field(_EXTERNAL_DATA, pair) for pair in pairs)

    with _reading():
        found = _replaced(graph, _GRAPH, lambda main: _replaced(main, _INITIALIZER, moved))
        # A reference spells out this key, so as a rule the initializers' are all there are: looking takes a while.
        hidden = graph.count(b"location") > external and _count_external(memoryview(graph), "Model") > external
    if hidden:
        raise BundleError(
            "something but a graph's initializers keeps its data in another file; expected weights in "
            f"{expected} alone: export again"
        )
    return found


def _count_external(message: memoryview, kind: str) -> int:
    """How many tensors in a message of ONNX keep their data in a file."""
    if kind == "Tensor":
        return any(number == _EXTERNAL_DATA for number, _, _ in _fields(message))
    inner = _TENSORS_IN[kind]
    return sum(_count_external(value, inner[number]) for number, _, value in _fields(message) if number in inner)


def _in_graph(model: bytes, number: int) -> Iterator[memoryview]:
    """The values of one field of a ModelProto's main graph."""
    for outer, _, graph in _fields(model):
        if outer == _GRAPH:
            yield from (value for inner, _, value in _fields(graph) if inner == number)


def _replaced(message: bytes | memoryview, number: int, change: Callable[[memoryview], bytes | memoryview]) -> bytes:
    """A message whose fields of one number have other values."""
    return b"".join(_field(n, change(value)) if n == number else raw for n, raw, value in _fields(message))


def _external(tensor: memoryview) -> ExternalTensor | None:
    """Read a TensorProto; None where its data lies in the graph itself."""
    name, data_type = "", 0
    dims: list[int] = []
    pairs: dict[str, str] = {}
    for number, raw, value in _fields(tensor):
        if number == _EXTERNAL_DATA:
            pair = {n: bytes(v).decode() for n, _, v in _fields(value)}
            pairs[pair.get(1, "")] = pair.get(2, "")
        elif number == 8:
            name = bytes(value).decode()
        elif number == 2:
            data_type = _varint(value, 0)[0]
        elif number == 1:
            dims += _sizes(value) if raw[0] & 7 == _BYTES else [_varint(value, 0)[0]]
    if not pairs:
        return None
    if "location" not in pairs or "length" not in pairs:
        raise ValueError(f"weight {name!r} does not say in which file it lies and how long it is")
    offset, length = int(pairs.get("offset", "0")), int(pairs["length"])
    return ExternalTensor(name, pairs["location"], offset, length, data_type, tuple(dims))


def _sizes(packed: memoryview) -> Iterator[int]:
    position = 0
    while position < len(packed):
        size, position = _varint(packed, position)
        yield size


@contextmanager
def _reading() -> Generator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise BundleError(
            f"a graph of the bundle is no ONNX model ({error}); expected one that mge-export wrote"
        ) from error


def _fields(message: bytes | memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield (number, the whole field, its value) of each field of a message.

    Raises:
        ValueError: the bytes are no protocol-buffer message.
    """
    message, position = memoryview(message), 0
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
            raise ValueError(f"unknown wire type {kind}")
        if end > len(message):
            raise ValueError("it is cut short")
        yield tag >> 3, message[position:end], message[start:end]
        position = end


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Read one variable-length integer: its value and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it is cut short")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("an integer is too long")


def _field(number: int, value: bytes | memoryview) -> bytes:
    """A field of length-delimited bytes: a string, or a message."""
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + bytes(value)


def _encoded(value: int) -> bytes:
    """A variable-length integer."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
