"""ONNX Runtime on the CPU.

The graphs stay small: their weights are read by ONNX Runtime from the bundle itself. Each graph's references to
`<stage>.weights` are pointed at the bundle file and the place of that entry in it, so ONNX Runtime maps them as it maps
an ordinary external-data file. (`add_external_initializers` and `add_external_initializers_from_files_in_memory` take
mapped memory too, but copy it while a session opens: measured with 1.31, 432 MB of convolution weights peak at 1,468 MB
that way and at 604 MB this way.)
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mge_runtime.backends.base import Backend, Buffer, StageRunner, Streams
from mge_runtime.bundle.layout import stage_graph, stage_weights
from mge_runtime.bundle.onnx_graph import relocate
from mge_runtime.cpus import cpu_count
from mge_runtime.errors import BackendError, BundleError
from mge_runtime.spec import StageSpec

if TYPE_CHECKING:
    from mge_runtime.backends.base import Array
    from mge_runtime.bundle import Bundle

__all__ = ["OnnxRuntimeBackend"]

# The first release with `session.model_external_initializers_file_folder_path` (microsoft/onnxruntime #23557).
OLDEST = (1, 22)
_ERRORS_ALONE = 3  # log severity
_MOST_STREAMS = 8  # each keeps activations of its own: with "auto", memory must not grow with the number of processors
_INSTALL = 'pip install "mge[cpu]"'


class OnnxRuntimeBackend(Backend):
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
        self._ort = _import()
        self.version: str = self._ort.__version__
        self.threads = cpu_count() if threads is None else threads
        self.streams = min(self.threads, _MOST_STREAMS) if streams == "auto" else streams

    def open_stages(self, bundle: Bundle) -> dict[str, StageRunner]:
        """Open a session for each stage; the weights are hashed in another thread meanwhile.

        Raises:
            BundleError: an entry is damaged, or the file was replaced meanwhile.
            BackendError: ONNX Runtime cannot run a stage.
        """
        stages = bundle.manifest.stages
        weights = [stage_weights(s.name) for s in stages if stage_weights(s.name) in bundle.sizes]
        with bundle.verifying(weights):
            runners: dict[str, StageRunner] = {stage.name: self._open(bundle, stage) for stage in stages}
        if not bundle.in_place():
            raise BundleError(f"{bundle.path} was replaced while it was being opened; open it again")
        return runners

    def upload(self, array: Array) -> Buffer:
        """The array itself."""
        return array

    def download(self, buffer: Buffer) -> Array:
        """The buffer itself."""
        return buffer

    def synchronize(self) -> None:
        """Nothing to wait for: sessions return when they are done."""

    def _open(self, bundle: Bundle, stage: StageSpec) -> StageRunner:
        options = self._ort.SessionOptions()
        # A session's threads are the one that calls and a pool of the others; all calls share the pool.
        options.intra_op_num_threads = max(1, self.threads - self.streams + 1)
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ALONE
        # The stages run in turn, each with threads of its own: those of the last must not spin while the next computes.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        graph = bundle.read(stage_graph(stage.name))
        if stage_weights(stage.name) in bundle.sizes:
            region = bundle.region(stage_weights(stage.name))
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(region.path.parent)
            )
            location, start, size = region.path.name, region.offset, region.size
        else:
            location, start, size = "", 0, 0
        graph = relocate(graph, expected=f"{stage.name}.weights", size=size, location=location, start=start)
        try:
            session = self._ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no base class but Exception
            raise BackendError(f"ONNX Runtime {self.version} cannot open stage {stage.name}: {_line(error)}") from error
        _check_border(stage, session)
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
            raise BackendError(f"ONNX Runtime failed in stage {self._name}: {_line(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        self._session = None


def _import() -> Any:
    try:
        module: Any = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise BackendError(f"onnxruntime cannot be imported: {error}; install it again: {_INSTALL}") from error
        raise BackendError(f"the backend onnxruntime needs the module onnxruntime: {_INSTALL}") from error
    except ImportError as error:
        raise BackendError(f"onnxruntime cannot be imported: {_line(error)}; install it again: {_INSTALL}") from error
    found = tuple(int(part) for part in module.__version__.split(".")[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendError(f"onnxruntime {module.__version__} is too old; expected {oldest} or newer: {_INSTALL}")
    return module


def _check_border(stage: StageSpec, session: Any) -> None:
    """Names at the graph's border must be those of the manifest; types and shapes are ONNX Runtime's to check."""
    for role, nodes, tensors in (
        ("inputs", session.get_inputs(), stage.inputs),
        ("outputs", session.get_outputs(), stage.outputs),
    ):
        found, expected = sorted(node.name for node in nodes), sorted(tensor.name for tensor in tensors)
        if found != expected:
            raise BundleError(
                f"the graph of stage {stage.name} has the {role} {found}; the manifest says {expected}: export it again"
            )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
