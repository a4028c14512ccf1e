"""ONNX Runtime on an NVIDIA GPU: each graph one session, on one stream, over memory of the device layer.

Experimental: commit 686f0c1 ran on one GPU, once (docs/performance.md, ONNX Runtime on CUDA); what changed since
has not.
"""

from __future__ import annotations

from contextlib import ExitStack, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

from mge_runtime.backends.base import Backend, Executor
from mge_runtime.backends.ort import import_onnxruntime, weights_checked
from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.device import Device

__all__ = ["OnnxRuntimeCudaBackend", "import_cuda_onnxruntime", "open_ort_chain", "preload_libraries"]

_INSTALL = 'pip install "mge[gpu]"'


class OnnxRuntimeCudaBackend(Backend):
    """Runs every graph as one session of the CUDA execution provider.

    Args:
        device_index: as CUDA numbers devices, from 0.
        graphs: whether ONNX Runtime may capture CUDA graphs.

    Raises:
        BackendError: ONNX Runtime is missing, broken, too old or built without CUDA.
    """

    name = "onnxruntime"
    streams = 1

    def __init__(self, device_index: int = 0, *, graphs: bool = True) -> None:
        self._ort = import_cuda_onnxruntime()
        self.version: str = self._ort.__version__
        self.device = f"cuda:{device_index}"
        self._index = device_index
        self._graphs = graphs

    def open_chain(self, bundle: Bundle) -> Executor:
        """Open a session for each graph; the weights are checked in other threads meanwhile.

        Raises:
            BundleError: an entry is damaged, or the file was replaced meanwhile.
            BackendError: the GPU cannot be opened, or ONNX Runtime cannot run a graph on it.
        """
        from mge_runtime.device.cuda import CudaDevice

        preload_libraries(self._ort)
        return open_ort_chain(self._ort, bundle, CudaDevice(self._index), graphs=self._graphs)


def open_ort_chain(ort: Any, bundle: Bundle, device: Device, *, graphs: bool = True) -> Executor:
    """Open a chain of ONNX Runtime sessions on a device.

    Args:
        ort: the module `onnxruntime`.
        bundle: what to run.
        device: where; a `HostDevice` runs the same sessions on the CPU.
        graphs: whether ONNX Runtime may capture CUDA graphs.

    Raises:
        BundleError, BackendError: as for `OnnxRuntimeCudaBackend.open_chain`; nothing is left open.
    """
    from mge_runtime.backends.ort_graph import open_graphs
    from mge_runtime.device.executor import DeviceExecutor

    with ExitStack() as stack:
        with weights_checked(bundle):
            executor = DeviceExecutor(
                bundle.manifest, device, lambda d, stream: open_graphs(ort, bundle, d, stream, graphs=graphs)
            )
            stack.callback(executor.close)
        stack.pop_all()
    return executor


def import_cuda_onnxruntime() -> Any:
    """The module `onnxruntime`, built with CUDA.

    Raises:
        BackendError: it is missing, broken, too old or built without CUDA.
    """
    ort = import_onnxruntime(_INSTALL)
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise BackendError(
            f"onnxruntime {ort.__version__} was built without CUDA; expected onnxruntime-gpu: "
            f"pip uninstall onnxruntime, then {_INSTALL}"
        )
    return ort


def preload_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from where pip put them; the dynamic loader would look in system folders alone."""
    preload = getattr(ort, "preload_dlls", None)  # from 1.21 on
    if preload is not None:
        # What is missing is said when the session opens; here it would be printed, between answers or into JSON.
        with suppress(OSError), redirect_stdout(None):
            preload()
