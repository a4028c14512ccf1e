"""The choice of a backend for a bundle on a machine, and why it is not another.

Best first: engines that lie ready (TensorRT, then TensorRT-RTX), ONNX Runtime on CUDA, ONNX Runtime on the CPU. All of
it is decided from descriptions: of the machine, and of the engines.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from mge_runtime.errors import BackendError
from mge_runtime.machine import Gpu, Machine, install_extra

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.trt.engines import EngineSet


BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")  # best first
_CUDA = re.compile(r"cuda|(?:cuda:)?(\d{1,4})", re.ASCII)
_CUDA_PROVIDER = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Candidate:
    """One way to run the chain."""

    backend: str
    device: str  # "cpu" or "cuda:0"
    available: bool
    reason: str  # why it can or cannot run here
    engines: EngineSet | None = None  # that fit, for the TensorRT backends
    command: str | None = None  # that builds engines for it, where these are all that is missing


@dataclass(frozen=True)
class Choice:
    """The candidate that runs, and those that were passed over."""

    backend: str
    device: str
    reason: str
    passed_over: tuple[Candidate, ...]  # better ones that cannot run here or have no engines ready, best first
    engines: EngineSet | None = None  # that run, for the TensorRT backends
    machine: Machine = field(kw_only=True, repr=False)  # what it was made for

    def __str__(self) -> str:
        """For example "onnxruntime on cpu"."""
        return f"{self.backend} on {self.device}"

    @property
    def note(self) -> str | None:
        """Why a GPU that is here is not used, or not by TensorRT, or what would build engines for a better way.

        None: there is nothing to say of it.
        """
        has_gpu = self.machine.gpus or self.machine.driver_cuda
        if self.command is None and (self.backend != "onnxruntime" or not self.passed_over or not has_gpu):
            return None
        return f"running with {self}; not with {_grouped(self.passed_over)}"

    @property
    def command(self) -> str | None:
        """What would build the engines for a better way to run; None: engines are not what is missing."""
        return next((c.command for c in self.passed_over if c.command is not None), None)

    def warn_of_missing_engines(self) -> None:
        """Where engines are missing that would run, log the note, which has the command to build them."""
        if self.command is not None:
            logging.getLogger("mge_runtime").warning(self.note)

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that runs; None on the CPU."""
        return _gpu(self.machine, self.device)


def choose(
    device: str = "auto",
    backend: str = "auto",
    *,
    bundle: Bundle,
    machine: Machine | None = None,
    cache: bool | None = None,
) -> Choice:
    """Pick the best backend that can run here. Nothing of an engine but its description is read.

    Args:
        device: "auto" (the first GPU, or the CPU), "cpu" or "cuda:0" (any index; "cuda" and "0" are the same).
        backend: "auto", "tensorrt", "tensorrt-rtx" or "onnxruntime".
        bundle: what is to run, open: its engines and its precision count.
        machine: where; None: on this machine.
        cache: whether the engines in this machine's cache count; None: where `machine` is None.

    Raises:
        BackendError: an unknown device or backend, or none that can run; the message gives the reason of each.
    """
    device = device_name(device)
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"the backend is {backend!r}; expected auto, {', '.join(BACKENDS)}")
    cache = machine is None if cache is None else cache
    machine = _this_machine(device, backend) if machine is None else machine
    every = _candidates(machine, "cuda:0" if device in ("auto", "cpu") else device, bundle, cache=cache)
    wanted = [c for c in every if backend in ("auto", c.backend) and device in ("auto", c.device)]
    best = next((c for c in wanted if c.available), None)
    if best is None:
        raise BackendError(_refusal(device, backend, wanted, machine, bundle))
    better = tuple(wanted[: wanted.index(best)])
    return Choice(best.backend, best.device, best.reason, better, best.engines, machine=machine)


def device_name(text: str) -> str:
    """A device as it is called everywhere: "cuda" and "0" are "cuda:0".

    Raises:
        BackendError: the text names no device.
    """
    if text in ("auto", "cpu"):
        return text
    if (found := _CUDA.fullmatch(text)) is None:
        raise BackendError(f'the device is {text!r}; expected "auto", "cpu", "cuda:0" or another index, "cuda" or "0"')
    return f"cuda:{int(found[1] or 0)}"


def _this_machine(device: str, backend: str) -> Machine:
    from mge_runtime.machine import describe_machine

    if device == "cpu":
        return describe_machine((), gpus=False, quick=True)
    return describe_machine(None if backend == "auto" else (backend, "cuda-core"), quick=True)


def device_index(device: str) -> int:
    """CUDA's number of a device such as "cuda:1"; 0 for the CPU."""
    return int(device.partition(":")[2] or 0)


def _gpu(machine: Machine, device: str) -> Gpu | None:
    return next(iter(machine.gpus[device_index(device) :]), None) if device != "cpu" else None


