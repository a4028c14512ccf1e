"""Build the engines of a bundle for the requested targets and store them, in the bundle or in this device's cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from mge_runtime.backends.choice import device_name
from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.bundle.archive import target_of, weights_entry
from mge_runtime.bundle.onnx_graph import located_graph
from mge_runtime.device.cuda import CudaDevice
from mge_runtime.errors import BackendError, BuildError, BundleError
from mge_runtime.fields import JsonValue
from mge_runtime.files import temporary_folder
from mge_runtime.interrupt import Interrupt
from mge_runtime.machine import Gpu, Machine, describe_machine, this_platform
from mge_runtime.trt.builder import BuildOptions, build_engine
from mge_runtime.trt.engines import EngineDetails, store_engines
from mge_runtime.trt.target import TURING, Capabilities, Target, turing_refusal
from mge_runtime.trt.vendor import LIBRARIES, Vendor, library_refusal, load_vendor

GraphProgress = Callable[[str, float, str], None]  # graph, share done in [0, 1], phase
Say = Callable[[str], None]

_MEMORY = Path("/proc/meminfo")
_SMALLEST_WORKSPACE = 1 << 20  # bytes


@dataclass(frozen=True)
class NewEngines:
    """Engines that were built and are not stored yet."""

    plans: Mapping[str, Path]  # a file for each graph
    details: EngineDetails


@dataclass(frozen=True)
class Job:
    """The engines of one target, to be built."""

    vendor: Vendor  # the library
    target: Target
    gpu: Gpu | None  # the current CUDA device, to build on and for; None: ahead of time for the target's capabilities
    options: BuildOptions


def build_targets(
    path: Path,
    requests: Sequence[Capabilities | None],
    *,
    into_bundle: bool,
    backend: str = "auto",
    device: str = "cuda:0",
    options: BuildOptions | None = None,
    machine: Machine | None = None,
    interrupt: Interrupt | None = None,
    verbose: bool = False,
    say: Say = lambda _line: None,
    progress: GraphProgress = lambda _graph, _share, _phase: None,
    kept: Callable[[str, str], None] = lambda _target, _place: None,
) -> None:
    """Build the engines of every target that was asked for.

    Args:
        path: the bundle.
        requests: what for; None: the GPU that is present.
        into_bundle: keep native engines in the bundle too, not in the cache; those built ahead of time always are.
        backend: "tensorrt", "tensorrt-rtx", or "auto": the first that can build here.
        device: the GPU to build native engines for, "cuda:0".
        options: how; where the GPU shares the machine's memory, the workspace defaults to a quarter of what is
            available.
        machine: this one; None: look.
        interrupt: stops a build where a signal came; none is raised in the middle of the library's own code.
        verbose: say what the library says, too.
        say: shows a line.
        progress: is told of every step.
        kept: is told of each target that is stored, and where.

    Raises:
        BackendError: no library or no GPU for it.
        BuildError: a graph cannot be built, is not of its precision, or the build was interrupted.
        BundleError: the bundle is damaged or was replaced.
        OutputError: the engines cannot be stored.
    """
    options, interrupt = options or BuildOptions(), interrupt or Interrupt()
    kind, _, number = device_name(device).partition(":")
    if kind != "cuda":
        raise BackendError(f"the device is {device!r}; engines are built for a GPU: expected cuda:0, or another index")
    index = int(number)
    with Bundle.open(path) as bundle:
        # Everything that can be found out before a build is found out before the first one.
        jobs = _jobs(requests, index, backend, options, machine, say)
        for job in jobs:
            rtx_on_turing = TURING in job.target.capabilities and job.vendor.name == "tensorrt-rtx"
            if rtx_on_turing and (refusal := turing_refusal(bundle.manifest)):
                raise BuildError(refusal)
        if into_bundle:  # into a copy of the bundle beside it: everything else in it must be whole
            replaced = [job.target.name for job in jobs]
            bundle.verify([name for name in bundle.sizes if target_of(name) not in replaced])
            bundle.check_writable()
    for job in jobs:
        job.vendor.messages.say = say if verbose else None
        # Opened for each target: the one before has put a new file in this one's place.
        with Bundle.open(path) as bundle, temporary_folder("build") as folder:
            with interrupt.held():
                if job.gpu is not None:
                    CudaDevice(index).activate()  # TensorRT builds for the thread's current device
                new = build_engines(bundle, job, folder, interrupt=interrupt, say=say, progress=progress)
            if job.gpu is not None and not into_bundle:
                place = store_engines(bundle.manifest_sha256, job.target, job.gpu, new.plans, new.details).place
            else:
                if job.target.name in bundle.targets:
                    say(f"replaces the engines for {job.target} that {bundle.path} has")
                details, digest = new.details.to_dict(), bundle.manifest_sha256
                add_engine(bundle.path, job.target.name, new.plans, details, manifest_sha256=digest)
                place = f"in {path}"
            kept(job.target.name, place)


def _jobs(
    requests: Sequence[Capabilities | None],
    index: int,
    backend: str,
    options: BuildOptions,
    machine: Machine | None,
    say: Say,
) -> list[Job]:
    """What the requests come to: the ones ahead of time first; native engines are for the GPU with this index."""
    jobs: list[Job] = []
    for capabilities in filter(None, requests):
        if backend == "tensorrt":
            raise BackendError("engines are built ahead of time by tensorrt-rtx alone; leave --backend out")
        vendor = load_vendor("tensorrt-rtx")
        jobs += [Job(vendor, target, None, options) for target in ahead_of_time(vendor, capabilities)]
    if None in requests:
        machine = machine or describe_machine()
        vendor, gpu = load_vendor(native_library(machine, index, backend)), machine.gpus[index]
        target = _target(vendor, (gpu.capability,), machine.system, machine.arch)
        jobs.append(Job(vendor, target, gpu, _bounded(options, machine, gpu, say)))
    return jobs


def build_engines(
    bundle: Bundle,
    job: Job,
    folder: Path,
    *,
    interrupt: Interrupt | None = None,
    say: Say = lambda _line: None,
    progress: GraphProgress = lambda _graph, _share, _phase: None,
) -> NewEngines:
    """Build the engine of every graph of an open bundle into a folder; the rest is as for `build_targets`."""
    manifest, vendor, target, gpu, options = bundle.manifest, job.vendor, job.target, job.gpu, job.options
    say(f"building for {gpu or 'other machines'}: {target} with {vendor.name} {vendor.version}, batch {options.batch}")
    bundle.verify([name for graph in manifest.graphs if (name := weights_entry(graph.name)) in bundle.sizes])
    plans: dict[str, Path] = {}
    precision: dict[str, Mapping[str, JsonValue]] = {}
    scratch: dict[str, int] = {}
    timing = b""  # experts are alike: what was measured for one holds for the next
    replaced = f"{bundle.path} was replaced or removed while engines were built from it; build them again"

    def go_on(graph: str, share: float, phase: str) -> bool:
        progress(graph, share, phase)
        return interrupt is None or not interrupt.requested

    for graph in manifest.graphs:
        start = time.perf_counter()
        plan = manifest.precision.get(graph.name, {})
        try:
            built = build_engine(
                vendor,
                graph,
                located_graph(bundle, graph.name),
                bundle.path,
                plan=plan,
                capabilities=target.capabilities if gpu is None else None,
                options=options,
                timing=timing,
                progress=partial(go_on, graph.name),
            )
        except BuildError as error:
            if not bundle.in_place():  # the likely reason: weights are read from the file by its name
                raise BundleError(replaced) from error
            raise
        timing = built.timing
        plans[graph.name] = folder / f"{graph.name}.plan"
        plans[graph.name].write_bytes(built.data)
        if built.scratch is not None:
            scratch[graph.name] = built.scratch
        kind = str(plan.get("type", "unknown"))
        precision[graph.name] = {"type": kind, "attested": built.attested, "layers": built.layers}
        size, seconds = built.data.nbytes / 1e6, time.perf_counter() - start
        say(f"{graph.name}: {kind}, attested: {built.attested}, {size:.1f} MB, {seconds:.1f} s")
    if not bundle.in_place():
        raise BundleError(replaced)
    facts = {"optimization_level": options.optimization_level, "workspace": options.workspace, "scratch": scratch}
    details = EngineDetails(vendor.version, gpu, options.batch, precision, facts, f"mge {version('mge')}")
    return NewEngines(plans, details)


def ahead_of_time(vendor: Vendor, capabilities: Sequence[str]) -> list[Target]:
    """Targets of TensorRT-RTX for compute capabilities; Turing, which would slow the others down, gets its own."""
    ordered = sorted(set(capabilities), key=lambda name: int(name[2:]))
    groups = [tuple(name for name in ordered if (name == TURING) is turing) for turing in (True, False)]
    return [_target(vendor, group, *this_platform()) for group in groups if group]


def native_library(machine: Machine, index: int, backend: str = "auto") -> str:
    """The library that builds engines for a GPU of this machine: "tensorrt" where it is there, else "tensorrt-rtx".

    Raises:
        BackendError: there is no such GPU, or no library that serves it.
    """
    if not 0 <= index < len(machine.gpus):
        raise BackendError(
            f"there is no GPU cuda:{index} here to build for ({machine.gpu_problem or f'found {len(machine.gpus)}'}); "
            "run mge-build on the device, or build ahead of time: --target rtx:sm86 --into-bundle"
        )
    gpu = machine.gpus[index]
    reasons: list[str] = []
    for name in LIBRARIES if backend == "auto" else (backend,):
        if (reason := library_refusal(name, machine, gpu)) is None:
            return name
        reasons.append(reason)
    raise BackendError(f"nothing can build for {gpu.name} ({gpu.capability}): {'; '.join(reasons)}")


def _target(vendor: Vendor, capabilities: tuple[str, ...], system: str, arch: str) -> Target:
    return Target(vendor.name, ".".join(vendor.version.split(".")[:2]), capabilities, system, arch)


def _bounded(options: BuildOptions, machine: Machine, gpu: Gpu, say: Say) -> BuildOptions:
    """The options with a workspace that leaves memory to the rest of a machine whose GPU has none of its own.

    TensorRT counts all memory as the GPU's, tries kernels that take it, and the system kills the build
    (ultralytics/ultralytics #23945, which allows 1 GiB).
    """
    if options.workspace is not None or not (machine.is_jetson or gpu.integrated):
        return options
    lines = _MEMORY.read_text().splitlines() if _MEMORY.exists() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), gpu.memory)
    workspace = max(_SMALLEST_WORKSPACE, available // 4)
    say(
        f"a layer may use {workspace / 1e6:,.0f} MB of scratch memory, a quarter of what is available to CPU and "
        "GPU together; --workspace names another limit"
    )
    return replace(options, workspace=workspace)
