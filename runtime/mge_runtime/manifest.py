"""The manifest: what a bundle holds, how tensor names wire its graphs, and the hash of every model entry.

It is written once, at export, and never changes afterwards: calibrations and engines added later name its hash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import NoReturn

from mge_runtime.errors import BundleError
from mge_runtime.fields import Field, JsonValue, dump_json, parse_json

SCHEMA_VERSION = 3
FRAME = "frame"  # the chain's one input: uint8 RGB [B, S, S, 3]
BATCH = "batch"  # the name of the one dynamic axis, always the first
DTYPES = ("uint8", "int8", "int32", "int64", "float16", "float32")

_GRAPH_NAME = re.compile(r"(?!chain$)[A-Za-z0-9_]{1,64}")  # `chain.onnx` is all of them in one
_LONGEST_NAME = 255  # characters of a class's name, which is a folder's as a rule
_LARGEST_FRAME = 4096  # pixels; such a frame has 50 MB, and each image made of it 200 MB
_MOST_ELEMENTS = 2**28  # of a tensor of one image, 1 GB of float32
_MOST_GRAPHS = 256
_MOST_GMACS = 1e9
_DOCUMENT = "manifest.json"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str  # unique in the chain: one graph's output is the input of this name of those after it
    dtype: str  # NumPy's name: "uint8", "float32", "float16", "int64"
    shape: tuple[int | str, ...]  # BATCH for the dynamic first axis, sizes for the others


@dataclass(frozen=True)
class GraphSpec:
    """One graph of the chain, an expert as a rule: `onnx/<name>.onnx` with its weights beside it.

    The chain may stop after any of its graphs.
    """

    name: str  # letters, digits and "_"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    logits: str  # the output [B, C] that is the chain's if it stops after this graph


@dataclass(frozen=True)
class ViewSpec:
    """What one expert saw and said, as tensor names; `Prediction` reports it."""

    logits: str  # [B, C], this expert alone
    heatmap: str  # [B, h, w], its attention on its own image, low resolution
    box: str | None  # [B, 4], what this view shows, see `Crops`; None: the whole frame


@dataclass(frozen=True)
class Crops:
    """What the boxes of a chain are pixels of."""

    sizes: tuple[int, ...]  # pixels, the side of each expert's image
    frame: int = 0  # pixels, the side of the frame that every crop is cut from; 0: each from the expert before's image


@dataclass(frozen=True)
class Preprocess:
    """From a decoded RGB image to the chain's input `frame`; normalization is inside the graph."""

    resize: int  # pixels, the shorter side after resizing (Pillow's bilinear, antialiased); >= size
    size: int  # pixels, the side of the center crop and of every expert's input
    mean: tuple[float, float, float]  # per RGB channel in [0, 1], subtracted in the graph
    std: tuple[float, float, float]  # per RGB channel, > 0, divided by in the graph


@dataclass(frozen=True)
class Entry:
    """One model file inside the bundle."""

    sha256: str  # 64 hexadecimal digits
    size: int  # bytes
    crc32: str | None = None  # 8 hexadecimal digits, as the archive names it; None: of a file outside an archive


