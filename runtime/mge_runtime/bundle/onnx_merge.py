"""Join the graphs of several stages into one, without the package `onnx`.

Tensors at the border of a stage keep their names and so wire the stages; everything inside gets the stage's name in
front, since stages were exported one by one and use the same names. Field numbers are those of onnx.proto3, beside
those in `onnx_graph`: ModelProto.ir_version 1, .opset_import 8 (domain 1, version 2), .functions 25; GraphProto.node 1,
.name 2, .initializer 5, .input 11, .output 12, .value_info 13, .sparse_initializer 15; NodeProto.input 1, .output 2,
.name 3, .attribute 5; AttributeProto.g 6, .graphs 11; ValueInfoProto.name 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mge_runtime.bundle.wire import WireError, encoded, fields, varint, wire_field
from mge_runtime.errors import BundleError
from mge_runtime.spec import StageSpec

__all__ = ["merge_stages"]


def merge_stages(stages: Sequence[StageSpec], graphs: Mapping[str, bytes], name: str) -> bytes:
    """One graph that runs stages in turn.

    Args:
        stages: in the order they run.
        graphs: a serialised ModelProto for each, by stage. Weights in other files stay where they are.
        name: of the graph that is made.

    Returns:
        A serialised ModelProto. Its inputs are those of the stages that no stage before puts out; its outputs are all
        the outputs of all stages, so that later segments and whoever asks find them.

    Raises:
        BundleError: a graph is no ONNX model, or they use different versions of operators.
    """
    parts: list[bytes] = []
    known: set[str] = set()  # tensors that the merged graph takes in or makes
    version, opsets = 0, dict[str, int]()
    for stage in stages:
        border = {tensor.name for tensor in (*stage.inputs, *stage.outputs)}
        try:
            model = _Model.read(graphs[stage.name])
            _agree(opsets, model.opsets, stage.name)
            version = max(version, model.ir_version)
            parts.append(_renamed_graph(model.graph, _Names(f"{stage.name}/", border), skip_inputs=known))
        except (WireError, UnicodeDecodeError) as error:
            raise BundleError(f"the graph of stage {stage.name} cannot be joined ({error}); export it again") from error
        known |= border
    graph = wire_field(2, name.encode()) + b"".join(parts)
    imports = b"".join(wire_field(8, wire_field(1, d.encode()) + b"\x10" + encoded(v)) for d, v in opsets.items())
    return b"\x08" + encoded(version) + wire_field(7, graph) + imports


@dataclass(frozen=True)
class _Model:
    graph: memoryview
    ir_version: int
    opsets: Mapping[str, int]

    @classmethod
    def read(cls, data: bytes) -> _Model:
        graph, version, opsets = memoryview(b""), 0, dict[str, int]()
        for number, _, value in fields(memoryview(data)):
            if number == 7:
                graph = value
            elif number == 1:
                version = varint(value, 0)[0]
            elif number == 8:
                pair = {n: v for n, _, v in fields(value)}
                opsets[bytes(pair.get(1, b"")).decode()] = varint(pair[2], 0)[0] if 2 in pair else 0
            elif number == 25:
                raise WireError("it defines functions, which may differ between stages under one name")
        return cls(graph, version, opsets)


@dataclass(frozen=True)
class _Names:
    prefix: str
    border: Collection[str]

    def of(self, value: memoryview) -> bytes:
        """The name in the merged graph; an empty one, which stands for "left out", stays empty."""
        name = bytes(value).decode()
        return (name if not name or name in self.border else self.prefix + name).encode()


def _agree(known: dict[str, int], found: Mapping[str, int], stage: str) -> None:
    for domain, version in found.items():
        if known.setdefault(domain, version) != version:
            raise BundleError(
                f"stage {stage} uses version {version} of the operators {domain or 'ai.onnx'!r}, the stages before it "
                f"version {known[domain]}; expected one version in all: export the bundle again"
            )


def _renamed_graph(graph: memoryview, names: _Names, *, skip_inputs: Collection[str]) -> bytes:
    """The fields of a GraphProto but for its name, inferred shapes and the inputs that are made already."""
    parts: list[bytes] = []
    for number, raw, value in fields(graph):
        if number == 1:
            parts.append(wire_field(1, _renamed_node(value, names)))
        elif number == 5:
            parts.append(wire_field(5, _renamed(value, {8: names})))
        elif number == 15:
            raise WireError("it has sparse weights")
        elif number == 12 or (number == 11 and _name(value) not in skip_inputs):
            parts.append(bytes(raw))
    return b"".join(parts)


def _renamed_node(node: memoryview, names: _Names) -> bytes:
    parts: list[bytes] = []
    for number, raw, value in fields(node):
        if number in (1, 2, 3):
            parts.append(wire_field(number, names.of(value)))
        elif number == 5:
            parts.append(wire_field(5, _renamed_attribute(value, names)))
        else:
            parts.append(bytes(raw))
    return b"".join(parts)


def _renamed_attribute(attribute: memoryview, names: _Names) -> bytes:
    return b"".join(
        wire_field(number, _renamed_subgraph(value, names)) if number in (6, 11) else bytes(raw)
        for number, raw, value in fields(attribute)
    )


def _renamed_subgraph(graph: memoryview, names: _Names) -> bytes:
    """A graph inside a node; its own border is as inner as everything else in it."""
    parts: list[bytes] = []
    for number, raw, value in fields(graph):
        if number == 1:
            parts.append(wire_field(1, _renamed_node(value, names)))
        elif number == 5:
            parts.append(wire_field(5, _renamed(value, {8: names})))
        elif number in (11, 12):
            parts.append(wire_field(number, _renamed(value, {1: names})))
        elif number == 15:
            raise WireError("it has sparse weights")
        elif number != 13:
            parts.append(bytes(raw))
    return b"".join(parts)


def _renamed(message: memoryview, names_by_field: Mapping[int, _Names]) -> bytes:
    return b"".join(
        wire_field(number, names_by_field[number].of(value)) if number in names_by_field else bytes(raw)
        for number, raw, value in fields(message)
    )


def _name(value_info: memoryview) -> str:
    return next((bytes(value).decode() for number, _, value in fields(value_info) if number == 1), "")
