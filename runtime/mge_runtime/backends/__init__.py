"""What computes the chain: one seam (`Backend`), one module for each implementation, imported when it is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mge_runtime.backends.base import Backend, Streams
from mge_runtime.backends.choice import BACKENDS, Candidate, Choice, choose
from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle

__all__ = ["BACKENDS", "Backend", "Candidate", "Choice", "Streams", "choose", "open_backend"]


def open_backend(
    choice: Choice,
    bundle: Bundle,
    *,
    threads: int | None = None,
    streams: Streams = 1,
    graphs: bool = True,
) -> Backend:
    """The backend that was chosen.

    Args:
        choice: what `choose` returned.
        bundle: what it was made for, open.
        threads: processors to compute with on the CPU; None: all that this process may use.
        streams: runs of the chain that may be in flight at once; they share the processors. A GPU has one.
        graphs: on a GPU, whether to run the chain as CUDA graphs where that is possible.

    Raises:
        BackendError: its library is missing, broken or too old, or several streams were asked for on a GPU.
    """
    if (choice.backend, choice.device) == ("onnxruntime", "cpu"):
        from mge_runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(threads, streams)
    if streams not in (1, "auto"):
        raise BackendError(f"asked for {streams} streams on {choice.device}; expected 1: open one pipeline per thread")
    if choice.backend == "onnxruntime":
        from mge_runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(choice.device_index, graphs=graphs)
    return _open_tensorrt(choice, bundle, graphs)


def _open_tensorrt(choice: Choice, bundle: Bundle, graphs: bool) -> Backend:
    from mge_runtime.trt.engines import why_not
    from mge_runtime.trt.target import build_command
    from mge_runtime.trt.vendor import load_vendor

    machine, gpu, engines = choice.machine, choice.gpu, choice.engines
    if gpu is None or engines is None:
        raise BackendError(f"{choice} names no GPU or no engines; expected what `choose` returned")
    vendor = load_vendor(choice.backend)
    # Package metadata chose the engines; the library itself has the last word, before anything is deserialized.
    here = replace(machine, libraries={**machine.libraries, vendor.name: vendor.version})
    if problem := why_not(engines, here, gpu, bundle.manifest):
        command = build_command(choice.backend, machine, gpu, bundle.path)
        raise BackendError(f"{engines.target} {engines.place} {problem}; build again: {command}")
    from mge_runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(vendor, engines, choice.device_index, graphs=graphs)
