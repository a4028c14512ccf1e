"""TensorRT and TensorRT-RTX: one engine for each graph, all on one stream, over memory of the device layer.

One implementation for `tensorrt` 10.3 to 11.x and `tensorrt_rtx`. Engines that run in turn share one piece of scratch
memory: contexts are created without memory of their own and given the arena's.

Experimental: not yet run on a GPU by this project.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from mge_runtime.backends.base import Backend, Executor

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.device import Device, Stream
    from mge_runtime.device.unit import Unit
    from mge_runtime.trt.engines import EngineSet
    from mge_runtime.trt.vendor import Vendor

__all__ = ["TensorRTBackend"]


class TensorRTBackend(Backend):
    """Runs every graph as an engine.

    Args:
        vendor: the library.
        engines: for this library's version and this GPU; whoever calls has checked that they fit.
        device_index: as CUDA numbers devices, from 0.
        graphs: whether to capture CUDA graphs.
    """

    streams = 1
    maps_weights = False  # engines are copied to the device

    def __init__(self, vendor: Vendor, engines: EngineSet, device_index: int = 0, *, graphs: bool = True) -> None:
        self.name = vendor.name
        self.version = vendor.version
        self.device = f"cuda:{device_index}"
        self._vendor = vendor
        self._engines = engines
        self._index = device_index
        self._graphs = graphs

    def open_chain(self, bundle: Bundle) -> Executor:
        """Deserialise every engine; each is checked against its hash first and against the manifest afterwards.

        Raises:
            BundleError: an engine is missing or damaged, or has other inputs or outputs than its graph.
            BackendError: the GPU cannot be opened, or TensorRT refuses an engine.
        """
        from mge_runtime.device.cuda import CudaDevice
        from mge_runtime.device.executor import DeviceExecutor

        def open_units(device: Device, stream: Stream) -> Generator[Unit]:  # noqa: ARG001 - each launch is told
            from mge_runtime.backends.trt_graph import TensorRTGraph

            runtime = self._vendor.api.Runtime(self._vendor.logger)
            for spec in bundle.manifest.graphs:
                yield TensorRTGraph(self._vendor, runtime, self._engines.plan(spec.name), spec)

        return DeviceExecutor(bundle.manifest, CudaDevice(self._index), open_units, graphs=self._graphs)
