"""ONNX Runtime on the CPU: a session for each graph of the chain, one after the other."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.backends.base import Backend, Executor, ExecutorResult, Streams, split
from mge_runtime.backends.ort import (
    check_border,
    import_onnxruntime,
    load_weights,
    one_line,
    session_options,
    weights_checked,
)
from mge_runtime.bundle.onnx_graph import located_graph
from mge_runtime.errors import BackendError
from mge_runtime.machine import cpu_count
from mge_runtime.manifest import FRAME, Manifest

if TYPE_CHECKING:
    from mge_runtime.backends.base import Array
    from mge_runtime.bundle import Bundle
    from mge_runtime.calibrated import ExitPoint
    from mge_runtime.manifest import GraphSpec

__all__ = ["OnnxRuntimeBackend", "integer_entries"]

_MOST_STREAMS = 8  # each keeps activations of its own: with "auto", memory must not grow with the number of processors


def integer_entries() -> dict[str, str]:
    """Entries of ONNX Runtime's session configuration that the integer kernels of an INT8 graph need on this CPU.

    Without VNNI, x86 sums two products of uint8 and int8 in 16 bits, where they overflow. ONNX Runtime then must take
    kernels that do not; with VNNI these would only be slower (measured: by a half).
    """
    try:
        vnni = "vnni" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # not Linux: nothing says
        vnni = False
    return {} if vnni else {"session.x64quantprecision": "1"}


class OnnxRuntimeBackend(Backend):
    """Runs every graph as one session on the CPU.

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

    def open_chain(self, bundle: Bundle) -> Executor:
        """Open a session for each graph; the weights are checked in another thread meanwhile.

        Raises:
            BundleError: an entry is damaged, or the file was replaced meanwhile.
            BackendError: ONNX Runtime cannot run a graph.
        """
        with weights_checked(bundle):
            sessions = {graph.name: self._open(bundle, graph) for graph in bundle.manifest.graphs}
        return _Sessions(bundle.manifest, sessions)

    def _open(self, bundle: Bundle, spec: GraphSpec) -> Any:
        options = session_options(self._ort, bundle)
        # A session's threads are the one that calls and a pool of the others; all calls share the pool.
        options.intra_op_num_threads = max(1, self.threads - self.streams + 1)
        # The graphs run in turn, each with threads of its own: those of the last must not spin while the next computes.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in integer_entries().items() if bundle.manifest.is_int8 else ():
            options.add_session_config_entry(key, value)
        graph = located_graph(bundle, spec.name, cpu=True)
        loaded = load_weights(self._ort, options, bundle, graph)
        try:
            session: Any = self._ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no base class but Exception
            raise BackendError(
                f"ONNX Runtime {self.version} cannot open graph {spec.name}: {one_line(error)}"
            ) from error
        del loaded
        check_border(spec.name, session, spec.inputs, spec.outputs)
        return session


class _Sessions(Executor):
    """Passes tensors from graph to graph by name; a tensor is dropped after its last reader."""

    def __init__(self, manifest: Manifest, sessions: Mapping[str, Any]) -> None:
        self._graphs = manifest.graphs
        self._sessions = dict(sessions)

    def run(
        self, frames: Array, graphs: int, outputs: Collection[str], exits: Sequence[ExitPoint] = ()
    ) -> ExecutorResult:
        """As `Executor.run`; the steps that are timed are the graphs.

        Raises:
            BackendError: a graph failed.
        """
        order = self._graphs[:graphs]
        # After its last reader a tensor is dropped: a batch of images for every expert is most of the memory.
        last_use = {tensor.name: number for number, graph in enumerate(order) for tensor in graph.inputs}
        known: dict[str, Array] = {FRAME: frames}
        tensors: dict[str, Array] = {}
        times_ms: dict[str, float] = {}
        running = np.arange(len(frames))  # images that have not stopped, by row
        graphs_run = np.full(len(frames), graphs)
        made: dict[str, Array] = {}
        for span in split(graphs, exits):
            for number, graph in enumerate(order[span.first : span.last], span.first):
                start = time.perf_counter()
                made = self._run(graph, known)
                times_ms[graph.name] = (time.perf_counter() - start) * 1e3
                # Rows leave what later graphs read; what is wanted keeps the rows that it was made with.
                tensors |= {name: tensor for name, tensor in made.items() if name in outputs}
                known = {n: tensor for n, tensor in (known | made).items() if last_use.get(n, -1) > number}
            if span.point is None:
                break
            stops = span.point.stops(made[span.point.answer])
            graphs_run[running[stops]] = span.last
            running = running[~stops]
            if not len(running):
                break
            if stops.any():
                known = {name: tensor[~stops] for name, tensor in known.items()}
        step_graphs = {graph.name: number for number, graph in enumerate(order)}
        return ExecutorResult(tensors, times_ms, graphs_run, step_graphs)

    def _run(self, graph: GraphSpec, known: Mapping[str, Array]) -> dict[str, Array]:
        names = [tensor.name for tensor in graph.outputs]
        try:
            values = self._sessions[graph.name].run(names, {tensor.name: known[tensor.name] for tensor in graph.inputs})
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in graph {graph.name}: {one_line(error)}") from error
        return dict(zip(names, values, strict=True))

    def close(self) -> None:
        """Release every session."""
        self._sessions.clear()
