"""What every backend on ONNX Runtime needs: the module, weights read from the bundle in place, one-line errors.

The graphs stay small: their weights are read by ONNX Runtime from the bundle itself. Each graph's references to
`<graph>.weights` are pointed at the bundle file and the place of that entry in it, so ONNX Runtime maps them as it maps
an ordinary external-data file. A bundle that is overwritten in place changes the weights of sessions that are open;
with `mmap=False` they are loaded instead (`load_weights`; docs/adr/0004 has the cost).
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.bundle.archive import weights_entry
from mge_runtime.bundle.onnx_graph import external_tensors
from mge_runtime.errors import BackendError, BundleError
from mge_runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle

__all__ = [
    "check_border",
    "import_onnxruntime",
    "load_onnxruntime",
    "load_weights",
    "log_severity",
    "one_line",
    "session_options",
    "weights_checked",
]

# The first release with `session.model_external_initializers_file_folder_path` (microsoft/onnxruntime #23557).
OLDEST = (1, 22)
# NumPy's name of TensorProto.DataType, of those that `mge-export` writes.
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16"}
_ORT_TYPES = {name: f"tensor({name})" for name in _DTYPES.values()} | {"float32": "tensor(float)"}


def load_onnxruntime(module: str = "onnxruntime") -> Any:
    """Import ONNX Runtime: the one place that does, since some things must be said before and directly after.

    From 1.29 on it sends telemetry, and writes an identifier and a queue below HOME, as soon as it is loaded. Unless
    the environment already says something else, `ORT_DISABLE_TELEMETRY=1` keeps it from all of that.

    Args:
        module: "onnxruntime", or one of its submodules.

    Raises:
        ImportError: it is missing or broken.
    """
    off = os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1") == "1"
    first = "onnxruntime" not in sys.modules
    ort: Any = importlib.import_module("onnxruntime")
    if first:  # else it is the program's own, as the program set it up
        ort.set_default_logger_severity(log_severity())
        if off:
            ort.disable_telemetry_events()  # on Windows the variable is not read
    return ort if module == "onnxruntime" else importlib.import_module(module)


def log_severity() -> int:
    """From which severity on ONNX Runtime's C++ code writes to stderr, past Python: 4, fatal errors alone.

    What fails is raised as an error of ours, and its warnings are about choices that a user did not make. The
    environment variable MGE_VERBOSE asks for more: 1 for warnings (2) and errors (3), 2 for everything (0).
    """
    return {"1": 2, "2": 0}.get(os.environ.get("MGE_VERBOSE", ""), 4)


def import_onnxruntime(install: str = 'pip install "mge[cpu]"') -> Any:
    """The module `onnxruntime`.

    Args:
        install: the command that installs it.

    Raises:
        BackendError: it is missing, broken or too old.
    """
    try:
        module = load_onnxruntime()
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise BackendError(f"onnxruntime cannot be imported: {error}; install it again: {install}") from error
        raise BackendError(f"the backend onnxruntime needs the module onnxruntime: {install}") from error
    except ImportError as error:
        raise BackendError(f"onnxruntime cannot be imported: {one_line(error)}; install it again: {install}") from error
    found = tuple(int(part) for part in module.__version__.split(".")[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendError(f"onnxruntime {module.__version__} is too old; expected {oldest} or newer: {install}")
    return module


def session_options(ort: Any, bundle: Bundle) -> Any:
    """Session options under which a `located_graph` finds its weights; it computes in one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = log_severity()
    folder = str(bundle.path.parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return options


def load_weights(ort: Any, options: Any, bundle: Bundle, graph: bytes) -> object:
    """Where a bundle's weights may not be mapped, read those of a `located_graph` into memory for its session.

    Args:
        ort: the module `onnxruntime`.
        options: of the session that opens the graph.
        bundle: where the weights lie.
        graph: as the session opens it.

    Returns:
        What must be kept until the session is open, which then has copies of its own.

    Raises:
        BundleError: the graph is damaged, or the file was cut short meanwhile.
    """
    if bundle.maps_weights:
        return None
    values: dict[str, Any] = {}
    for tensor in external_tensors(graph):
        array = np.fromfile(bundle.path, np.uint8, tensor.length, offset=tensor.offset)
        dtype, dims = _DTYPES.get(tensor.data_type), tensor.dims
        if dtype is None or array.nbytes != math.prod(dims) * np.dtype(dtype).itemsize:
            raise BundleError(
                f"{bundle.path}: weight {tensor.name!r} has {array.nbytes} bytes for a tensor of ONNX type "
                f"{tensor.data_type} and shape {list(dims)}; it was changed after it was written: export it again"
            )
        values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array.view(dtype).reshape(dims))
    options.add_external_initializers(list(values), list(values.values()))
    return values


@contextmanager
def weights_checked(bundle: Bundle) -> Generator[None]:
    """Open sessions inside this block: the weights are held by their CRC-32 in other threads meanwhile.

    Raises:
        BundleError: an entry is damaged, or the file was replaced meanwhile.
    """
    names = [weights_entry(graph.name) for graph in bundle.manifest.graphs]
    with bundle.verifying(name for name in names if name in bundle.sizes):
        yield
    if not bundle.in_place():
        raise BundleError(f"{bundle.path} was replaced while it was being opened; open it again")


def check_border(what: str, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Names, types and shapes at the graph's border must be those of the manifest.

    Raises:
        BundleError: they are not.
    """
    for role, nodes, tensors in (
        ("inputs", session.get_inputs(), inputs),
        ("outputs", session.get_outputs(), outputs),
    ):
        found, expected = {node.name: node for node in nodes}, sorted(tensor.name for tensor in tensors)
        if sorted(found) != expected:
            raise BundleError(
                f"the graph of {what} has the {role} {sorted(found)}; the manifest says {expected}: export it again"
            )
        for tensor in tensors:
            kind, shape = found[tensor.name].type, found[tensor.name].shape
            # The first axis is the batch; others may have no size in the graph, and then have it when it runs.
            fits = len(shape) == len(tensor.shape) and all(
                axis == size or not isinstance(axis, int)
                for axis, size in zip(shape[1:], tensor.shape[1:], strict=True)
            )
            if kind != _ORT_TYPES.get(tensor.dtype) or not fits:
                raise BundleError(
                    f"the graph of {what} has {tensor.name} as {kind} {shape}; the manifest says {tensor.dtype} "
                    f"{list(tensor.shape)}: export it again"
                )


def one_line(error: Exception) -> str:
    """An error of ONNX Runtime, which may span many lines, as one."""
    return " ".join(str(error).split())[:300]
