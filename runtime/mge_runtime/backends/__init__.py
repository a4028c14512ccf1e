"""What computes the chain: one seam (`Executor`), one module for each implementation, imported when it is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mge_runtime.backends.base import Executor, Streams
from mge_runtime.backends.choice import BACKENDS, Candidate, Choice, choose, device_index
from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle

__all__ = ["BACKENDS", "Candidate", "Choice", "Executor", "Streams", "choose", "open_executor"]


def open_executor(
    choice: Choice,
    bundle: Bundle,
    *,
    threads: int | None = None,
    streams: Streams = 1,
    cuda_graphs: bool = True,
) -> Executor:
    """Open the chain of a bundle on the backend that was chosen.

    Args:
        choice: what `choose` returned.
        bundle: what it was made for, open.
        threads: processors to compute with on the CPU; None: all that this process may use.
        streams: runs of the chain that may be in flight at once; they share the processors. A GPU has one.
        cuda_graphs: on a GPU, whether to run the chain as CUDA graphs where that is possible.

    Raises:
        BackendError: the library is missing, broken or too old, it cannot run a graph, or several streams were asked
            for on a GPU.
        BundleError: an entry is damaged.
    """
    if (choice.backend, choice.device) == ("onnxruntime", "cpu"):
        from mge_runtime.backends.onnxruntime import CpuExecutor

        return CpuExecutor(bundle, threads, streams)
    if streams not in (1, "auto"):
        raise BackendError(f"asked for {streams} streams on {choice.device}; expected 1: open one pipeline per thread")
    if choice.backend == "onnxruntime":
        from mge_runtime.backends.onnxruntime_cuda import open_cuda_chain

        return open_cuda_chain(bundle, device_index(choice.device), cuda_graphs=cuda_graphs)
    from mge_runtime.backends.tensorrt import open_tensorrt_chain

    return open_tensorrt_chain(choice, bundle, cuda_graphs=cuda_graphs)
