"""A segment of the chain as one session of ONNX Runtime whose inputs and outputs lie where the device layer says.

The stages are merged into one graph, so that tensors between them stay inside the session. It runs on any device that
ONNX Runtime binds memory of: with the CUDA provider on a `CudaDevice`, with the CPU provider on a `HostDevice`.

CUDA graphs are ONNX Runtime's own here: a session cannot be captured from outside, since it may replay a graph of its
own inside the capture, which CUDA forbids (microsoft/onnxruntime #32081). With `enable_cuda_graph` a session opens only
if every node computes on the GPU and no copy between host and device was put in, captures at its first run and replays
from then on. A graph is bound to shapes and addresses; each batch size gets one of its own through the run option
`gpu_graph_id`, so the batch stays dynamic in one session and the weights are on the GPU once. Where such a session does
not open, the segment runs without a graph, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.backends.ort import check_border, load_weights, one_line, session_options
from mge_runtime.bundle.located import located_graph
from mge_runtime.bundle.onnx_merge import merge_stages
from mge_runtime.device.unit import Addresses, Launch, Unit
from mge_runtime.errors import BackendError
from mge_runtime.spec import StageSpec, TensorSpec

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.device.base import Device, Stream

__all__ = ["OrtSegment", "open_segments"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


def open_segments(
    ort: Any, bundle: Bundle, device: Device, stream: Stream, *, graphs: bool = True
) -> Generator[OrtSegment]:
    """Open the segments of a bundle one after the other.

    Args:
        ort: the module `onnxruntime`.
        bundle: where graphs and weights lie; whoever calls checks the weights.
        device: where the segments run and their tensors lie.
        stream: what they run on.
        graphs: whether ONNX Runtime may capture CUDA graphs.

    Raises:
        BundleError: a graph is damaged.
        BackendError: ONNX Runtime cannot open a segment on this device.
    """
    for number, segment in enumerate(bundle.manifest.segments):
        stages = [bundle.manifest.stage(name) for name in segment.stages]
        yield OrtSegment(ort, bundle, number, stages, device, stream, graphs=graphs)


class OrtSegment(Unit):
    """One segment; the arguments are those of `open_segments`, and the segment's number and stages."""

    def __init__(
        self,
        ort: Any,
        bundle: Bundle,
        number: int,
        stages: Sequence[StageSpec],
        device: Device,
        stream: Stream,
        *,
        graphs: bool,
    ) -> None:
        self.name = f"segment {number + 1} ({', '.join(stage.name for stage in stages)})"
        self.segment = number
        self.device = device
        made = {tensor.name: tensor for stage in stages for tensor in stage.outputs}
        self.inputs = list({t.name: t for stage in stages for t in stage.inputs if t.name not in made}.values())
        self.outputs = list(made.values())
        self.why_plain: str | None = None  # why ONNX Runtime captures no graph; None: it does
        self.ort = ort
        self.session: Any = None
        self._graph_ids: dict[tuple[int, ...], int] = {}
        graph = merge_stages(stages, {stage.name: located_graph(bundle, stage.name) for stage in stages}, self.name)
        if device.kind != "cuda":
            self.why_plain = "ONNX Runtime has graphs on CUDA alone"
        elif not graphs:
            self.why_plain = "graphs are turned off"
        else:
            try:
                self.session = self._open(bundle, graph, stream, graphs=True)
            except BackendError as error:
                self.why_plain = str(error)
        if self.session is None:
            self.session = self._open(bundle, graph, stream, graphs=False)
        check_border(self.name, self.session, self.inputs, self.outputs)

    def prepare(self, addresses: Addresses, stream: Stream) -> Launch:  # noqa: ARG002 - the session knows its stream
        """Bind every input and output to its address."""
        binding = self.session.io_binding()
        shapes = [(tensor, _shape(tensor, addresses.batch)) for tensor in (*self.inputs, *self.outputs)]
        for position, (tensor, shape) in enumerate(shapes):
            bind = binding.bind_input if position < len(self.inputs) else binding.bind_output
            kind = np.dtype(tensor.dtype).type
            bind(tensor.name, self.device.kind, self.device.index, kind, shape, addresses.tensors[tensor.name])
        return _OrtLaunch(self, binding, self._run_options(addresses))

    def close(self) -> None:
        """Release the session."""
        self.session = None

    def _open(self, bundle: Bundle, graph: bytes, stream: Stream, *, graphs: bool) -> Any:
        providers: list[Any] = [_CPU]
        if self.device.kind == "cuda":
            options = {
                "device_id": str(self.device.index),
                "user_compute_stream": str(stream.handle),
                "enable_cuda_graph": "1" if graphs else "0",
                "use_tf32": "0",  # FP32 means FP32
                "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it asks for
            }
            # Nodes that compute shapes belong on the CPU, so the CPU provider stays allowed.
            providers = [(_CUDA, options), _CPU]
        session_opts = session_options(self.ort, bundle)
        loaded = load_weights(self.ort, session_opts, bundle, graph)
        try:
            session = self.ort.InferenceSession(graph, session_opts, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's errors have no base class but Exception
            raise BackendError(
                f"ONNX Runtime {self.ort.__version__} cannot open {self.name}: {one_line(error)}"
            ) from error
        del loaded
        wanted = _CUDA if self.device.kind == "cuda" else _CPU
        if wanted not in session.get_providers():  # it warns and goes on with the CPU where CUDA does not load
            raise BackendError(
                f"ONNX Runtime {self.ort.__version__} cannot use {wanted}; expected CUDA and cuDNN libraries that fit "
                'it: pip install "mge[gpu]"'
            )
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
    def __init__(self, segment: OrtSegment, binding: Any, options: Any) -> None:
        self._segment = segment
        self._binding: Any = binding
        self._options: Any = options

    def enqueue(self, stream: Stream) -> None:  # noqa: ARG002 - the session knows its stream
        try:
            self._run()
        except BackendError as error:
            if not self.has_graph:
                raise
            # It may have been the capture: once more without, from now on.
            self._segment.why_plain = str(error)
            self._options.add_run_config_entry("gpu_graph_id", "-1")
            self._run()

    def _run(self) -> None:
        try:
            self._segment.session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._segment.name}: {one_line(error)}") from error

    def why_not_captured(self, stream: Stream) -> str | None:  # noqa: ARG002
        return self._segment.why_plain or "ONNX Runtime captures a graph of its own for each segment"

    @property
    def has_graph(self) -> bool:
        return self._segment.why_plain is None

    def close(self) -> None:
        self._binding = self._options = None


def _shape(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    return (batch, *(int(axis) for axis in tensor.shape[1:]))
