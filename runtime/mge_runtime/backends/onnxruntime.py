"""ONNX Runtime: its import, the sessions of a bundle's graphs, and the chain on the CPU.

Sessions read their weights in place, from the bundle's file, or loaded with `mmap=False` (docs/adr/0004).
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.backends.base import Executor, ExecutorResult, Found, Streams, check_tensors, split
from mge_runtime.bundle.archive import weights_entry
from mge_runtime.bundle.onnx_graph import external_tensors, located_graph
from mge_runtime.errors import BackendError, BundleError, brief
from mge_runtime.machine import cpu_count, import_library, install_extra
from mge_runtime.manifest import FRAME

if TYPE_CHECKING:
    from mge_runtime.backends.base import Array
    from mge_runtime.bundle import Bundle
    from mge_runtime.calibrated import ExitPoint
    from mge_runtime.manifest import GraphSpec


_FOLDER = "session.model_external_initializers_file_folder_path"
_OLDEST = (1, 22)  # the first release that knows this entry (microsoft/onnxruntime #23557)
# NumPy's name of TensorProto.DataType, of those that `mge-export` writes.
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16"}
_TYPES = {f"tensor({name})": name for name in _DTYPES.values()} | {"tensor(float)": "float32"}
_MOST_STREAMS = 8  # each keeps activations of its own: with "auto", memory must not grow with the number of processors


def load_onnxruntime() -> Any:
    """Import ONNX Runtime: the one place that does, since some things must be said before and directly after.

    From 1.29 on it sends telemetry, and writes an identifier and a queue below HOME, as soon as it is loaded. Unless
    the environment already says something else, `ORT_DISABLE_TELEMETRY=1` keeps it from all of that.

    Raises:
        ImportError: it is missing or broken.
    """
    off = os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1") == "1"
    first = "onnxruntime" not in sys.modules
    ort: Any = importlib.import_module("onnxruntime")
    if first:  # else it is the program's own, as the program set it up
        ort.set_default_logger_severity(_log_severity())
        if off:
            ort.disable_telemetry_events()  # on Windows the variable is not read
    return ort


def _log_severity() -> int:
    """From which severity on ONNX Runtime's C++ code writes to stderr, past Python: 4, fatal errors alone.

    What fails is raised as an error of ours, and its warnings are about choices that a user did not make. The
    environment variable MGE_VERBOSE asks for more: 1 for warnings (2) and errors (3), 2 for everything (0).
    """
    return {"1": 2, "2": 0}.get(os.environ.get("MGE_VERBOSE", ""), 4)


def import_onnxruntime(extra: str = "cpu") -> Any:
    """The module `onnxruntime`.

    Args:
        extra: of mge, which brings it.

    Raises:
        BackendError: it is missing, broken or too old.
    """
    install = install_extra(extra)
    ort = import_library("onnxruntime", install, load=lambda _: load_onnxruntime())
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise BackendError(f"onnxruntime {ort.__version__} is too old; expected {oldest} or newer: {install}")
    return ort


def open_session(
    ort: Any,
    bundle: Bundle,
    spec: GraphSpec,
    providers: Sequence[Any],
    *,
    threads: int = 1,
    entries: Mapping[str, str] | None = None,
) -> Any:
    """Open a graph of a bundle; whoever calls checks the weights, with `weights_checked`.

    Args:
        ort: the module `onnxruntime`.
        bundle: where graph and weights lie.
        spec: what the manifest says of the graph.
        providers: of execution, best first; where the CPU's is the first, the graph's variant for CPUs is opened.
        threads: that compute on the CPU, the calling one included.
        entries: further ones of the session's configuration.

    Raises:
        BundleError: the graph is damaged, or has other inputs or outputs than the manifest says.
        BackendError: ONNX Runtime cannot open it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _log_severity()
    for key, value in {_FOLDER: str(bundle.path.parent), **(entries or {})}.items():
        options.add_session_config_entry(key, value)
    graph = located_graph(bundle, spec.name, cpu=providers[0] == "CPUExecutionProvider")
    loaded = {} if bundle.maps_weights else _loaded_weights(ort, bundle, graph)
    if loaded:  # the open session has copies of its own
        options.add_external_initializers(list(loaded), list(loaded.values()))
    try:
        session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors have no base class but Exception
        raise BackendError(f"ONNX Runtime {ort.__version__} cannot open graph {spec.name}: {brief(error)}") from error
    check_tensors(spec, _tensors(session.get_inputs()), _tensors(session.get_outputs()), "export the bundle again")
    return session


