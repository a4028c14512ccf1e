"""Built engines: what they were built for and how, and where they lie - in a bundle or in the cache."""

from __future__ import annotations

import hashlib
import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mge_runtime.bundle import Bundle, EngineDescription
from mge_runtime.bundle.archive import engine_plan
from mge_runtime.errors import BundleError
from mge_runtime.fields import Field, JsonValue
from mge_runtime.machine import Gpu
from mge_runtime.trt.batch import LARGEST, BatchRange
from mge_runtime.trt.target import Target

__all__ = ["BundleEngines", "CachedEngines", "EngineDetails", "EngineSet"]

DESCRIPTION = "engine.json"
_ADVICE = "these engines are damaged or of another version of mge: build them again with mge-build"


@dataclass(frozen=True)
class EngineDetails:
    """The free part of an engine's description, as mge writes it."""

    version: str  # of the library that built it, in full: an engine runs on this very version
    gpu: Gpu | None  # the GPU it was built on, and for; None: built ahead of time for compute capabilities
    batch: BatchRange
    # By graph: "type" ("fp32", "fp16", ...), "attested" ("network" or "engine": by what check), counts of layers.
    precision: Mapping[str, Mapping[str, JsonValue]]
    # Of the build: "optimization_level", "workspace" in bytes, "seconds" by graph, "scratch": bytes by graph that
    # activations take, where the engines were built on their device.
    options: Mapping[str, JsonValue]
    built_by: str  # "mge 0.1.0"

    def to_dict(self) -> dict[str, JsonValue]:
        """Plain values, for `add_engine`."""
        return {
            "version": self.version,
            "gpu": None if self.gpu is None else asdict(self.gpu),
            "batch": list(self.batch.sizes),
            "precision": {graph: dict(facts) for graph, facts in self.precision.items()},
            "options": dict(self.options),
            "built_by": self.built_by,
        }

    @classmethod
    def from_description(cls, description: EngineDescription) -> EngineDetails:
        """Read them.

        Raises:
            BundleError: another version of mge, or something else, wrote them.
        """
        document = f"engines/{description.target}/{DESCRIPTION}"
        root = Field(dict(description.details), "details", document, _ADVICE)
        fields = root.members(("version", "gpu", "batch", "precision", "options", "built_by"))
        sizes = [size.integer(1, LARGEST) for size in fields["batch"].items()]
        if len(sizes) != 3 or sizes != sorted(sizes):
            fields["batch"].fail("three batch sizes, [least, usual, most]")
        return cls(
            version=fields["version"].text(),
            gpu=fields["gpu"].optional(Gpu.from_field),
            batch=BatchRange(*sizes),
            precision={
                graph: {key: value.value for key, value in facts.table().items()}
                for graph, facts in fields["precision"].table().items()
            },
            options={key: value.value for key, value in fields["options"].table().items()},
            built_by=fields["built_by"].text(),
        )


class EngineSet(ABC):
    """The engines of every graph for one target."""

    def __init__(self, description: EngineDescription, place: str) -> None:
        self.description = description
        self.target = Target.parse(description.target)
        self.details = EngineDetails.from_description(description)
        self.place = place  # where they lie, for people

    @abstractmethod
    def plan(self, graph: str) -> memoryview:
        """A graph's engine, mapped and read-only, its bytes checked against their hash.

        Raises:
            BundleError: there is none, or its bytes were damaged.
        """


class BundleEngines(EngineSet):
    """Engines inside a bundle that stays open as long as they are read.

    Raises:
        BundleError: the bundle has none for this target, or their description is damaged.
    """

    def __init__(self, bundle: Bundle, target: str) -> None:
        super().__init__(bundle.engine(target), "in the bundle")
        self._bundle = bundle

    def plan(self, graph: str) -> memoryview:
        """As `EngineSet.plan`."""
        name = engine_plan(self.description.target, graph)
        self._bundle.verify([name])
        return self._bundle.view(name)


class CachedEngines(EngineSet):
    """Engines in a folder of their own, as `store_engines` wrote them.

    Raises:
        BundleError: the folder's description is missing, damaged, or of another manifest or target.
    """

    def __init__(self, folder: Path, target: str, manifest_sha256: str) -> None:
        try:
            data = (folder / DESCRIPTION).read_bytes()
        except OSError as error:
            raise BundleError(f"cannot read {folder / DESCRIPTION}: {error.strerror}; delete that folder") from error
        description = EngineDescription.from_json(data, target=target, manifest_sha256=manifest_sha256)
        super().__init__(description, f"in the cache, {folder}")
        self._folder = folder

    def plan(self, graph: str) -> memoryview:
        """As `EngineSet.plan`."""
        path = self._folder / f"{graph}.plan"
        entry = self.description.plans.get(graph)
        try:
            with path.open("rb") as stream:
                mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BundleError(f"cannot read {path}: {error}; delete the folder and run mge-build again") from error
        if entry is None or hashlib.sha256(mapped).hexdigest() != entry.sha256:
            raise BundleError(f"{path} was damaged after it was built; delete the folder and run mge-build again")
        return mapped
