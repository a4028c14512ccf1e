"""Every way to run a bundle on a machine, each with the reason why it can or cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mge_runtime.machine import Gpu, Machine

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.trt.engines import EngineSet, FoundEngines

__all__ = ["Candidate", "candidates"]

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

    def __str__(self) -> str:
        """For example "onnxruntime on cpu"."""
        return f"{self.backend} on {self.device}"


def candidates(machine: Machine, index: int, bundle: Bundle | None, *, cache: bool) -> list[Candidate]:
    """Every way to run, in the order of preference.

    Args:
        machine: where.
        index: which of its GPUs.
        bundle: what is to run; None: no engine is there.
        cache: whether engines in this machine's cache count.
    """
    device = f"cuda:{index}"
    problem, gpu = _gpu(machine, index)
    if gpu is None or problem is not None:
        gpus = [Candidate(name, device, False, problem or "") for name in ("tensorrt", "tensorrt-rtx", "onnxruntime")]
    else:
        gpus = [*_tensorrt(machine, gpu, device, bundle, cache=cache), _onnxruntime_cuda(machine, device, bundle)]
    return [*gpus, _onnxruntime_cpu(machine)]


def _gpu(machine: Machine, index: int) -> tuple[str | None, Gpu | None]:
    """Why nothing of CUDA can run on a GPU, or that GPU."""
    if not machine.gpus:
        return machine.gpu_problem or "this machine has no NVIDIA GPU", None
    if index >= len(machine.gpus):
        last = len(machine.gpus) - 1
        return f"this machine has no such GPU; expected cuda:0{f' to cuda:{last}' if last else ''}", None
    if (error := machine.broken.get("cuda-core")) is not None:
        return f"cuda-core cannot be imported ({error}): {_cuda_core(machine)} --upgrade", None
    if "cuda-core" not in machine.libraries:
        return f"cuda-core is not installed: {_cuda_core(machine)}", None
    return None, machine.gpus[index]


def _cuda_core(machine: Machine) -> str:
    major = (machine.driver_cuda or "13").partition(".")[0]
    return f'pip install "cuda-core[cu{major}]"'


def _tensorrt(machine: Machine, gpu: Gpu, device: str, bundle: Bundle | None, *, cache: bool) -> Iterator[Candidate]:
    from mge_runtime.trt.engines import find_engines
    from mge_runtime.trt.vendor import library_refusal

    found = [] if bundle is None else find_engines(bundle, machine, gpu, cache=cache)
    for name in ("tensorrt", "tensorrt-rtx"):
        theirs = [engines for engines in found if engines.backend == name]
        if (reason := library_refusal(name, machine, gpu)) is not None:
            yield Candidate(name, device, False, reason)
            continue
        fitting = next((f.engines for f in theirs if f.engines is not None and f.problem is None), None)
        if fitting is not None:
            reason = f"the engines {fitting.description.target} {fitting.place} are for {gpu}"
            yield Candidate(name, device, True, reason, fitting)
            continue
        yield _without_engines(name, device, machine, gpu, bundle, theirs)


def _without_engines(
    name: str, device: str, machine: Machine, gpu: Gpu, bundle: Bundle | None, found: Sequence[FoundEngines]
) -> Candidate:
    """A candidate without engines that fit, with what would build them, unless the model is one that it cannot build.

    Opening builds nothing: it would take minutes, and on a Jetson most of the memory, where somebody waits for answers.
    """
    from mge_runtime.trt.target import build_command, rtx_refusal

    if bundle is not None and name == "tensorrt-rtx" and (refusal := rtx_refusal(gpu, bundle.manifest)) is not None:
        return Candidate(name, device, False, refusal)
    command = build_command(name, machine, gpu, Path("mge.plan") if bundle is None else bundle.path)
    why = "; ".join(f"{engines} {engines.problem}" for engines in found) or "the bundle has none"
    return Candidate(
        name, device, False, f"no engines are ready for {gpu} ({why}); build them: {command}", command=command
    )


def _onnxruntime_cuda(machine: Machine, device: str, bundle: Bundle | None) -> Candidate:
    if machine.is_jetson and _CUDA_PROVIDER not in machine.providers:
        return Candidate("onnxruntime", device, False, "onnxruntime-gpu has no wheel for the GPU of a Jetson")
    missing = _onnxruntime_missing(machine, "gpu")
    if missing is not None:
        return Candidate("onnxruntime", device, False, missing)
    version = machine.libraries["onnxruntime"]
    if _CUDA_PROVIDER not in machine.providers:
        reason = (
            f'onnxruntime {version} here is the build for CPUs: pip uninstall onnxruntime, then pip install "mge[gpu]"'
        )
        return Candidate("onnxruntime", device, False, reason)
    if bundle is not None and bundle.manifest.is_int8:
        # On the CPU its optimiser changed every answer of such graphs, which are re-encoded there.
        reason = "INT8 has not been checked with ONNX Runtime on CUDA: use TensorRT, or a bundle in FP16"
        return Candidate("onnxruntime", device, False, reason)
    return Candidate("onnxruntime", device, True, f"runs the ONNX graphs with onnxruntime {version} on CUDA")


def _onnxruntime_cpu(machine: Machine) -> Candidate:
    missing = _onnxruntime_missing(machine, "cpu")
    reason = "runs anywhere; nothing faster is available here" if missing is None else missing
    return Candidate("onnxruntime", "cpu", missing is None, reason)


def _onnxruntime_missing(machine: Machine, extra: str) -> str | None:
    if (error := machine.broken.get("onnxruntime")) is not None:
        return f'onnxruntime cannot be imported ({error}); install it again: pip install "mge[{extra}]"'
    if "onnxruntime" not in machine.libraries:
        return f'the module onnxruntime is not installed: pip install "mge[{extra}]"'
    return None
