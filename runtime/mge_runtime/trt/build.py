"""Build the engines of a whole bundle, for one target."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.bundle.archive import weights_entry
from mge_runtime.bundle.onnx_graph import located_graph
from mge_runtime.device.cuda import CudaDevice
from mge_runtime.errors import BuildError, BundleError
from mge_runtime.files import temporary_folder
from mge_runtime.machine import this_platform
from mge_runtime.machine_probe import available_memory
from mge_runtime.trt.builder import SMALLEST_WORKSPACE, BuildOptions, build_engine
from mge_runtime.trt.cache import timing_cache_path
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.target import Target
from mge_runtime.trt.timing import TimingCache
from mge_runtime.trt.turing import TURING, turing_refusal
from mge_runtime.trt.vendor import Vendor

if TYPE_CHECKING:
    from mge_runtime.fields import JsonValue
    from mge_runtime.machine import Gpu, Machine
    from mge_runtime.manifest import Manifest

__all__ = [
    "GraphProgress",
    "NewEngines",
    "Say",
    "ahead_of_time",
    "build_engines",
    "build_into_bundle",
    "build_native",
    "check_target",
    "native_target",
]

GraphProgress = Callable[[str, float, str], bool]  # graph, share done in [0, 1], phase -> whether to go on
Say = Callable[[str], None]


@dataclass(frozen=True)
class NewEngines:
    """Engines that were built and are not kept anywhere yet."""

    target: Target
    plans: Mapping[str, Path]  # a file for each graph
    details: EngineDetails


def ahead_of_time(vendor: Vendor, capabilities: Sequence[str]) -> list[Target]:
    """Targets that serve these compute capabilities; Turing, which would slow the others down, gets one of its own.

    Args:
        vendor: TensorRT-RTX; TensorRT builds on the device alone.
        capabilities: such as ("sm86", "sm120").
    """
    system, arch = this_platform()
    ordered = sorted(set(capabilities), key=lambda name: int(name[2:]))
    groups = [tuple(name for name in ordered if (name == TURING) is turing) for turing in (True, False)]
    return [Target(vendor.name, vendor.short_version, group, system, arch) for group in groups if group]


def native_target(vendor: Vendor, machine: Machine, gpu: Gpu) -> Target:
    """The target of engines for one GPU of this machine."""
    return Target(vendor.name, vendor.short_version, (gpu.capability,), machine.system, machine.arch)


def check_target(manifest: Manifest, target: Target) -> None:
    """Find out before a build what it would end in.

    Raises:
        BuildError: TensorRT-RTX cannot build this model for this target.
    """
    if TURING in target.capabilities and target.backend == "tensorrt-rtx":
        for graph in manifest.graphs:
            if refusal := turing_refusal(graph.name, manifest.precision.get(graph.name, {})):
                raise BuildError(refusal)


@contextmanager
def build_engines(
    bundle: Bundle,
    vendor: Vendor,
    target: Target,
    *,
    gpu: Gpu | None,
    options: BuildOptions,
    timing: TimingCache | None = None,
    say: Say = lambda _line: None,
    progress: GraphProgress = lambda _graph, _share, _phase: True,
) -> Generator[NewEngines]:
    """Build the engines of every graph; they lie in a temporary folder as long as the block runs.

    Args:
        bundle: open.
        vendor: the library.
        target: what to build for.
        gpu: the current CUDA device, to build on and for; None: ahead of time for the target's compute capabilities.
        options: how.
        timing: measurements to begin with and to add to; TensorRT-RTX has none.
        say: shows a line for each graph.
        progress: is told of every step and may stop the build.

    Raises:
        BuildError: a graph cannot be built for this target, or is not of its precision.
        BundleError: an entry is damaged, or the file was replaced meanwhile.
        OutputError: the temporary folder or the timing cache cannot be written.
    """
    manifest = bundle.manifest
    check_target(manifest, target)
    bundle.verify([name for graph in manifest.graphs if (name := weights_entry(graph.name)) in bundle.sizes])
    precision: dict[str, Mapping[str, JsonValue]] = {}
    seconds: dict[str, float] = {}
    scratch: dict[str, int] = {}
    with temporary_folder("build") as folder:
        plans: dict[str, Path] = {}
        for graph in manifest.graphs:
            start = time.perf_counter()
            plan = manifest.precision.get(graph.name, {})
            try:
                built, measured = build_engine(
                    vendor,
                    graph,
                    located_graph(bundle, graph.name),
                    bundle.path,
                    plan=plan,
                    capabilities=target.capabilities if gpu is None else None,
                    options=options,
                    timing_cache=timing.content if timing else b"",
                    progress=lambda share, phase, graph=graph.name: progress(graph, share, phase),
                )
            except BuildError as error:
                if not bundle.in_place():  # the likely reason: weights are read from the file by its name
                    raise _replaced(bundle) from error
                raise
            plans[graph.name] = folder / f"{graph.name}.plan"
            plans[graph.name].write_bytes(built.data)
            if timing:
                timing.store(measured)
            seconds[graph.name] = round(time.perf_counter() - start, 3)
            if built.scratch is not None:
                scratch[graph.name] = built.scratch
            kind = str(plan.get("type", "unknown"))
            precision[graph.name] = {"type": kind, "attested": built.attested, "layers": built.layers}
            say(
                f"{graph.name}: {kind}, attested: {built.attested}, {built.data.nbytes / 1e6:.1f} MB, "
                f"{seconds[graph.name]:.1f} s"
            )
        if not bundle.in_place():
            raise _replaced(bundle)
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


def build_into_bundle(
    path: Path, new: NewEngines, manifest_sha256: str, waiting: Callable[[], None] = lambda: None
) -> None:
    """Keep built engines in a bundle, atomically; other targets stay, older engines of this target are replaced.

    `waiting` is called as long as another process writes the bundle, as by `add_engine`.

    Raises:
        BundleError: the bundle has another manifest by now.
        OutputError: it cannot be written.
    """
    details = new.details.to_dict()
    add_engine(path, new.target.name, new.plans, details, manifest_sha256=manifest_sha256, waiting=waiting)


@contextmanager
def build_native(
    bundle: Bundle,
    machine: Machine,
    index: int,
    vendor: Vendor,
    *,
    options: BuildOptions | None = None,
    say: Say = lambda _line: None,
    progress: GraphProgress = lambda _graph, _share, _phase: True,
) -> Generator[NewEngines]:
    """Build a bundle's engines for a GPU of this machine; see `build_engines`.

    Args:
        bundle: open.
        machine: this one.
        index: of the CUDA device.
        vendor: the library.
        options: how; the timing cache defaults to the one of this device, which saves time where it can be written, and
            the workspace, where the GPU shares the machine's memory, to a quarter of what is available.
        say: shows a line for each graph.
        progress: is told of every step and may stop the build.

    Raises:
        BackendError: the device cannot be opened.
        BuildError: a graph cannot be built, or is not of its precision.
        BundleError: an entry is damaged, or the file was replaced meanwhile.
    """
    gpu = machine.gpus[index]
    target = native_target(vendor, machine, gpu)
    options = options or BuildOptions()
    if options.workspace is None and (machine.is_jetson or gpu.integrated):
        # TensorRT counts all memory as the GPU's, tries kernels that take it, and the system kills the build
        # (ultralytics/ultralytics #23945, which allows 1 GiB).
        workspace = max(SMALLEST_WORKSPACE, (available_memory() or gpu.memory) // 4)
        options = replace(options, workspace=workspace)
        say(
            f"a layer may use {workspace / 1e6:,.0f} MB of scratch memory, a quarter of what is available to CPU and "
            "GPU together; --workspace names another limit"
        )
    named = options.timing_cache
    timing = (
        None
        if vendor.is_rtx
        else TimingCache(named or timing_cache_path(target, gpu), named=named is not None, say=say)
    )
    CudaDevice(index).activate()  # TensorRT builds for the thread's current device
    say(f"building for {gpu.name} ({target}) with {vendor.name} {vendor.version}, batch {options.batch}")
    with build_engines(
        bundle, vendor, target, gpu=gpu, options=options, timing=timing, say=say, progress=progress
    ) as new:
        yield new


def _replaced(bundle: Bundle) -> BundleError:
    return BundleError(f"{bundle.path} was replaced or removed while engines were built from it; build them again")
