"""ONNX Runtime on an NVIDIA GPU: each graph one session, on one stream, over memory of the device layer.

Experimental: commit 686f0c1 ran on one GPU, once (docs/lab/cuda.md); what changed since
has not.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, redirect_stdout, suppress
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.backends.base import Executor
from mge_runtime.backends.onnxruntime import import_onnxruntime, open_session, weights_checked
from mge_runtime.device.cuda import CudaDevice
from mge_runtime.device.executor import DeviceExecutor
from mge_runtime.device.program import Addresses, Launch, Unit, shape_of
from mge_runtime.errors import BackendError, brief
from mge_runtime.machine import install_extra

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.device.base import Device, Stream
    from mge_runtime.fields import JsonValue
    from mge_runtime.manifest import GraphSpec


_EXTRA = "gpu"  # of mge: onnxruntime-gpu and the libraries of CUDA that fit it
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_NO_GRAPH = "-1"  # as `gpu_graph_id`: captures nothing
_HALF = ("fp16", "int8")  # INT8 graphs are in FP16 around their integer layers


def open_cuda_chain(bundle: Bundle, device_index: int = 0, *, cuda_graphs: bool = True) -> Executor:
    """Open a chain of ONNX Runtime sessions on a GPU, as CUDA numbers them from 0; see `open_ort_chain`.

    Raises:
        BackendError: ONNX Runtime is missing, broken, too old or built without CUDA, or cannot open a graph.
        BundleError: an entry is damaged.
    """
    ort = import_onnxruntime(_EXTRA)
    if _CUDA not in ort.get_available_providers():
        raise BackendError(
            f"onnxruntime {ort.__version__} was built without CUDA; expected onnxruntime-gpu: "
            f"pip uninstall onnxruntime, then {install_extra(_EXTRA)}"
        )
    preload_libraries(ort)
    return open_ort_chain(ort, bundle, CudaDevice(device_index), cuda_graphs=cuda_graphs)


def open_ort_chain(ort: Any, bundle: Bundle, device: Device, *, cuda_graphs: bool = True) -> Executor:
    """Open a chain of ONNX Runtime sessions on a device; the weights are checked in other threads meanwhile.

    Args:
        ort: the module `onnxruntime`.
        bundle: what to run.
        device: where; on one of kind "cpu" the same sessions run on the CPU.
        cuda_graphs: whether ONNX Runtime may capture CUDA graphs.

    Raises:
        BundleError, BackendError: as for `open_cuda_chain`; nothing is left open.
    """

    def open_units(device: Device, stream: Stream) -> Generator[Unit]:
        for spec in bundle.manifest.graphs:
            yield OrtGraph(ort, bundle, spec, device, stream, cuda_graphs=cuda_graphs)

    with ExitStack() as stack:
        with weights_checked(bundle):
            executor = DeviceExecutor(bundle.manifest, device, open_units)
            stack.callback(executor.close)
        stack.pop_all()
    return executor


def preload_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from where pip put them; the dynamic loader would look in system folders alone."""
    # What is missing is said when the session opens; here it would be printed, between predictions or into JSON.
    with suppress(OSError), redirect_stdout(None):
        ort.preload_dlls()


