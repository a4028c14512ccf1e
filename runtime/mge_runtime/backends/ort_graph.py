"""A graph of the chain as one session of ONNX Runtime whose inputs and outputs lie where the device layer says.

It runs on any device that ONNX Runtime binds memory of: with the CUDA provider on a `CudaDevice`, with the CPU provider
on a `HostDevice`.

CUDA graphs are ONNX Runtime's own here: a session cannot be captured from outside, since it may replay a graph of its
own inside the capture, which CUDA forbids (microsoft/onnxruntime #32081). With `enable_cuda_graph` a session opens only
if every node computes on the GPU and no copy between host and device was put in, captures at its first run and replays
from then on. A graph is bound to shapes and addresses; each batch size gets one of its own through the run option
`gpu_graph_id`, so the batch stays dynamic in one session and the weights are on the GPU once. Where such a session does
not open, it runs without a CUDA graph, and the reason is kept.

Graphs in FP16 open with tensor cores, which ONNX Runtime's option for TF32 stands for: without it, it
drops every kernel of cuDNN that uses them, for FP16 too. They compute in NHWC where that can be captured, in NCHW with
a graph otherwise (docs/performance.md has the figures, and why NCHW rounds more). What is left in FP32 beside products,
as attention and crops, no tensor core touches; the heads' products round their factors to 10 bits then, as FP16 does
with the features that they read. Graphs in FP32 stay in FP32, without tensor cores.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.backends.ort import check_border, load_weights, one_line, session_options
from mge_runtime.bundle.onnx_graph import located_graph
from mge_runtime.device.unit import Addresses, Launch, Unit
from mge_runtime.errors import BackendError
from mge_runtime.manifest import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.device.base import Device, Stream
    from mge_runtime.fields import JsonValue

__all__ = ["OrtGraph", "open_graphs"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_HALF = ("fp16", "int8")  # INT8 graphs are in FP16 around their integer layers


def open_graphs(
    ort: Any, bundle: Bundle, device: Device, stream: Stream, *, graphs: bool = True
) -> Generator[OrtGraph]:
    """Open the graphs of a bundle one after the other.

    Args:
        ort: the module `onnxruntime`.
        bundle: where graphs and weights lie; whoever calls checks the weights.
        device: where the graphs run and their tensors lie.
        stream: what they run on.
        graphs: whether ONNX Runtime may capture CUDA graphs.

    Raises:
        BundleError: a graph is damaged.
        BackendError: ONNX Runtime cannot open a graph on this device.
    """
    for spec in bundle.manifest.graphs:
        yield OrtGraph(ort, bundle, spec, device, stream, graphs=graphs)


class OrtGraph(Unit):
    """One graph; the arguments are those of `open_graphs`, and what the manifest says of it."""

    def __init__(
        self,
        ort: Any,
        bundle: Bundle,
        spec: GraphSpec,
        device: Device,
        stream: Stream,
        *,
        graphs: bool,
    ) -> None:
        self.name = spec.name
        self.device = device
        self.inputs, self.outputs = spec.inputs, spec.outputs
        self.why_plain: str | None = None  # why new launches capture no graph; None: they do
        self.ort = ort
        self._graph_ids: dict[tuple[int, ...], int] = {}
        self._refused: dict[str, JsonValue] = {}  # ways that did not work, and why
        graph = located_graph(bundle, spec.name)
        if device.kind == "cuda":
            half = bundle.manifest.precision.get(spec.name, {}).get("type") in _HALF
            self.session: Any = self._open_cuda(bundle, graph, stream, graphs=graphs, half=half)
        else:
            self.why_plain = "ONNX Runtime has graphs on CUDA alone"
            self.session = self._open(bundle, graph, [_CPU])
        check_border(self.name, self.session, self.inputs, self.outputs)

    def prepare(self, addresses: Addresses, stream: Stream) -> Launch:  # noqa: ARG002 - the session knows its stream
        """Bind every input and output to its address."""
        binding = self.session.io_binding()
        shapes = [(tensor, _shape(tensor, addresses.batch)) for tensor in (*self.inputs, *self.outputs)]
        for position, (tensor, shape) in enumerate(shapes):
            bind = binding.bind_input if position < len(self.inputs) else binding.bind_output
            kind = np.dtype(tensor.dtype).type
            bind(tensor.name, self.device.kind, self.device.index, kind, shape, addresses.tensors[tensor.name])
        return _OrtLaunch(self, binding, self._run_options(addresses), self.why_plain)

    def capture_failed(self, why: str) -> None:
        """Launches that are prepared from now on are plain; those that have captured already go on as they are."""
        if self.why_plain is None:
            way = str(self.opened["way"])
            self._refused[way] = why
            self.opened = {**self.opened, "way": way.replace("with a", "without a")}
            self.why_plain = why

    def close(self) -> None:
        """Release the session."""
        self.session = None

    def _open_cuda(self, bundle: Bundle, graph: bytes, stream: Stream, *, graphs: bool, half: bool) -> Any:
        """Open in the first way that works: with a graph before without, where `half` says so in NHWC before NCHW."""
        ways = list(product((True, False) if graphs else (False,), (True, False) if half else (False,)))
        session: Any = None
        for capture, nhwc in ways:
            options = {
                "device_id": str(self.device.index),
                "user_compute_stream": str(stream.handle),
                "enable_cuda_graph": str(int(capture)),
                "use_tf32": str(int(half)),
                "prefer_nhwc": str(int(nhwc)),
                "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it asks for
            }
            way = f"{'NHWC' if nhwc else 'NCHW'} {'with' if capture else 'without'} a graph"
            try:
                # Nodes that compute shapes belong on the CPU, so the CPU provider stays allowed.
                session = self._open(bundle, graph, [(_CUDA, options), _CPU])
            except BackendError as error:
                if (capture, nhwc) == ways[-1]:
                    raise
                self._refused[way] = str(error)
            else:
                if _CUDA not in session.get_providers():  # it warns and goes on with the CPU where CUDA does not load
                    raise BackendError(
                        f"ONNX Runtime {self.ort.__version__} cannot use {_CUDA}; expected CUDA and cuDNN libraries "
                        'that fit it: pip install "mge[gpu]"'
                    )
                self.why_plain = None if capture else next(map(str, self._refused.values()), "graphs are turned off")
                self.opened = {"way": way, "tensor_cores": half, "refused": self._refused}
                break
        return session

    def _open(self, bundle: Bundle, graph: bytes, providers: list[Any]) -> Any:
        session_opts = session_options(self.ort, bundle)
        loaded = load_weights(self.ort, session_opts, bundle, graph)
        try:
            session = self.ort.InferenceSession(graph, session_opts, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's errors have no base class but Exception
            raise BackendError(
                f"ONNX Runtime {self.ort.__version__} cannot open graph {self.name}: {one_line(error)}"
            ) from error
        del loaded
        return session

    def _run_options(self, addresses: Addresses) -> Any:
        options = self.ort.RunOptions()
        if self.device.kind == "cuda":
            # The chain waits once, at its end.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            if self.why_plain is not None:
                options.add_run_config_entry("gpu_graph_id", "-1")  # captures nothing
            else:
                # 0 is the graph of runs that name none. Addresses that were seen before have their graph already.
                key = (addresses.batch, *(addresses.tensors[t.name] for t in (*self.inputs, *self.outputs)))
                number = self._graph_ids.setdefault(key, len(self._graph_ids) + 1)
                options.add_run_config_entry("gpu_graph_id", str(number))
        return options


class _OrtLaunch(Launch):
    def __init__(self, owner: OrtGraph, binding: Any, options: Any, why_plain: str | None) -> None:
        self._owner = owner
        self._why_plain = why_plain  # of this launch: others may have theirs
        self._binding: Any = binding
        self._options: Any = options

    def enqueue(self, stream: Stream) -> None:  # noqa: ARG002 - the session knows its stream
        try:
            self._run()
        except BackendError as error:
            if not self.has_graph:
                raise
            # It may have been the capture: once more without, from now on.
            self._why_plain = str(error)
            self._options.add_run_config_entry("gpu_graph_id", "-1")
            self._run()
            self._owner.capture_failed(self._why_plain)

    def _run(self) -> None:
        try:
            self._owner.session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in graph {self._owner.name}: {one_line(error)}") from error

    def why_not_captured(self, stream: Stream) -> str | None:  # noqa: ARG002
        return self._why_plain or "ONNX Runtime captures a CUDA graph of its own for each graph of the chain"

    @property
    def has_graph(self) -> bool:
        return self._why_plain is None

    def close(self) -> None:
        self._binding = self._options = None


def _shape(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    return (batch, *(int(axis) for axis in tensor.shape[1:]))
