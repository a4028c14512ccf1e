"""Which backend runs a bundle here, and why the others do not.

Best first: engines that lie ready (TensorRT, then TensorRT-RTX), ONNX Runtime on CUDA, ONNX Runtime on the CPU. All of
it is decided from descriptions: of the machine, and of the engines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from mge_runtime.backends.candidates import Candidate, candidates
from mge_runtime.errors import BackendError
from mge_runtime.machine import Gpu, Machine

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.trt.engines import EngineSet

__all__ = ["BACKENDS", "Candidate", "Choice", "choose", "device_name"]

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")  # best first
_CUDA = re.compile(r"cuda|(?:cuda:)?(\d{1,4})", re.ASCII)
_AUTO = "leave device and backend at auto, which takes what runs here"


@dataclass(frozen=True)
class Choice:
    """The candidate that runs, and those that were passed over."""

    backend: str
    device: str
    reason: str
    passed_over: tuple[Candidate, ...]  # better ones that cannot run here or have no engines ready, best first
    engines: EngineSet | None = None  # that run, for the TensorRT backends
    machine: Machine | None = field(default=None, repr=False)  # what it was made for

    def __str__(self) -> str:
        """For example "onnxruntime on cpu"."""
        return f"{self.backend} on {self.device}"

    @property
    def remark(self) -> str | None:
        """Why a GPU that is here is not used, or not by TensorRT; None: it is, or there is none."""
        if self.machine is None or not (self.machine.gpus or self.machine.driver_cuda):
            return None
        if self.backend != "onnxruntime":
            return None
        better = [c for c in self.passed_over if c.device != "cpu"]
        return f"running with {self}; not with {_grouped(better)}" if better else None

    @property
    def command(self) -> str | None:
        """What would build the engines for a better way to run; None: engines are not what is missing."""
        return next((c.command for c in self.passed_over if c.command is not None), None)

    @property
    def device_index(self) -> int:
        """CUDA's number of the device; 0 on the CPU."""
        return _index(self.device)

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that runs; None on the CPU."""
        gpus = () if self.machine is None or self.device == "cpu" else self.machine.gpus
        return gpus[self.device_index] if self.device_index < len(gpus) else None


def choose(
    device: str = "auto",
    backend: str = "auto",
    *,
    bundle: Bundle | None = None,
    machine: Machine | None = None,
    cache: bool | None = None,
) -> Choice:
    """Pick the best backend that can run here. Nothing of an engine but its description is read.

    Args:
        device: "auto" (the first GPU, or the CPU), "cpu" or "cuda:0" (any index; "cuda" and "0" are the same).
        backend: "auto", "tensorrt", "tensorrt-rtx" or "onnxruntime".
        bundle: what is to run: its engines and its precision count; None: no engine is there.
        machine: where; None: on this machine.
        cache: whether the engines in this machine's cache count; None: where `machine` is None.

    Raises:
        BackendError: an unknown device or backend, or none that can run; the message gives the reason of each.
    """
    device = device_name(device)
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"the backend is {backend!r}; expected auto, {', '.join(BACKENDS)}")
    cuda = "cuda:0" if device in ("auto", "cpu") else device
    cache = machine is None if cache is None else cache
    machine = _this_machine(device, backend) if machine is None else machine
    every = candidates(machine, _index(cuda), bundle, cache=cache)
    wanted = [c for c in every if backend in ("auto", c.backend) and device in ("auto", c.device)]
    best = next((c for c in wanted if c.available), None)
    if best is None:
        raise BackendError(_refusal(device, backend, wanted, machine, bundle))
    better = tuple(wanted[: wanted.index(best)])
    return Choice(best.backend, best.device, best.reason, better, best.engines, machine)


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


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _refusal(device: str, backend: str, wanted: Sequence[Candidate], machine: Machine, bundle: Bundle | None) -> str:
    reasons = _grouped(wanted) or f"{backend} runs on NVIDIA GPUs alone"
    asked = f"nothing can run device {device!r} and backend {backend!r} ({reasons})"
    index = _index(device)
    gpu = machine.gpus[index] if device != "cpu" and index < len(machine.gpus) else None
    if gpu is None:
        cpu = device in ("auto", "cpu") and backend in ("auto", "onnxruntime")
        return f"{asked}; " + ('install it: pip install "mge[cpu]"' if cpu else _AUTO)
    here = f"this device is {gpu}, {machine.platform}"
    if bundle is None or not backend.startswith("tensorrt"):
        return f"{asked}; {here}; {_AUTO}"
    found = f"engines for {', '.join(bundle.targets)}" if bundle.targets else "no engines"
    if any(c.command is not None for c in wanted):  # which the reasons name
        return f"{asked}; the bundle has {found}; {here}"
    return f"{asked}; the bundle has {found}; {here}; {_build_advice(backend, machine, gpu, bundle)}"


def _grouped(candidates: Sequence[Candidate]) -> str:
    """Each candidate with its reason; what several share is said once."""
    shared = groupby(candidates, lambda c: (c.device, c.reason))
    return "; ".join(f"{', '.join(c.backend for c in same)} on {on}: {why}" for (on, why), same in shared)


def _build_advice(backend: str, machine: Machine, gpu: Gpu, bundle: Bundle) -> str:
    from mge_runtime.trt.target import build_command, rtx_refusal

    if backend == "tensorrt-rtx" and rtx_refusal(gpu, None) is not None:
        return f"build for it with full TensorRT: {build_command('tensorrt', machine, gpu, bundle.path)}"
    if backend == "tensorrt-rtx" and rtx_refusal(gpu, bundle.manifest) is not None:
        return _AUTO
    return f"then build for it: {build_command(backend, machine, gpu, bundle.path)}"