def _candidates(machine: Machine, device: str, bundle: Bundle, *, cache: bool) -> list[Candidate]:
    """Every way to run on one GPU of a machine and on its CPU, in the order of preference."""
    gpu = _gpu(machine, device)
    cuda_core = f'pip install "cuda-core[cu{(machine.driver_cuda or "13").partition(".")[0]}]"'
    problem = _gpu_missing(machine) if gpu is None else machine.missing("cuda-core", cuda_core)
    if gpu is None or problem is not None:
        gpus = [Candidate(name, device, False, str(problem)) for name in BACKENDS]
    else:
        gpus = [*_tensorrt(machine, gpu, device, bundle, cache=cache), _onnxruntime_cuda(machine, device, bundle)]
    missing = machine.missing("onnxruntime", install_extra("cpu"))
    reason = missing or "runs anywhere; nothing faster is available here"
    return [*gpus, Candidate("onnxruntime", "cpu", missing is None, reason)]


def _gpu_missing(machine: Machine) -> str:
    if not machine.gpus:
        return machine.gpu_problem or "this machine has no NVIDIA GPU"
    last = len(machine.gpus) - 1
    return f"this machine has no such GPU; expected cuda:0{f' to cuda:{last}' if last else ''}"


def _tensorrt(machine: Machine, gpu: Gpu, device: str, bundle: Bundle, *, cache: bool) -> Iterator[Candidate]:
    """Both libraries, with engines that fit or with what would build them, unless it cannot build the model.

    Opening builds nothing: it would take minutes, and on a Jetson most of the memory, where somebody waits.
    """
    from mge_runtime.trt.engines import find_engines
    from mge_runtime.trt.target import build_command, rtx_refusal
    from mge_runtime.trt.vendor import library_refusal

    found = find_engines(bundle, machine, gpu, cache=cache)
    for name in ("tensorrt", "tensorrt-rtx"):
        theirs = [engines for engines in found if engines.backend == name]
        fitting = next((f.engines for f in theirs if f.engines is not None and f.problem is None), None)
        refusal = library_refusal(name, machine, gpu)
        if refusal is None and fitting is None and name == "tensorrt-rtx":
            refusal = rtx_refusal(gpu, bundle.manifest)
        if refusal is not None:
            yield Candidate(name, device, False, refusal)
        elif fitting is not None:
            reason = f"the engines {fitting.description.target} {fitting.place} are for {gpu}"
            yield Candidate(name, device, True, reason, fitting)
        else:
            command = build_command(name, machine, gpu, bundle.path)
            why = "; ".join(f"{engines} {engines.problem}" for engines in theirs) or "the bundle has none"
            reason = f"no engines are ready for {gpu} ({why}); build them: {command}"
            yield Candidate(name, device, False, reason, command=command)


def _onnxruntime_cuda(machine: Machine, device: str, bundle: Bundle) -> Candidate:
    has_cuda, missing = _CUDA_PROVIDER in machine.providers, machine.missing("onnxruntime", install_extra("gpu"))
    version = machine.libraries.get("onnxruntime")
    if machine.is_jetson and not has_cuda:
        reason = "onnxruntime-gpu has no wheel for the GPU of a Jetson"
    elif missing is not None:
        reason = missing
    elif not has_cuda:
        install = f"pip uninstall onnxruntime, then {install_extra('gpu')}"
        reason = f"onnxruntime {version} here is the build for CPUs: {install}"
    elif bundle.manifest.is_int8:
        # On the CPU its optimizer changed every output of such graphs, which have variants of their own there.
        reason = "INT8 has not been checked with ONNX Runtime on CUDA: use TensorRT, or a bundle in FP16"
    else:
        return Candidate("onnxruntime", device, True, f"runs the ONNX graphs with onnxruntime {version} on CUDA")
    return Candidate("onnxruntime", device, False, reason)


def _refusal(device: str, backend: str, wanted: Sequence[Candidate], machine: Machine, bundle: Bundle) -> str:
    """What was asked for, why not, what is here, what to do."""
    reasons = _grouped(wanted) or f"{backend} runs on NVIDIA GPUs alone"
    parts = [f"nothing can run device {device!r} and backend {backend!r} ({reasons})"]
    gpu = _gpu(machine, device)
    if gpu is not None and backend.startswith("tensorrt"):
        parts.append(
            f"the bundle has engines for {', '.join(bundle.targets)}" if bundle.targets else "the bundle has no engines"
        )
    if gpu is not None:
        parts.append(f"this device is {gpu}, {machine.platform}")
    if (device, backend) != ("auto", "auto") and all(c.command is None for c in wanted):  # else the reasons name it
        parts.append("leave device and backend at auto, which takes what runs here")
    return "; ".join(parts)


def _grouped(candidates: Sequence[Candidate]) -> str:
    """Each candidate with its reason; what several share is said once."""
    shared = groupby(candidates, lambda c: (c.device, c.reason))
    return "; ".join(f"{', '.join(c.backend for c in same)} on {on}: {why}" for (on, why), same in shared)