class OrtGraph(Unit):
    """One graph as a session whose inputs and outputs lie where the device layer says.

    It runs with the CUDA provider on a `CudaDevice`, with the CPU's on a device of kind "cpu". CUDA graphs are ONNX
    Runtime's own: it captures at the first run of each batch size, which the run option `gpu_graph_id` tells apart
    (docs/adr/0006).

    Raises:
        BundleError: the graph is damaged.
        BackendError: ONNX Runtime cannot open it on this device.
    """

    def __init__(
        self, ort: Any, bundle: Bundle, spec: GraphSpec, device: Device, stream: Stream, *, cuda_graphs: bool
    ) -> None:
        self.name = spec.name
        self.spec = spec
        self.why_plain: str | None = None  # why new launches capture no graph; None: they do
        self._ort = ort
        self._device = device
        self._graph_ids: dict[tuple[int, ...], int] = {}
        self._refused: dict[str, JsonValue] = {}  # ways that did not work, and why
        if device.kind == "cuda":
            self.session: Any = self._open_cuda(bundle, stream, cuda_graphs=cuda_graphs)
        else:
            self.why_plain = "ONNX Runtime has CUDA graphs with its CUDA provider alone"
            self.session = open_session(ort, bundle, spec, [_CPU])

    def prepare(self, addresses: Addresses, stream: Stream) -> Launch:  # noqa: ARG002 - the session knows its stream
        """Bind every input and output to its address."""
        binding, kind, index = self.session.io_binding(), self._device.kind, self._device.index
        for bind, tensors in ((binding.bind_input, self.spec.inputs), (binding.bind_output, self.spec.outputs)):
            for tensor in tensors:
                shape, address = shape_of(tensor, addresses.batch), addresses.tensors[tensor.name]
                bind(tensor.name, kind, index, np.dtype(tensor.dtype).type, shape, address)
        return _OrtLaunch(self, binding, self._run_options(addresses))

    def capture_failed(self, why: str) -> None:
        """Launches that are prepared from now on are plain; those that have captured already go on as they are."""
        if self.why_plain is None:
            way, self.why_plain = str(self.opened["way"]), why
            self._refused[way] = why
            self.opened = {**self.opened, "way": way.replace("with a", "without a")}

    def close(self) -> None:
        """Release the session."""
        self.session = None

    def _open_cuda(self, bundle: Bundle, stream: Stream, *, cuda_graphs: bool) -> Any:
        """Open in the first way that works: with a CUDA graph before without, in half precision in NHWC before NCHW.

        The option for TF32 stands for tensor cores in general: without it FP16 gets none either. With graphs a session
        opens only if every node computes on the GPU and no copy between host and device was put in.
        """
        half = bundle.manifest.precision.get(self.name, {}).get("type") in _HALF
        ways = list(product((True, False) if cuda_graphs else (False,), (True, False) if half else (False,)))
        session: Any = None
        for capture, nhwc in ways:
            options = {
                "device_id": str(self._device.index),
                "user_compute_stream": str(stream.handle),
                "enable_cuda_graph": str(int(capture)),
                "use_tf32": str(int(half)),
                "prefer_nhwc": str(int(nhwc)),
                "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it asks for
            }
            way = f"{'NHWC' if nhwc else 'NCHW'} {'with' if capture else 'without'} a CUDA graph"
            try:
                # Nodes that compute shapes belong on the CPU, so the CPU provider stays allowed.
                session = open_session(self._ort, bundle, self.spec, [(_CUDA, options), _CPU])
            except BackendError as error:
                if (capture, nhwc) == ways[-1]:
                    raise
                self._refused[way] = str(error)
                continue
            if _CUDA not in session.get_providers():  # it warns and goes on with the CPU where CUDA does not load
                raise BackendError(
                    f"ONNX Runtime {self._ort.__version__} cannot use {_CUDA}; expected CUDA and cuDNN libraries that "
                    f"fit it: {install_extra(_EXTRA)}"
                )
            self.why_plain = None if capture else next(map(str, self._refused.values()), "CUDA graphs are turned off")
            self.opened = {"way": way, "tensor_cores": half, "refused": self._refused}
            break
        return session

    def _run_options(self, addresses: Addresses) -> Any:
        options = self._ort.RunOptions()
        if self._device.kind == "cuda":
            # The chain waits once, at its end.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            # 0 is the graph of runs that name none. Addresses that were seen before have their graph already.
            tensors = (*self.spec.inputs, *self.spec.outputs)
            key = (addresses.batch, *(addresses.tensors[tensor.name] for tensor in tensors))
            number = self._graph_ids.setdefault(key, len(self._graph_ids) + 1)
            options.add_run_config_entry("gpu_graph_id", str(number) if self.why_plain is None else _NO_GRAPH)
        return options


class _OrtLaunch(Launch):
    def __init__(self, owner: OrtGraph, binding: Any, options: Any) -> None:
        self.has_graph = owner.why_plain is None
        self._owner = owner
        self._binding: Any = binding
        self._options: Any = options

    def enqueue(self, stream: Stream) -> None:  # noqa: ARG002 - the session knows its stream
        try:
            self._run()
        except BackendError as error:
            if not self.has_graph:
                raise
            # It may have been the capture: once more without, from now on.
            self.has_graph = False
            self._options.add_run_config_entry("gpu_graph_id", _NO_GRAPH)
            self._run()
            self._owner.capture_failed(str(error))

    def _run(self) -> None:
        try:
            self._owner.session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in graph {self._owner.name}: {brief(error)}") from error

    def why_not_captured(self, stream: Stream) -> str | None:  # noqa: ARG002
        why = None if self.has_graph else self._owner.why_plain
        return why or "ONNX Runtime captures a CUDA graph of its own for each graph of the chain"

    def close(self) -> None:
        self._binding = self._options = None
