"""Built engines: what they were built for, where they lie (in a bundle or in the cache), whether they run on a GPU.

The cache: <cache>/engines/<manifest's hash>/<target>-<hash of the GPU>/engine.json, <graph>-<hash of the plan>.plan
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mge_runtime.bundle import Bundle, EngineDescription
from mge_runtime.bundle.archive import engine_description, engine_plan
from mge_runtime.errors import BundleError, OutputError
from mge_runtime.fields import Field, JsonValue
from mge_runtime.files import atomic_path, file_sha256, lock
from mge_runtime.machine import Gpu, Machine
from mge_runtime.manifest import Entry, Manifest, read_plan
from mge_runtime.trt.target import LARGEST_BATCH, BatchRange, Target

_DESCRIPTION = "engine.json"
_ADVICE = "these engines are damaged or of another version of mge: build them again with mge-build"


@dataclass(frozen=True)
class EngineDetails:
    """The free part of an engine's description, as mge writes it."""

    version: str  # of the library that built it, in full: an engine runs on this very version
    gpu: Gpu | None  # the GPU it was built on, and for; None: built ahead of time for compute capabilities
    batch: BatchRange
    # By graph: "type" ("fp32", "fp16", ...), "attested" ("network" or "engine": by what check), counts of layers.
    precision: Mapping[str, Mapping[str, JsonValue]]
    # Of the build: "optimization_level", "workspace" in bytes, "scratch": bytes by graph that activations take, where
    # the engines were built on their device.
    options: Mapping[str, JsonValue]
    built_by: str  # "mge 0.1.0"

    def to_dict(self) -> dict[str, JsonValue]:
        """Plain values, for `add_engine`."""
        return {**asdict(self), "batch": list(self.batch.sizes)}

    @classmethod
    def from_description(cls, description: EngineDescription) -> EngineDetails:
        """Read them.

        Raises:
            BundleError: another version of mge, or something else, wrote them.
        """
        root = Field(dict(description.details), "details", engine_description(description.target), _ADVICE)
        fields = root.members(tuple(cls.__dataclass_fields__))
        sizes = [size.integer(1, LARGEST_BATCH) for size in fields["batch"].items()]
        if len(sizes) != 3 or sizes != sorted(sizes):
            fields["batch"].fail("three batch sizes, [least, usual, most]")
        return cls(
            version=fields["version"].text(),
            gpu=fields["gpu"].optional(Gpu.from_field),
            batch=BatchRange(*sizes),
            precision={graph: read_plan(facts) for graph, facts in fields["precision"].table().items()},
            options=fields["options"].free(),
            built_by=fields["built_by"].text(),
        )


class EngineSet:
    """The engines of every graph for one target.

    Args:
        description: what is said of them.
        place: where they lie, for people.
        plan: the engine of a graph that was built, mapped and read-only, its bytes checked against their hash; raises
            BundleError where it was removed or damaged.

    Raises:
        BundleError: the description names no target, or another version of mge wrote it.
    """

    def __init__(self, description: EngineDescription, place: str, plan: Callable[[str], memoryview]) -> None:
        self.description = description
        self.target = Target.parse(description.target)
        self.details = EngineDetails.from_description(description)
        self.place = place
        self.plan = plan


def bundle_engines(bundle: Bundle, target: str) -> EngineSet:
    """Engines inside a bundle that stays open as long as they are read.

    Raises:
        BundleError: the bundle has none for this target, or their description is damaged.
    """

    def plan(graph: str) -> memoryview:
        name = engine_plan(target, graph)
        bundle.verify([name])
        return bundle.view(name)

    return EngineSet(bundle.engine(target), "in the bundle", plan)


@dataclass(frozen=True)
class FoundEngines:
    """The engines of one target, and whether they run here."""

    target: str
    place: str  # where they lie, for people
    in_bundle: bool  # or in the cache
    engines: EngineSet | None  # None: their description cannot be read
    problem: str | None  # why they do not run here, to follow `__str__`; None: they do

    def __str__(self) -> str:
        """For example "tensorrt-10.3-sm87-linux-aarch64 in the bundle"."""
        return f"{self.target} {self.place}"

    @property
    def backend(self) -> str:
        """Which backend they are for: "tensorrt" or "tensorrt-rtx"."""
        return "tensorrt-rtx" if self.target.startswith("tensorrt-rtx-") else "tensorrt"


def find_engines(bundle: Bundle, machine: Machine, gpu: Gpu | None, *, cache: bool) -> list[FoundEngines]:
    """Every engine that the bundle holds, then, if wanted, those of this machine's cache. No engine's bytes are read.

    Args:
        bundle: the bundle.
        machine: where they are to run.
        gpu: on which of its GPUs; None: it has none that can be used.
        cache: whether to look into the cache.
    """
    found: list[FoundEngines] = []
    for target in bundle.targets:
        engines, problem = None, None
        try:
            engines = bundle_engines(bundle, target)
            problem = why_not(engines, machine, gpu, bundle.manifest)
        except BundleError as error:
            problem = f"cannot be read: {error}"
        found.append(FoundEngines(target, "in the bundle", True, engines, problem))
    for engines in cached_engines(bundle.manifest_sha256) if cache else ():
        problem = why_not(engines, machine, gpu, bundle.manifest)
        found.append(FoundEngines(engines.target.name, engines.place, False, engines, problem))
    return found


