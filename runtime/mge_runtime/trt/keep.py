"""Build what was asked for and keep it: ahead of time in the bundle, native in the cache or the bundle."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from mge_runtime.backends.choice import device_name
from mge_runtime.bundle import Bundle
from mge_runtime.bundle.archive import target_of
from mge_runtime.errors import BackendError, BuildError, printable
from mge_runtime.files import check_writable
from mge_runtime.machine import Machine
from mge_runtime.machine_probe import describe_machine
from mge_runtime.trt.build import (
    GraphProgress,
    NewEngines,
    Say,
    ahead_of_time,
    build_engines,
    build_into_bundle,
    build_native,
    check_target,
    native_target,
)
from mge_runtime.trt.builder import BuildOptions
from mge_runtime.trt.cache import store_engines
from mge_runtime.trt.fit import library_refusal
from mge_runtime.trt.request import TargetRequest
from mge_runtime.trt.target import Target
from mge_runtime.trt.vendor import LIBRARIES, Vendor, load_vendor

__all__ = ["build_targets", "native_library"]


def build_targets(
    path: Path,
    requests: Sequence[TargetRequest],
    *,
    into_bundle: bool,
    backend: str = "auto",
    device: str = "cuda:0",
    options: BuildOptions | None = None,
    machine: Machine | None = None,
    say: Say = lambda _line: None,
    progress: GraphProgress = lambda _graph, _share, _phase: True,
    held: Callable[[], AbstractContextManager[None]] = nullcontext,
    log: Say | None = None,
    kept: Callable[[str, str], None] = lambda _target, _place: None,
) -> None:
    """Build the engines of every target that was asked for.

    Args:
        path: the bundle.
        requests: what for.
        into_bundle: keep native engines in the bundle too, not in the cache; those built ahead of time always are.
        backend: "tensorrt", "tensorrt-rtx", or "auto": the first that can build here.
        device: the GPU to build native engines for, "cuda:0".
        options: how.
        machine: this one; None: look.
        say: shows a line for each graph.
        progress: is told of every step and may stop the build.
        held: keeps signals from raising inside its block: the library calls `progress` in the middle of foreign code.
        log: shows what the library says.
        kept: is told of each target that is kept, and where.

    Raises:
        BackendError: no library or no GPU for it.
        BuildError: a graph cannot be built, is not of its precision, or `progress` stopped the build or the
            wait for another process.
        BundleError: the bundle is damaged or was replaced.
        OutputError: the engines cannot be kept.
    """
    options = options or BuildOptions()
    # Everything that can be found out before a build is found out before the first one.
    index = _gpu_index(device)
    jobs: list[_Job] = []
    for request in requests:
        if request.capabilities is not None:
            if backend == "tensorrt":
                raise BackendError("engines are built ahead of time by tensorrt-rtx alone; leave --backend out")
            rtx = _vendor("tensorrt-rtx", log)
            jobs += [_Job(rtx, target, None) for target in ahead_of_time(rtx, request.capabilities)]
    with Bundle.open(path) as bundle:
        if any(request.capabilities is None for request in requests):
            machine = machine or describe_machine()
            vendor = _vendor(native_library(machine, index, backend), log)
            jobs.append(_Job(vendor, native_target(vendor, machine, machine.gpus[index]), machine))
        for job in jobs:
            check_target(bundle.manifest, job.target)
        if into_bundle:
            _check_writable(bundle, [job.target.name for job in jobs])
    for job in jobs:
        # Opened for each target: the one before has put a new file in this one's place.
        with Bundle.open(path) as bundle, ExitStack() as stack:
            with held():
                new = stack.enter_context(_built(job, bundle, index, options, say, progress))
            if into_bundle or job.machine is None:
                if job.target.name in bundle.targets:
                    say(f"replaces the engines for {job.target} that {path} has")

                def waiting() -> None:
                    if not progress("bundle", 0.0, "waits for another process"):
                        raise BuildError(
                            f"stopped while waiting for another process that writes {printable(str(path))}; the bundle "
                            "is as it was"
                        )

                build_into_bundle(bundle.path, new, bundle.manifest_sha256, waiting)
                place = f"in {path}"
            else:
                gpu = job.machine.gpus[index]
                place = store_engines(bundle.manifest_sha256, new.target, gpu, new.plans, new.details).place
            kept(new.target.name, place)


@dataclass(frozen=True)
class _Job:
    vendor: Vendor
    target: Target
    machine: Machine | None  # to build on; None: ahead of time


@contextmanager
def _built(
    job: _Job, bundle: Bundle, index: int, options: BuildOptions, say: Say, progress: GraphProgress
) -> Generator[NewEngines]:
    if job.machine is not None:
        with build_native(bundle, job.machine, index, job.vendor, options=options, say=say, progress=progress) as new:
            yield new
        return
    say(f"building for {job.target} with {job.vendor.name} {job.vendor.version}, batch {options.batch}")
    with build_engines(bundle, job.vendor, job.target, gpu=None, options=options, say=say, progress=progress) as new:
        yield new


def _check_writable(bundle: Bundle, targets: Sequence[str]) -> None:
    """Engines go into a copy of the bundle beside it: everything else in it must be whole, and the folder writable.

    Raises:
        BundleError: an entry is damaged.
        OutputError: the folder cannot be written.
    """
    bundle.verify([name for name in bundle.sizes if target_of(name) not in targets])
    check_writable(bundle.path)


def _gpu_index(device: str) -> int:
    kind, _, number = device_name(device).partition(":")
    if kind != "cuda":
        raise BackendError(f"the device is {device!r}; engines are built for a GPU: expected cuda:0, or another index")
    return int(number)


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
        reason = library_refusal(name, machine, gpu)
        if reason is None:
            return name
        reasons.append(reason)
    raise BackendError(f"nothing can build for {gpu.name} ({gpu.capability}): {'; '.join(reasons)}")


def _vendor(name: str, log: Say | None) -> Vendor:
    vendor = load_vendor(name)
    vendor.messages.say = log
    return vendor
