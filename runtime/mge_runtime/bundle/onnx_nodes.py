"""Read a graph's nodes and weights, without the package `onnx`. Field numbers are those of onnx.proto3."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mge_runtime.bundle.wire import WireError, fields, varint
from mge_runtime.errors import BundleError

__all__ = [
    "INITIALIZER",
    "INPUT",
    "NODE",
    "OUTPUT",
    "Node",
    "graph_fields",
    "graph_nodes",
    "member_name",
    "tensor_dims",
]

NODE, INITIALIZER, INPUT, OUTPUT = 1, 5, 11, 12  # fields of GraphProto
_GRAPH, _DIMS = 7, 1  # fields of ModelProto, TensorProto
_SUBGRAPHS = (6, 11)  # fields of AttributeProto


@dataclass(frozen=True)
class Node:
    """A node, and its bytes."""

    value: memoryview
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def graph_fields(model: bytes) -> list[tuple[int, memoryview]]:
    """The fields of a model's graph, which are all length-delimited as far as they are written.

    Raises:
        BundleError: the bytes are no ONNX model.
    """
    with _reading():
        for number, _, value in fields(memoryview(model)):
            if number == _GRAPH:
                return [(part, content) for part, _, content in fields(value)]
    raise BundleError("a stage's graph is no ONNX model (it has no graph); expected one that mge-export wrote")


def graph_nodes(parts: Sequence[tuple[int, memoryview]]) -> list[Node]:
    """The nodes among a graph's fields, in order.

    Raises:
        BundleError: one cannot be read, or holds a graph of its own.
    """
    with _reading():
        return [_node(value) for number, value in parts if number == NODE]


def member_name(message: memoryview, number: int) -> str:
    """A message's text of a field; empty where it has none.

    Raises:
        BundleError: it cannot be read.
    """
    with _reading():
        return bytes(next((value for field, _, value in fields(message) if field == number), b"")).decode()


def tensor_dims(tensor: memoryview) -> list[int]:
    """Sizes of the axes of a TensorProto, written one by one or packed.

    Raises:
        BundleError: they cannot be read.
    """
    dims: list[int] = []
    with _reading():
        for number, raw, value in fields(tensor):
            if number == _DIMS:
                position, packed = 0, raw[0] & 7 == 2
                while position < len(value):
                    size, position = varint(value, position)
                    dims.append(size)
                    if not packed:
                        break
    return dims


@contextmanager
def _reading() -> Generator[None]:
    try:
        yield
    except (WireError, UnicodeDecodeError) as error:
        raise BundleError(f"a stage's graph is no ONNX model ({error}); expected one that mge-export wrote") from error


def _node(value: memoryview) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 4: [""]}
    for number, _, content in fields(value):
        if number in texts:
            texts[number].append(bytes(content).decode())
        elif number == 5 and any(part in _SUBGRAPHS for part, _, _ in fields(content)):
            raise WireError(f"its node {texts[4][-1]} holds a graph of its own")
    return Node(value, texts[4][-1], tuple(texts[1]), tuple(texts[2]))