def why_not(engines: EngineSet, machine: Machine, gpu: Gpu | None, manifest: Manifest) -> str | None:
    """Why engines do not run on a GPU of a machine, from their description alone; None: they do.

    An engine runs on the version of the library that built it, in full, on the same operating system and architecture.
    One of full TensorRT is for the GPU model it was built on (the same name and number of multiprocessors); one of
    TensorRT-RTX is for every GPU of the compute capabilities that it names. The reason follows the target's name.
    """
    target, details = engines.target, engines.details
    capabilities = " or ".join(target.capabilities)
    if (target.system, target.arch) != (machine.system, machine.arch):
        return f"is for {target.system} {target.arch}, this machine is {machine.platform}"
    if gpu is None:
        return f"is for {capabilities}, this machine has no GPU that can be used"
    if gpu.capability not in target.capabilities:
        return f"is for {capabilities}, this GPU is {gpu}"
    if target.backend == "tensorrt":
        if details.gpu is None:
            return "does not say which GPU it was built on"
        if (details.gpu.name, details.gpu.multiprocessors) != (gpu.name, gpu.multiprocessors):
            built_on, here = (f"{one} with {one.multiprocessors} multiprocessors" for one in (details.gpu, gpu))
            return f"was built on {built_on}, this GPU is {here}"
    if (installed := machine.libraries.get(target.backend)) is None:
        return f"needs {target.backend} {details.version}, which is not installed here"
    if installed != details.version:
        return f"was built by {target.backend} {details.version}, {installed} is installed here"
    if missing := [graph.name for graph in manifest.graphs if graph.name not in engines.description.plans]:
        return f"has no engine for the graph {missing[0]}"
    return None


def cache_folder() -> Path:
    """$MGE_CACHE_DIR, else the user's cache folder."""
    if chosen := os.environ.get("MGE_CACHE_DIR"):
        return Path(chosen)
    if chosen := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(chosen) / "mge"
    try:
        return Path.home() / ".cache" / "mge"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"mge-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def cached_engines(manifest_sha256: str) -> list[EngineSet]:
    """The engines that were built for a bundle and can be read, the newest first; what is damaged is passed over."""
    found: list[tuple[int, EngineSet]] = []
    for path in _manifest_folder(manifest_sha256).glob(f"*/{_DESCRIPTION}"):
        with suppress(BundleError, OSError):
            found.append((path.stat().st_mtime_ns, _stored(path.parent, manifest_sha256)))
    return [engines for _, engines in sorted(found, key=lambda item: item[0], reverse=True)]


def store_engines(
    manifest_sha256: str, target: Target, gpu: Gpu, plans: Mapping[str, Path], details: EngineDetails
) -> EngineSet:
    """Copy built engines into the cache, in place of older ones for the same device.

    The description names the plans and is replaced by one rename, so that readers see the old engines or the new ones.

    Raises:
        OutputError: the cache cannot be written.
    """
    device = hashlib.sha256(json.dumps(asdict(gpu), sort_keys=True).encode()).hexdigest()[:8]
    place = _manifest_folder(manifest_sha256) / f"{target.name}-{device}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with (place / ".lock").open("wb") as held:
            lock(held.fileno())
            entries: dict[str, Entry] = {}
            for graph, path in plans.items():
                entry = entries[graph] = Entry(file_sha256(path), path.stat().st_size)
                with atomic_path(place / _plan_name(graph, entry)) as part:
                    shutil.copyfile(path, part)
            description = EngineDescription(manifest_sha256, target.name, entries, details.to_dict())
            with atomic_path(place / _DESCRIPTION) as part:
                part.write_bytes(description.to_json())
            for older in set(place.glob("*.plan")) - {place / _plan_name(*item) for item in entries.items()}:
                with suppress(OSError):  # Windows removes no file that is mapped
                    older.unlink()
            return _stored(place, manifest_sha256)
    except (OSError, OutputError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot keep the engines in {place}: {reason}; expected a writable folder with room, "
            "set MGE_CACHE_DIR to one, or build with --into-bundle"
        ) from error


def _stored(folder: Path, manifest_sha256: str) -> EngineSet:
    """Engines in a folder of their own, as `store_engines` wrote them."""
    data, target = (folder / _DESCRIPTION).read_bytes(), folder.name.rpartition("-")[0]
    description = EngineDescription.from_json(data, target=target, manifest_sha256=manifest_sha256)

    def plan(graph: str) -> memoryview:
        entry = description.plans[graph]
        path = folder / _plan_name(graph, entry)
        try:
            with path.open("rb") as stream:
                mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            if hashlib.sha256(mapped).hexdigest() != entry.sha256:
                raise ValueError("it was damaged after it was built")
        except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
            raise BundleError(f"cannot read {path}: {error}; run mge-build again") from error
        return mapped

    return EngineSet(description, f"in the cache, {folder}", plan)


def _plan_name(graph: str, entry: Entry) -> str:
    return f"{graph}-{entry.sha256[:16]}.plan"


def _manifest_folder(manifest_sha256: str) -> Path:
    return cache_folder() / "engines" / manifest_sha256[:16]
