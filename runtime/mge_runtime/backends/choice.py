"""Which backend runs a bundle here, and why the others do not."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from mge_runtime.errors import BackendError

__all__ = ["BACKENDS", "Candidate", "Choice", "choose"]

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")  # best first
_NOT_BUILT = "not built yet in this version of mge"
_DEVICE = re.compile(r"auto|cpu|cuda:\d+")


@dataclass(frozen=True)
class Candidate:
    """One way to run the chain."""

    backend: str
    device: str  # "cpu" or "cuda:0"
    available: bool
    reason: str  # why it can or cannot run here


@dataclass(frozen=True)
class Choice:
    """The candidate that runs, and those that were passed over."""

    backend: str
    device: str
    reason: str
    passed_over: tuple[Candidate, ...]  # better ones that cannot run here, best first

    def __str__(self) -> str:
        """For example "onnxruntime on cpu"."""
        return f"{self.backend} on {self.device}"


def choose(device: str = "auto", backend: str = "auto") -> Choice:
    """Pick the best backend that can run here.

    Args:
        device: "auto", "cpu" or "cuda:0" (any index).
        backend: "auto", "tensorrt", "tensorrt-rtx" or "onnxruntime".

    Raises:
        BackendError: an unknown device or backend, or none that can run; the message gives the reason of each.
    """
    if not _DEVICE.fullmatch(device):
        raise BackendError(f'the device is {device!r}; expected "auto", "cpu" or "cuda:0"')
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"the backend is {backend!r}; expected auto, {', '.join(BACKENDS)}")
    wanted = [
        candidate
        for candidate in _candidates("cuda:0" if device in ("auto", "cpu") else device)
        if backend in ("auto", candidate.backend) and device in ("auto", candidate.device)
    ]
    for position, candidate in enumerate(wanted):
        if candidate.available:
            return Choice(candidate.backend, candidate.device, candidate.reason, tuple(wanted[:position]))
    reasons = "; ".join(f"{c.backend} on {c.device}: {c.reason}" for c in wanted)
    asked = f"device {device!r} and backend {backend!r}"
    advice = (
        'install it: pip install "mge[cpu]"'
        if device in ("auto", "cpu") and backend in ("auto", "onnxruntime")
        else "leave device and backend at auto, which takes what runs here"
    )
    raise BackendError(f"nothing can run {asked} ({reasons or f'{backend} runs on NVIDIA GPUs alone'}); {advice}")


def _candidates(gpu: str) -> list[Candidate]:
    """Every way to run, best first. Only looks for modules, imports none."""
    cpu = (
        (True, "runs anywhere; nothing faster is available here")
        if importlib.util.find_spec("onnxruntime") is not None
        else (False, 'the module onnxruntime is not installed: pip install "mge[cpu]"')
    )
    return [
        *(Candidate(name, gpu, False, _NOT_BUILT) for name in BACKENDS),
        Candidate("onnxruntime", "cpu", *cpu),
    ]