def _loaded_weights(ort: Any, bundle: Bundle, graph: bytes) -> dict[str, Any]:
    """The weights of a `located_graph` in memory, by name, where they may not be mapped."""
    values: dict[str, Any] = {}
    for tensor in external_tensors(graph):
        array = np.fromfile(bundle.path, np.uint8, tensor.length, offset=tensor.offset)
        dtype = _DTYPES.get(tensor.data_type)
        if dtype is None or array.nbytes != math.prod(tensor.dims) * np.dtype(dtype).itemsize:
            raise BundleError(
                f"{bundle.path}: weight {tensor.name!r} has {array.nbytes} bytes, which are no ONNX tensor of type "
                f"{tensor.data_type} and shape {list(tensor.dims)}: export the bundle again"
            )
        values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array.view(dtype).reshape(tensor.dims))
    return values


def _tensors(nodes: Sequence[Any]) -> Found:
    return {node.name: (_TYPES.get(str(node.type), str(node.type)), node.shape) for node in nodes}


@contextmanager
def weights_checked(bundle: Bundle) -> Generator[None]:
    """Open sessions inside this block: the weights are checked against their CRC-32 in other threads meanwhile.

    Raises:
        BundleError: an entry is damaged, or the file was replaced meanwhile.
    """
    names = [weights_entry(graph.name) for graph in bundle.manifest.graphs]
    with bundle.verifying([name for name in names if name in bundle.sizes]):
        yield
    if not bundle.in_place():
        raise BundleError(f"{bundle.path} was replaced while it was being opened; open it again")


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


class CpuExecutor(Executor):
    """Every graph as one session on the CPU; tensors pass from graph to graph by name.

    Args:
        bundle: what to open; its weights are checked in other threads meanwhile.
        threads: how many compute; None: as many as there are processors for this process.
        streams: runs in flight at once, each in the thread that calls it. The threads that are left over help whichever
            run has work to share. One image after the other shares its work badly (a layer is small, and each ends
            with a wait for all threads), so "auto" gives every thread an image of its own, up to 8.

    Raises:
        BackendError: ONNX Runtime is missing, broken or too old, or cannot open a graph.
        BundleError: an entry is damaged.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, streams: Streams = 1) -> None:
        ort = import_onnxruntime()
        threads = cpu_count() if threads is None else threads
        self.streams = min(threads, _MOST_STREAMS) if streams == "auto" else streams
        self._graphs = bundle.manifest.graphs
        # The graphs run in turn, each with threads of its own: those of the last must not spin while the next computes.
        entries = {"session.force_spinning_stop": "1", **(integer_entries() if bundle.manifest.is_int8 else {})}
        # A session's threads are the one that calls and a pool of the others; all calls share the pool.
        threads = max(1, threads - self.streams + 1)
        with weights_checked(bundle):
            self._sessions = {
                spec.name: open_session(ort, bundle, spec, ["CPUExecutionProvider"], threads=threads, entries=entries)
                for spec in self._graphs
            }

    def run(
        self, frames: Array, graphs: int, outputs: Collection[str], exits: Sequence[ExitPoint] = ()
    ) -> ExecutorResult:
        """As `Executor.run`; the steps that are timed are the graphs."""
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
            stops = span.point.stops(made[span.point.logits])
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
            raise BackendError(f"ONNX Runtime failed in graph {graph.name}: {brief(error)}") from error
        return dict(zip(names, values, strict=True))

    def close(self) -> None:
        """Release every session."""
        self._sessions.clear()
