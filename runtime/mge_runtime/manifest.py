"""The manifest: what a bundle holds, how its graphs are wired, and the hash of every model entry.

It is written once, at export, and never changes afterwards: calibrations and engines added later name its hash.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from mge_runtime.errors import BundleError
from mge_runtime.fields import Field, JsonValue, parse_json
from mge_runtime.spec import BATCH, GraphSpec, Preprocess, TensorSpec, ViewSpec
from mge_runtime.wiring import check_wiring

__all__ = ["FRAME", "SCHEMA_VERSION", "Entry", "Manifest", "read_class_names", "read_entry", "read_preprocess"]

SCHEMA_VERSION = 2
FRAME = "frame"  # the chain's one input: uint8 RGB [B, S, S, 3]

_LONGEST_NAME = 255  # characters of a class's name, which is a folder's as a rule
_LARGEST_FRAME = 4096  # pixels; such a frame has 50 MB, and each image made of it 200 MB
_MOST_ELEMENTS = 2**28  # of a tensor of one image, 1 GB of float32
_MOST_GRAPHS = 256
_MOST_GMACS = 1e9
_DOCUMENT = "manifest.json"
_FIELDS = (
    "schema_version",
    "model",
    "class_names",
    "preprocess",
    "graphs",
    "views",
    "gate",
    "gmacs",
    "precision",
    "parity",
    "tools",
    "checkpoint_sha256",
    "entries",
)


@dataclass(frozen=True)
class Entry:
    """One model file inside the bundle."""

    sha256: str  # 64 hexadecimal digits
    size: int  # bytes
    crc32: str | None = None  # 8 hexadecimal digits, as the archive names it; None: written before it was kept here


@dataclass(frozen=True)
class Manifest:
    """Everything about the model that does not depend on a device."""

    model: Mapping[str, JsonValue]  # free: arch, experts, thresholds, ... for people and for mge-eval
    class_names: tuple[str, ...]  # by class index
    preprocess: Preprocess
    graphs: tuple[GraphSpec, ...]  # in the order they run; the last one's logits are the chain's
    views: tuple[ViewSpec, ...]  # one for each expert
    gate: str | None = None  # the tensor [B, K] of the experts' shares, if the chain has a gate
    # By graph: convolutions and matrix products of one image, in billions of multiply-accumulates.
    gmacs: Mapping[str, float] = field(default_factory=dict[str, float])
    # By graph: "type" ("fp32", "fp16", ...) and "attested" (by what check), more if the export likes.
    precision: Mapping[str, Mapping[str, JsonValue]] = field(default_factory=dict[str, "Mapping[str, JsonValue]"])
    parity: Mapping[str, JsonValue] | None = None  # the export's report; None: not measured
    tools: Mapping[str, str] = field(default_factory=dict[str, str])  # name: version, of what made the bundle
    checkpoint_sha256: str | None = None  # of the file the model came from
    entries: Mapping[str, Entry] = field(default_factory=dict[str, Entry])  # by name in the bundle; the writer fills it
    schema_version: int = SCHEMA_VERSION

    @property
    def answer(self) -> str:
        """The logits [B, C] of the whole chain."""
        return self.graphs[-1].logits

    @property
    def is_int8(self) -> bool:
        """Whether a graph of it was quantised; others may have stayed in FP16."""
        return any(plan.get("type") == "int8" for plan in self.precision.values())

    def graph(self, name: str) -> GraphSpec:
        """The graph of this name.

        Raises:
            KeyError: there is none.
        """
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise KeyError(name)

    def with_entries(self, entries: Mapping[str, Entry]) -> Manifest:
        """The same manifest over these files."""
        return replace(self, entries=dict(entries))

    def check(self) -> None:
        """Check that the parts fit each other.

        Raises:
            BundleError: graphs that are not wired, a view or logits that no graph puts out, shapes that differ, a graph
                without its GMACs.
        """
        size, classes = self.preprocess.size, len(self.class_names)
        check_wiring(self.graphs, self.views, self.gate, size=size, classes=classes, frame=FRAME)
        if set(self.gmacs) != {graph.name for graph in self.graphs}:
            raise BundleError(
                f"{_DOCUMENT}: gmacs are of {sorted(self.gmacs)}; expected each graph's, "
                f"{sorted(graph.name for graph in self.graphs)}: export the bundle again"
            )

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`: UTF-8, the same for equal manifests."""
        values = asdict(self)
        ordered = {name: values[name] for name in _FIELDS}
        return (json.dumps(ordered, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

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
                f"the bundle has schema version {version.integer(1)}; "
                f"expected {SCHEMA_VERSION}, which this runtime reads: "
                "upgrade it with `pip install --upgrade mge`, or export again with this version"
            )
        fields = root.members(_FIELDS)
        manifest = cls(
            schema_version=version.integer(1),
            model={key: value.value for key, value in fields["model"].table().items()},
            class_names=read_class_names(fields["class_names"]),
            preprocess=read_preprocess(fields["preprocess"]),
            graphs=_graphs(fields["graphs"]),
            views=tuple(_view(f) for f in fields["views"].items()),
            gate=fields["gate"].optional(Field.text),
            gmacs={name: value.number(0, _MOST_GMACS) for name, value in fields["gmacs"].table().items()},
            precision={
                graph: {key: value.value for key, value in plan.table().items()}
                for graph, plan in fields["precision"].table().items()
            },
            parity=fields["parity"].optional(lambda f: {key: value.value for key, value in f.table().items()}),
            tools={name: value.text() for name, value in fields["tools"].table().items()},
            checkpoint_sha256=fields["checkpoint_sha256"].optional(Field.sha256),
            entries={name: read_entry(f) for name, f in fields["entries"].table().items()},
        )
        manifest.check()
        return manifest


def read_class_names(f: Field) -> tuple[str, ...]:
    """Names by class index: at least one, all different, short, without control characters.

    Raises:
        BundleError: they are not.
    """
    names: dict[str, None] = {}
    for item in f.items():
        name = item.text(most=_LONGEST_NAME)
        if name in names:  # an answer would not say which of them it means
            item.fail("a name that no other class has")
        names[name] = None
    if not names:
        f.fail("at least one class name")
    return tuple(names)


def read_preprocess(f: Field) -> Preprocess:
    """Sizes in pixels, mean and std by channel, each in the range that a runtime takes.

    Raises:
        BundleError: one is not.
    """
    fields = f.members(("resize", "size", "mean", "std"))
    size = fields["size"].integer(2, _LARGEST_FRAME)
    resize = fields["resize"].integer(size, 4 * size)
    mean, std = _triple(fields["mean"], -1e3, 1e3), _triple(fields["std"], 1e-6, 1e3)
    return Preprocess(resize=resize, size=size, mean=mean, std=std)


def _triple(f: Field, low: float, high: float) -> tuple[float, float, float]:
    values = [item.number(low, high) for item in f.items()]
    if len(values) != 3:
        f.fail("three numbers, one for each of red, green and blue")
    return values[0], values[1], values[2]


def _graphs(f: Field) -> tuple[GraphSpec, ...]:
    graphs = f.items()
    if len(graphs) > _MOST_GRAPHS:
        f.fail(f"at most {_MOST_GRAPHS} graphs")
    return tuple(_graph(graph) for graph in graphs)


def _graph(f: Field) -> GraphSpec:
    fields = f.members(("name", "inputs", "outputs", "logits"))
    return GraphSpec(
        name=fields["name"].text(),
        inputs=tuple(_tensor(t) for t in fields["inputs"].items()),
        outputs=tuple(_tensor(t) for t in fields["outputs"].items()),
        logits=fields["logits"].text(),
    )


def _tensor(f: Field) -> TensorSpec:
    fields = f.members(("name", "dtype", "shape"))
    axes = fields["shape"].items()
    if not axes or axes[0].value != BATCH:
        fields["shape"].fail(f'a shape whose first axis is "{BATCH}"')
    shape = (BATCH, *(axis.integer(1, _MOST_ELEMENTS) for axis in axes[1:]))
    if math.prod(axis for axis in shape if isinstance(axis, int)) > _MOST_ELEMENTS:
        fields["shape"].fail(f"at most {_MOST_ELEMENTS} elements for one image")
    return TensorSpec(name=fields["name"].text(), dtype=fields["dtype"].text(), shape=shape)


def _view(f: Field) -> ViewSpec:
    fields = f.members(("logits", "heatmap", "box"))
    return ViewSpec(
        logits=fields["logits"].text(), heatmap=fields["heatmap"].text(), box=fields["box"].optional(Field.text)
    )


def read_entry(f: Field) -> Entry:
    """What a document says of one file; `crc32` may be missing.

    Raises:
        BundleError: a field is missing, unknown or of the wrong type.
    """
    crc = f.table().get("crc32")
    fields = f.members(("sha256", "size") if crc is None else ("sha256", "size", "crc32"))
    return Entry(
        fields["sha256"].sha256(), fields["size"].integer(), None if crc is None else crc.optional(Field.crc32)
    )
