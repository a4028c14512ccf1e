"""What computes the chain: one seam (`Backend`), one module for each implementation, imported when it is chosen."""

from mge_runtime.backends.base import Backend, Buffer, StageRunner, Streams
from mge_runtime.backends.choice import BACKENDS, Candidate, Choice, choose
from mge_runtime.errors import BackendError

__all__ = ["BACKENDS", "Backend", "Buffer", "Candidate", "Choice", "StageRunner", "Streams", "choose", "open_backend"]


def open_backend(choice: Choice, *, threads: int | None = None, streams: Streams = 1) -> Backend:
    """The backend that was chosen.

    Args:
        choice: what `choose` returned.
        threads: processors to compute with; None: all that this process may use.
        streams: runs of the chain that may be in flight at once; they share the processors.

    Raises:
        BackendError: its library is missing, broken or too old.
    """
    if (choice.backend, choice.device) == ("onnxruntime", "cpu"):
        from mge_runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(threads, streams)
    raise BackendError(f"{choice} is not built yet in this version of mge; use what `choose` offers")
