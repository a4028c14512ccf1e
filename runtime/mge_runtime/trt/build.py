"""Build the engines of a whole bundle, for one target: into the cache of this device or into the bundle."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.bundle.layout import stage_weights
from mge_runtime.bundle.located import located_graph
from mge_runtime.device.cuda import CudaDevice
from mge_runtime.errors import BuildError, BundleError
from mge_runtime.files import atomic_path
from mge_runtime.trt.builder import BuildOptions, build_engine
from mge_runtime.trt.cache import store_engines, timing_cache_path
from mge_runtime.trt.engines import CachedEngines, EngineDetails
from mge_runtime.trt.target import Target
from mge_runtime.trt.turing import TURING, turing_refusal
from mge_runtime.trt.vendor import Vendor, load_vendor

if TYPE_CHECKING:
    from mge_runtime.fields import JsonValue
    from mge_runtime.machine import Gpu, Machine

__all__ = [
    "NewEngines",
    "Say",
    "StageProgress",
    "ahead_of_time",
    "build_engines",
    "build_into_bundle",
    "build_into_cache",
    "build_native",
    "native_target",
]

StageProgress = Callable[[str, float, str], bool]  # stage, share done in [0, 1], phase -> whether to go on
Say = Callable[[str], None]


@dataclass(frozen=True)
class NewEngines:
    """Engines that were built and are not kept anywhere yet."""

    target: Target
    plans: Mapping[str, Path]  # a file for each stage
    details: EngineDetails


def ahead_of_time(vendor: Vendor, capabilities: Sequence[str]) -> list[Target]:
    """Targets that serve these compute capabilities; Turing, which would slow the others down, gets one of its own.

    Args:
        vendor: TensorRT-RTX; TensorRT builds on the device alone.
        capabilities: such as ("sm86", "sm120").
    """
    system, arch = platform.system().lower(), platform.machine().lower().replace("amd64", "x86_64")
    ordered = sorted(set(capabilities), key=lambda name: int(name[2:]))
    groups = [tuple(name for name in ordered if (name == TURING) is turing) for turing in (True, False)]
    return [Target(vendor.name, vendor.short_version, group, system, arch) for group in groups if group]


def native_target(vendor: Vendor, machine: Machine, gpu: Gpu) -> Target:
    """The target of engines for one GPU of this machine."""
    return Target(vendor.name, vendor.short_version, (gpu.capability,), machine.system, machine.arch)


@contextmanager
def build_engines(
    bundle: Bundle,
    vendor: Vendor,
    target: Target,
    *,
    gpu: Gpu | None,
    options: BuildOptions,
    say: Say = lambda _line: None,
    progress: StageProgress = lambda _stage, _share, _phase: True,
) -> Generator[NewEngines]:
    """Build the engines of every stage; they lie in a temporary folder as long as the block runs.

    Args:
        bundle: open.
        vendor: the library.
        target: what to build for.
        gpu: the current CUDA device, to build on and for; None: ahead of time for the target's compute capabilities.
        options: how.
        say: shows a line for each stage.
        progress: is told of every step and may stop the build.

    Raises:
        BuildError: a stage cannot be built for this target, or is not of its precision.
        BundleError: an entry is damaged, or the file was replaced meanwhile.
    """
    manifest = bundle.manifest
    if TURING in target.capabilities and vendor.is_rtx:
        for stage in manifest.stages:
            if refusal := turing_refusal(stage.name, manifest.precision.get(stage.name, {})):
                raise BuildError(refusal)
    bundle.verify([name for stage in manifest.stages if (name := stage_weights(stage.name)) in bundle.sizes])
    timing = _read(options.timing_cache)
    precision: dict[str, Mapping[str, JsonValue]] = {}
    seconds: dict[str, float] = {}
    scratch: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="mge-build-") as name:
        plans: dict[str, Path] = {}
        for stage in manifest.stages:
            start = time.perf_counter()
            plan = manifest.precision.get(stage.name, {})
            built, timing = build_engine(
                vendor,
                stage,
                located_graph(bundle, stage.name),
                bundle.path,
                plan=plan,
                capabilities=target.capabilities if gpu is None else None,
                options=options,
                timing_cache=timing,
                progress=lambda share, phase, stage=stage.name: progress(stage, share, phase),
            )
            plans[stage.name] = Path(name) / f"{stage.name}.plan"
            plans[stage.name].write_bytes(built.data)
            seconds[stage.name] = round(time.perf_counter() - start, 3)
            if built.scratch is not None:
                scratch[stage.name] = built.scratch
            kind = str(plan.get("type", "unknown"))
            precision[stage.name] = {"type": kind, "attested": built.attested, "layers": built.layers}
            say(
                f"{stage.name}: {kind}, attested: {built.attested}, {built.data.nbytes / 1e6:.1f} MB, "
                f"{seconds[stage.name]:.1f} s"
            )
        if not bundle.in_place():
            raise BundleError(f"{bundle.path} was replaced while engines were built from it; build them again")
        if options.timing_cache is not None and timing:
            options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(options.timing_cache) as temporary:
                temporary.write_bytes(timing)
        facts = {
            "optimization_level": options.optimization_level,
            "workspace": options.workspace,
            "seconds": seconds,
            "scratch": scratch,
        }
        yield NewEngines(
            target,
            plans,
            EngineDetails(vendor.version, gpu, options.batch, precision, facts, f"mge {version('mge')}"),
        )


def build_into_bundle(path: Path, new: NewEngines, manifest_sha256: str) -> None:
    """Keep built engines in a bundle, atomically; other targets stay, older engines of this target are replaced.

    Raises:
        BundleError: the bundle has another manifest by now.
        OutputError: it cannot be written.
    """
    add_engine(path, new.target.name, new.plans, new.details.to_dict(), manifest_sha256=manifest_sha256)


@contextmanager
def build_native(
    bundle: Bundle,
    machine: Machine,
    index: int,
    vendor: Vendor,
    *,
    options: BuildOptions | None = None,
    say: Say = lambda _line: None,
    progress: StageProgress = lambda _stage, _share, _phase: True,
) -> Generator[NewEngines]:
    """Build a bundle's engines for a GPU of this machine; see `build_engines`.

    Args:
        bundle: open.
        machine: this one.
        index: of the CUDA device.
        vendor: the library.
        options: how; the timing cache defaults to the one of this device.
        say: shows a line for each stage.
        progress: is told of every step and may stop the build.

    Raises:
        BackendError: the device cannot be opened.
        BuildError: a stage cannot be built, or is not of its precision.
        BundleError: an entry is damaged, or the file was replaced meanwhile.
    """
    gpu = machine.gpus[index]
    target = native_target(vendor, machine, gpu)
    options = options or BuildOptions()
    if options.timing_cache is None and not vendor.is_rtx:
        options = replace(options, timing_cache=timing_cache_path(target, gpu))
    CudaDevice(index).activate()  # TensorRT builds for the thread's current device
    say(f"building for {gpu.name} ({target}) with {vendor.name} {vendor.version}, batch {options.batch}")
    with build_engines(bundle, vendor, target, gpu=gpu, options=options, say=say, progress=progress) as new:
        yield new


def build_into_cache(
    bundle: Bundle,
    machine: Machine,
    index: int,
    backend: str,
    *,
    options: BuildOptions | None = None,
    say: Say = lambda _line: None,
    progress: StageProgress = lambda _stage, _share, _phase: True,
) -> CachedEngines:
    """Build a bundle's engines for a GPU of this machine and keep them in its cache.

    Args:
        bundle: open.
        machine: this one.
        index: of the CUDA device.
        backend: "tensorrt" or "tensorrt-rtx".
        options: how.
        say: shows a line for each stage.
        progress: is told of every step and may stop the build.

    Raises:
        BackendError: the library is missing, or the device cannot be opened.
        BuildError: a stage cannot be built.
        OutputError: the cache cannot be written.
    """
    vendor = load_vendor(backend)
    with build_native(bundle, machine, index, vendor, options=options, say=say, progress=progress) as new:
        return store_engines(bundle.manifest_sha256, new.target, machine.gpus[index], new.plans, new.details)


def _read(path: Path | None) -> bytes:
    if path is None or not path.exists():
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(f"cannot read the timing cache {path}: {error.strerror}; name another file") from error
