"""Load `tensorrt` or `tensorrt_rtx`: the versions that are served, the API as types, a logger that keeps errors."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol, cast

from mge_runtime.errors import BackendError
from mge_runtime.machine import Gpu, Machine, import_library, install_extra
from mge_runtime.trt.target import rtx_refusal

if TYPE_CHECKING:
    import tensorrt as trt


_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # `tensorrt.DataType` where it is not NumPy's
_KEPT = 50  # messages; a failing build can say thousands
_LONGEST = 400  # characters of one message that an error quotes
_JETPACK = "TensorRT comes with JetPack: sudo apt install nvidia-jetpack, in an environment with --system-site-packages"


class Api(Protocol):
    """What is used of the module `tensorrt` or `tensorrt_rtx`, with the types of TensorRT 10.13's stubs."""

    __version__: str
    Builder: type[trt.Builder]
    BuilderFlag: type[trt.BuilderFlag]
    DataType: type[trt.DataType]
    ExecutionContextAllocationStrategy: type[trt.ExecutionContextAllocationStrategy]
    ILogger: type[trt.ILogger]
    IProgressMonitor: type[trt.IProgressMonitor]
    LayerInformationFormat: type[trt.LayerInformationFormat]
    MemoryPoolType: type[trt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[trt.NetworkDefinitionCreationFlag]
    OnnxParser: type[trt.OnnxParser]
    ProfilingVerbosity: type[trt.ProfilingVerbosity]
    Runtime: type[trt.Runtime]
    TensorIOMode: type[trt.TensorIOMode]


@dataclass(frozen=True)
class Library:
    """One of the two libraries: how it is imported and installed, and which versions are served."""

    name: str  # as backends and targets call it
    module: str
    oldest: tuple[int, int]  # the first version that is served
    below: tuple[int, int]  # the first that is not
    install: str  # what to do where it is missing

    def refusal(self, version: str) -> str | None:
        """Why a version is not served; None: it is."""
        match = re.match(r"(\d+)\.(\d+)", version)
        if match is None:
            return f"{self.name} {version} has a version that cannot be read"
        if self.oldest <= (int(match[1]), int(match[2])) < self.below:
            return None
        oldest = ".".join(map(str, self.oldest))
        return f"{self.name} {version} is not served; expected {oldest} or newer, below {self.below[0]}: {self.install}"


LIBRARIES = {
    # 10.3 is JetPack 6's. 12 may change the rules again, as 11 did.
    "tensorrt": Library(
        "tensorrt", "tensorrt", (10, 3), (12, 0), f"{install_extra('tensorrt')} (on a Jetson it comes with JetPack)"
    ),
    "tensorrt-rtx": Library("tensorrt-rtx", "tensorrt_rtx", (1, 7), (2, 0), install_extra("rtx")),
}


class Messages:
    """What the library says: errors are kept for error messages, everything is passed on if wanted."""

    def __init__(self) -> None:
        self.kept: deque[str] = deque(maxlen=_KEPT)
        self.say: Callable[[str], None] | None = None  # shows a line; None: nobody looks

    def take(self) -> str:
        """The errors since the last call, as one line; empty if there were none."""
        lines = list(dict.fromkeys(self.kept))
        self.kept.clear()
        return "; ".join(line[:_LONGEST] for line in lines)


@dataclass(frozen=True)
class Vendor:
    """A loaded library."""

    name: str  # "tensorrt" or "tensorrt-rtx"
    version: str  # in full: "10.3.0.30"
    api: Api  # the module
    logger: trt.ILogger  # one for the process: TensorRT keeps the first it is given
    messages: Messages  # where `logger` writes

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which builds for compute capabilities that it names, without a GPU."""
        return self.name == "tensorrt-rtx"


@cache
def load_vendor(name: str) -> Vendor:
    """Import a library.

    Args:
        name: "tensorrt" or "tensorrt-rtx".

    Raises:
        BackendError: it is not installed, broken, or of a version that is not served.
    """
    library = LIBRARIES[name]
    api = cast("Api", import_library(library.module, library.install))
    if refusal := library.refusal(api.__version__):
        raise BackendError(refusal)
    messages = Messages()
    return Vendor(name, api.__version__, api, _logger(api, messages), messages)


def dtype_name(dtype: trt.DataType) -> str:
    """NumPy's name of a TensorRT type, or TensorRT's own where NumPy has none: "float16", "int64", "fp8"."""
    return _DTYPES.get(dtype.name, dtype.name.lower())


def sizes(dims: trt.Dims) -> tuple[int, ...]:
    """The axes of a shape, -1 for one that is open."""
    return tuple(dims[axis] for axis in range(len(dims)))


def library_refusal(name: str, machine: Machine, gpu: Gpu) -> str | None:
    """Why "tensorrt" or "tensorrt-rtx" can do nothing on a GPU of a machine, from its description; None: it can."""
    library = LIBRARIES[name]
    if name == "tensorrt-rtx" and (refusal := rtx_refusal(gpu, None)) is not None:
        return refusal
    install = _JETPACK if name == "tensorrt" and machine.is_jetson else library.install
    return machine.missing(name, install) or library.refusal(machine.libraries[name])


def _logger(api: Api, messages: Messages) -> trt.ILogger:
    error, warning = api.ILogger.ERROR, api.ILogger.WARNING

    class Logger(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)  # the binding wants its own, not super()'s

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            line = " ".join(msg.split())
            if int(severity) <= int(error):  # the smaller the number, the worse
                messages.kept.append(line)
            if messages.say is not None:
                messages.say(f"{'warning: ' if int(severity) == int(warning) else ''}{line}")

    return Logger()
