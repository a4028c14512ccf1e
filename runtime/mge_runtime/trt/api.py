"""The part of TensorRT's Python API that is used here, as types.

`tensorrt` and `tensorrt_rtx` are loaded by name at run time; this protocol gives both the types of `tensorrt`'s stubs,
so that a type checker holds every call against TensorRT 10.13. `tests/runtime/test_trt_contract.py` holds the same
names against the modules that can be installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Api"]


class Api(Protocol):
    """The module `tensorrt`, or `tensorrt_rtx`."""

    __version__: str

    # Classes and enumerations keep the names that TensorRT gave them.
    @property
    def Builder(self) -> type[trt.Builder]: ...  # noqa: D102, N802
    @property
    def BuilderFlag(self) -> type[trt.BuilderFlag]: ...  # noqa: D102, N802
    @property
    def DataType(self) -> type[trt.DataType]: ...  # noqa: D102, N802
    @property
    def ExecutionContextAllocationStrategy(self) -> type[trt.ExecutionContextAllocationStrategy]: ...  # noqa: D102, N802
    @property
    def ILogger(self) -> type[trt.ILogger]: ...  # noqa: D102, N802
    @property
    def IProgressMonitor(self) -> type[trt.IProgressMonitor]: ...  # noqa: D102, N802
    @property
    def LayerInformationFormat(self) -> type[trt.LayerInformationFormat]: ...  # noqa: D102, N802
    @property
    def LayerType(self) -> type[trt.LayerType]: ...  # noqa: D102, N802
    @property
    def MemoryPoolType(self) -> type[trt.MemoryPoolType]: ...  # noqa: D102, N802
    @property
    def NetworkDefinitionCreationFlag(self) -> type[trt.NetworkDefinitionCreationFlag]: ...  # noqa: D102, N802
    @property
    def OnnxParser(self) -> type[trt.OnnxParser]: ...  # noqa: D102, N802
    @property
    def ProfilingVerbosity(self) -> type[trt.ProfilingVerbosity]: ...  # noqa: D102, N802
    @property
    def Runtime(self) -> type[trt.Runtime]: ...  # noqa: D102, N802
    @property
    def TensorIOMode(self) -> type[trt.TensorIOMode]: ...  # noqa: D102, N802


if TYPE_CHECKING:
    _: Api = trt