@dataclass(frozen=True)
class Manifest:
    """Everything about the model that does not depend on a device."""

    model: Mapping[str, JsonValue]  # free: arch, experts, thresholds, ... for people and for mge-eval
    class_names: tuple[str, ...]  # by class index
    preprocess: Preprocess
    graphs: tuple[GraphSpec, ...]  # in the order they run; the last one's logits are the chain's
    views: tuple[ViewSpec, ...]  # one for each expert
    crops: Crops  # what their boxes are pixels of
    gate: str | None = None  # the tensor [B, K] of the experts' shares, if the chain has a gate
    # By graph: convolutions and matrix products of one image, in billions of multiply-accumulates.
    gmacs: Mapping[str, float] = field(default_factory=dict[str, float])
    # By graph: "type" ("fp32", "fp16", ...) and "attested" (by what check), more if the export likes.
    precision: Mapping[str, Mapping[str, JsonValue]] = field(default_factory=dict[str, "Mapping[str, JsonValue]"])
    parity: Mapping[str, JsonValue] | None = None  # the export's report; None: not measured
    tools: Mapping[str, str] = field(default_factory=dict[str, str])  # name: version, of what made the bundle
    checkpoint_sha256: str | None = None  # of the file the model came from
    entries: Mapping[str, Entry] = field(default_factory=dict[str, Entry])  # by name in the bundle; the writer fills it
    schema_version: int = SCHEMA_VERSION  # of the format, the one that this runtime reads

    @property
    def logits(self) -> str:
        """The logits [B, C] of the whole chain."""
        return self.graphs[-1].logits

    @property
    def is_int8(self) -> bool:
        """Whether a graph of it was quantized; others may have stayed in FP16."""
        return any(plan.get("type") == "int8" for plan in self.precision.values())

    def check(self) -> None:
        """Check that the parts fit each other.

        Raises:
            BundleError: graphs that are not wired, a view or logits that are no output of a graph, shapes that differ,
                or a graph without its GMACs; the message names graph and tensor.
        """
        size, names = self.preprocess.size, [graph.name for graph in self.graphs]
        if not names or len(set(names)) != len(names):
            _fail(f"the graphs are {names}", "at least one, and names that differ")
        logits = (BATCH, len(self.class_names))
        known = {FRAME: TensorSpec(FRAME, "uint8", (BATCH, size, size, 3))}
        for graph in self.graphs:
            _check_graph(graph, known)
            known |= {tensor.name: tensor for tensor in graph.outputs}
            own = {tensor.name: tensor for tensor in graph.outputs}
            _check_tensor(own, graph.logits, f"the logits after {graph.name}", logits)
        if set(self.gmacs) != set(names):
            _fail(f"gmacs are of {sorted(self.gmacs)}", f"each graph's, {sorted(names)}")
        if not self.views:
            _fail("there is no view", "one for each expert")
        for number, view in enumerate(self.views, 1):
            _check_tensor(known, view.logits, f"the logits of view {number}", logits)
            _check_tensor(known, view.heatmap, f"the heat map of view {number}", (BATCH, None, None))
            if view.box is not None:
                _check_tensor(known, view.box, f"the box of view {number}", (BATCH, 4))
            if (view.box is None) != (number == 1):
                _fail(f"view {number} has the box {view.box!r}", "null for the first view alone, the whole frame")
        if len(self.crops.sizes) != len(self.views):
            _fail(f"crops have the sizes {list(self.crops.sizes)}", f"{len(self.views)}, one for each view")
        if (self.crops.frame or self.crops.sizes[0]) != size:
            _fail(f"crops are of {self.crops.frame or self.crops.sizes[0]} pixels", f"the frame's {size}")
        if self.gate is not None:
            _check_tensor(known, self.gate, "the gate", (BATCH, len(self.views)))

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`: UTF-8, the same for equal manifests."""
        return dump_json({"schema_version": self.schema_version, **asdict(self)})

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read and check what `to_json` wrote.

        Raises:
            BundleError: no JSON, another schema, a field that is missing, unknown or of the wrong type (named by its
                path), or parts that do not fit each other.
        """
        root = parse_json(data, _DOCUMENT)
        version = root.table().get("schema_version")
        if version is None:
            raise BundleError(f"{_DOCUMENT}: schema_version is missing; expected a bundle that mge-export wrote")
        if version.integer(1) != SCHEMA_VERSION:
            raise BundleError(
                f"the bundle has schema version {version.value}; expected {SCHEMA_VERSION}, which this runtime reads: "
                "upgrade mge, or export again with this version"
            )
        fields = root.members(cls.__dataclass_fields__)
        if len(graphs := fields["graphs"].items()) > _MOST_GRAPHS:
            fields["graphs"].fail(f"at most {_MOST_GRAPHS} graphs")
        manifest = cls(
            model=fields["model"].free(),
            class_names=read_class_names(fields["class_names"]),
            preprocess=read_preprocess(fields["preprocess"]),
            graphs=tuple(map(_graph, graphs)),
            views=tuple(map(_view, fields["views"].items())),
            crops=_crops(fields["crops"]),
            gate=fields["gate"].optional(Field.text),
            gmacs={graph: value.number(0, _MOST_GMACS) for graph, value in fields["gmacs"].table().items()},
            precision={graph: read_plan(plan) for graph, plan in fields["precision"].table().items()},
            parity=fields["parity"].optional(Field.free),
            tools={name: value.text() for name, value in fields["tools"].table().items()},
            checkpoint_sha256=fields["checkpoint_sha256"].optional(Field.hexadecimal),
            entries={name: read_entry(f) for name, f in fields["entries"].table().items()},
        )
        manifest.check()
        return manifest


def _check_graph(graph: GraphSpec, known: Mapping[str, TensorSpec]) -> None:
    """Check a graph against the tensors that are there before it runs."""
    if not _GRAPH_NAME.fullmatch(graph.name):
        _fail(f"a graph is called {graph.name!r}", 'letters, digits and "_", at most 64')
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.dtype not in DTYPES:
            _fail(f"{graph.name}.{tensor.name} is of type {tensor.dtype!r}", "one of " + ", ".join(DTYPES))
    for tensor in graph.inputs:
        source = known.get(tensor.name)
        if source is None:
            _fail(f"{graph.name} has the input {tensor.name!r}, no output of one before it", "graphs in running order")
        if source != tensor:
            found, expected = (f"{t.dtype} {list(t.shape)}" for t in (tensor, source))
            _fail(f"{graph.name} has the input {tensor.name!r} as {found}", f"what it is as an output, {expected}")
    names = [tensor.name for tensor in graph.outputs]
    for name in names:
        if name in known or names.count(name) > 1:
            _fail(f"{name!r} is an output of {graph.name} and of a graph before it", "one source for each")


def _check_tensor(known: Mapping[str, TensorSpec], name: str, role: str, shape: tuple[int | str | None, ...]) -> None:
    tensor = known.get(name)
    if tensor is None:
        _fail(f"{role} is tensor {name!r}, which is no output", "an output of a graph that has run")
    fits = len(tensor.shape) == len(shape) and all(e in (None, s) for e, s in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != "float32":
        wanted = ["any" if axis is None else axis for axis in shape]
        _fail(f"{role} is tensor {name!r}, {tensor.dtype} {list(tensor.shape)}", f"float32 {wanted}")


def _fail(found: str, expected: str) -> NoReturn:
    raise BundleError(f"{_DOCUMENT}: {found}; expected {expected}: export the bundle again")


def read_plan(field: Field) -> Mapping[str, JsonValue]:
    """The precision plan of a graph or an engine: free, but what it names as its type is a word."""
    if (kind := field.table().get("type")) is not None:
        kind.text()
    return field.free()


def read_class_names(f: Field) -> tuple[str, ...]:
    """Names by class index: at least one, all different, short, without control characters."""
    names: dict[str, None] = {}
    for item in f.items():
        name = item.text(most=_LONGEST_NAME)
        if name in names:  # a prediction would not say which of them it means
            item.fail("a name that no other class has")
        names[name] = None
    if not names:
        f.fail("at least one class name")
    return tuple(names)


def read_preprocess(f: Field) -> Preprocess:
    """Sizes in pixels, mean and std by channel, each in the range that a runtime takes."""
    fields = f.members(Preprocess.__dataclass_fields__)
    size = fields["size"].integer(2, _LARGEST_FRAME)
    resize = fields["resize"].integer(size, 4 * size)
    mean, std = _triple(fields["mean"], -1e3, 1e3), _triple(fields["std"], 1e-6, 1e3)
    return Preprocess(resize=resize, size=size, mean=mean, std=std)


def _triple(f: Field, low: float, high: float) -> tuple[float, float, float]:
    values = [item.number(low, high) for item in f.items()]
    if len(values) != 3:
        f.fail("three numbers, one for each of red, green and blue")
    return values[0], values[1], values[2]


def _graph(f: Field) -> GraphSpec:
    fields = f.members(GraphSpec.__dataclass_fields__)
    inputs, outputs = (tuple(map(_tensor, fields[role].items())) for role in ("inputs", "outputs"))
    return GraphSpec(fields["name"].text(), inputs, outputs, fields["logits"].text())


def _crops(f: Field) -> Crops:
    fields = f.members(Crops.__dataclass_fields__)
    sizes = tuple(item.integer(2, _LARGEST_FRAME) for item in fields["sizes"].items())
    return Crops(sizes, fields["frame"].integer(0, _LARGEST_FRAME))


def _tensor(f: Field) -> TensorSpec:
    fields = f.members(TensorSpec.__dataclass_fields__)
    axes = fields["shape"].items()
    if not axes or axes[0].value != BATCH:
        fields["shape"].fail(f'a shape whose first axis is "{BATCH}"')
    sizes = [axis.integer(1, _MOST_ELEMENTS) for axis in axes[1:]]
    if math.prod(sizes) > _MOST_ELEMENTS:
        fields["shape"].fail(f"at most {_MOST_ELEMENTS} elements for one image")
    return TensorSpec(fields["name"].text(), fields["dtype"].text(), (BATCH, *sizes))


def _view(f: Field) -> ViewSpec:
    fields = f.members(ViewSpec.__dataclass_fields__)
    return ViewSpec(fields["logits"].text(), fields["heatmap"].text(), fields["box"].optional(Field.text))


def read_entry(f: Field) -> Entry:
    """What a document says of one file."""
    fields = f.members(Entry.__dataclass_fields__)
    crc = fields["crc32"].optional(lambda f: f.hexadecimal(8))
    return Entry(fields["sha256"].hexadecimal(), fields["size"].integer(), crc)
