"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mge_runtime.backends.base import Buffer, StageRunner, Streams
from mge_runtime.backends.ort import (
    check_border,
    import_onnxruntime,
    load_weights,
    session_options,
    weights_checked,
)
from mge_runtime.backends.staged import StagedBackend
from mge_runtime.bundle.cpu_graph import cpu_graph, integer_entries
from mge_runtime.bundle.located import located_graph
from mge_runtime.cpus import cpu_count
from mge_runtime.errors import BackendError, brief
from mge_runtime.spec import StageSpec

if TYPE_CHECKING:
    from mge_runtime.backends.base import Array
    from mge_runtime.bundle import Bundle

__all__ = ["OnnxRuntimeBackend"]

_MOST_STREAMS = 8  # each keeps activations of its own: with "auto", memory must not grow with the number of processors


class OnnxRuntimeBackend(StagedBackend):
    """Runs every stage as one session on the CPU.

    Args:
        threads: how many threads compute; None: as many as there are processors for this process.
        streams: runs in flight at once, each in the thread that calls it. The threads that are left over help whichever
            run has work to share. One image after the other shares its work badly (a layer is small, and each ends
            with a wait for all threads), so "auto" gives every thread an image of its own, up to 8.

    Raises:
        BackendError: ONNX Runtime is missing, broken or too old.
    """

    name = "onnxruntime"
    device = "cpu"

    def __init__(self, threads: int | None = None, streams: Streams = 1) -> None:
        self._ort = import_onnxruntime()
        self.version: str = self._ort.__version__
        self.threads = cpu_count() if threads is None else threads
        self.streams = min(self.threads, _MOST_STREAMS) if streams == "auto" else streams

    def open_stages(self, bundle: Bundle) -> dict[str, StageRunner]:
        """Open a session for each stage; the weights are checked in another thread meanwhile.

        Raises:
            BundleError: an entry is damaged, or the file was replaced meanwhile.
            BackendError: ONNX Runtime cannot run a stage.
        """
        with weights_checked(bundle):
            return {stage.name: self._open(bundle, stage) for stage in bundle.manifest.stages}

    def upload(self, array: Array) -> Buffer:
        """The array itself."""
        return array

    def download(self, buffer: Buffer) -> Array:
        """The buffer itself."""
        return buffer

    def synchronize(self) -> None:
        """Nothing to wait for: sessions return when they are done."""

    def _open(self, bundle: Bundle, stage: StageSpec) -> StageRunner:
        options = session_options(self._ort, bundle)
        # A session's threads are the one that calls and a pool of the others; all calls share the pool.
        options.intra_op_num_threads = max(1, self.threads - self.streams + 1)
        # The stages run in turn, each with threads of its own: those of the last must not spin while the next computes.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        graph = located_graph(bundle, stage.name)
        # In an INT8 bundle a stage may have stayed in FP16: it was verified re-encoded, as the others.
        if bundle.manifest.is_int8:
            graph = cpu_graph(graph, fast=True)
            for key, value in integer_entries().items():
                options.add_session_config_entry(key, value)
        loaded = load_weights(self._ort, options, bundle, graph)
        try:
            session = self._ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no base class but Exception
            raise BackendError(f"ONNX Runtime {self.version} cannot open stage {stage.name}: {brief(error)}") from error
        del loaded
        check_border(f"stage {stage.name}", session, stage.inputs, stage.outputs)
        return _Session(stage, session)


class _Session(StageRunner):
    def __init__(self, stage: StageSpec, session: Any) -> None:
        self._name = stage.name
        self._inputs = [tensor.name for tensor in stage.inputs]
        self._outputs = [tensor.name for tensor in stage.outputs]
        self._session: Any = session

    def run(self, inputs: Mapping[str, Buffer]) -> Mapping[str, Buffer]:
        feeds = {name: inputs[name] for name in self._inputs}
        try:
            values = self._session.run(self._outputs, feeds)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in stage {self._name}: {brief(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        self._session = None
