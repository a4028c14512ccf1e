"""One graph as an engine of TensorRT: opened, checked against the manifest, bound to addresses, enqueued."""

# TensorRT's stubs leave some types open; names and arguments are checked all the same.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

from mge_runtime.device.unit import Addresses, Launch, Unit
from mge_runtime.errors import BackendError, BundleError, MGEError
from mge_runtime.manifest import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt as trt

    from mge_runtime.device.base import Stream
    from mge_runtime.trt.vendor import Vendor

__all__ = ["DTYPES", "TensorRTGraph"]

# `tensorrt.DataType` by NumPy's name.
DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "uint8": "UINT8",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
}


class TensorRTGraph(Unit):
    """One engine.

    Args:
        vendor: the library.
        runtime: deserialises; kept alive with the engine.
        plan: the engine's bytes, mapped; not needed afterwards.
        spec: what the manifest says of it.

    Raises:
        BackendError: TensorRT refuses the engine.
        BundleError: it has other inputs or outputs than the manifest says.
    """

    def __init__(self, vendor: Vendor, runtime: trt.Runtime, plan: memoryview, spec: GraphSpec) -> None:
        self.name = spec.name
        self.spec = spec
        self.vendor = vendor
        self._runtime: trt.Runtime | None = runtime
        self._config: Any = None  # TensorRT-RTX's settings for contexts, and its compiled kernels
        self._cache: Any = None
        self._profiles: list[tuple[int, int]] = []
        vendor.messages.take()  # what was said before is not about this engine
        self._engine = cast("trt.ICudaEngine | None", runtime.deserialize_cuda_engine(plan))
        try:
            with self.translated():
                self._open()
        except BaseException:
            self.close()  # the error's traceback would keep the engine's memory
            raise

    def _open(self) -> None:
        if self._engine is None:
            self.fail("does not accept its engine; build it again with mge-build")
        _check_border(self._engine, self.spec)
        count = self._engine.num_optimization_profiles
        self._profiles = [_batch_range(self._engine, self.spec, index) for index in range(count)]
        self.min_batch = min(least for least, _ in self._profiles)
        self.max_batch = max(most for _, most in self._profiles)
        sizes = [self._engine.get_device_memory_size_for_profile_v2(index) for index in range(count)]
        self.scratch_bytes = max(1, *sizes)  # an engine that needs none is given an address all the same
        if self.vendor.is_rtx:
            self._configure_rtx(self._engine)

    def prepare(self, addresses: Addresses, stream: Stream) -> Launch:
        """Create a context for a batch size, over the arena's memory.

        Raises:
            BackendError: the engine was not built for it, or TensorRT refuses a shape or an address.
        """
        batch = addresses.batch
        fitting = [index for index, (least, most) in enumerate(self._profiles) if least <= batch <= most]
        if not fitting:
            self.fail(f"has no profile for a batch of {batch}, only {self._profiles}; build it with mge-build --batch")
        with self.translated():
            return self._launch(addresses, stream, fitting[0])

    def _launch(self, addresses: Addresses, stream: Stream, profile: int) -> Launch:
        batch, context = addresses.batch, self._context()
        if context.active_optimization_profile != profile:
            self.check(context.set_optimization_profile_async(profile, stream.handle), f"profile {profile}")
            stream.synchronize()
        context.set_device_memory(addresses.scratch, addresses.scratch_bytes)
        for tensor in self.spec.inputs:
            shape = _shape(tensor, batch)
            self.check(context.set_input_shape(tensor.name, shape), f"the shape {list(shape)} of {tensor.name}")
        if missing := context.infer_shapes():
            self.fail(f"cannot infer shapes for a batch of {batch} without {missing}")
        for tensor in self.spec.outputs:
            found = _axes(context.get_tensor_shape(tensor.name))
            if found != _shape(tensor, batch):
                self.fail(f"puts out {tensor.name} as {list(found)}; expected {list(_shape(tensor, batch))}")
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            address = addresses.tensors[tensor.name]
            self.check(context.set_tensor_address(tensor.name, address), f"the address of {tensor.name}")
        return _TensorRTLaunch(self, context)

    def close(self) -> None:
        """Release the engine."""
        # In the order in which TensorRT wants them gone.
        self._config = None
        self._cache = None
        self._engine = None
        self._runtime = None

    def check(self, done: bool, what: str) -> None:
        """Every call that answers with True or False passes here.

        Raises:
            BackendError: it answered False; the message has what TensorRT said.
        """
        if not done:
            self.fail(f"refuses {what}")

    def fail(self, problem: str) -> NoReturn:
        """Raise.

        Raises:
            BackendError: always, with what TensorRT said.
        """
        said = self.vendor.messages.take()
        raise BackendError(
            f"{self.vendor.name} {self.vendor.version}: graph {self.name} {problem}{f' ({said})' if said else ''}"
        )

    def _context(self) -> trt.IExecutionContext:
        engine = self._engine
        if engine is None:
            self.fail("is closed")
        strategy = self.vendor.api.ExecutionContextAllocationStrategy.USER_MANAGED
        made = engine.create_execution_context(strategy if self._config is None else self._config)
        context = cast("trt.IExecutionContext | None", made)
        if context is None:
            self.fail("gets no execution context; is there memory left on the GPU?")
        return context

    def _configure_rtx(self, engine: trt.ICudaEngine) -> None:
        """What TensorRT-RTX, which compiles kernels on the device, is told; contexts of all batch sizes share it."""
        api: Any = self.vendor.api
        self._config = config = cast("Any", engine.create_runtime_config())
        config.set_execution_context_allocation_strategy(api.ExecutionContextAllocationStrategy.USER_MANAGED)
        # A batch size keeps its shapes: compile for them at once, so that the graph captured at the second run holds
        # the final kernels. Its own CUDA graphs stay off, since the chain captures graphs of its own.
        config.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = api.CudaGraphStrategy.DISABLED
        # One context's kernels serve the next. Kept here: contexts use it, and nothing says that they keep it alive.
        self._cache = config.create_runtime_cache()
        self.check(config.set_runtime_cache(self._cache) is not False, "a cache of kernels")

    @contextmanager
    def translated(self) -> Generator[None]:
        """Turn what the binding raises (wrong types, inference that fails) into one line."""
        try:
            yield
        except MGEError:
            raise
        except Exception as error:
            self.fail(f"failed: {' '.join(str(error).split())[:300] or type(error).__name__}")


class _TensorRTLaunch(Launch):
    def __init__(self, owner: TensorRTGraph, context: trt.IExecutionContext) -> None:
        self._owner = owner
        self._context: trt.IExecutionContext | None = context

    def enqueue(self, stream: Stream) -> None:
        if self._context is None:
            self._owner.fail("is closed")
        self._owner.check(self._context.execute_async_v3(stream.handle), "to run")

    def why_not_captured(self, stream: Stream) -> str | None:
        ask: Any = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX alone has it
        if ask is None or ask(stream.handle):
            return None
        return f"{self._owner.vendor.name} cannot capture graph {self._owner.name}"

    def close(self) -> None:
        self._context = None


def _check_border(engine: trt.ICudaEngine, spec: GraphSpec) -> None:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: (engine.get_tensor_mode(name).name, *_kind(engine, name)) for name in names}
    expected = {
        tensor.name: (mode, DTYPES[tensor.dtype], tuple(int(axis) for axis in tensor.shape[1:]), "DEVICE")
        for mode, tensors in (("INPUT", spec.inputs), ("OUTPUT", spec.outputs))
        for tensor in tensors
    }
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise BundleError(
                f"the engine of graph {spec.name} has tensor {name!r} as {found.get(name, 'none')}; the manifest says "
                f"{expected.get(name, 'none')}: build it again with mge-build"
            )


def _kind(engine: trt.ICudaEngine, name: str) -> tuple[str, tuple[int, ...], str]:
    """Type, shape without the batch, and where it must lie."""
    shape = _axes(engine.get_tensor_shape(name))
    return engine.get_tensor_dtype(name).name, shape[1:], engine.get_tensor_location(name).name


def _axes(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(dims[axis] for axis in range(len(dims)))


def _batch_range(engine: trt.ICudaEngine, spec: GraphSpec, profile: int) -> tuple[int, int]:
    """The batch sizes that one profile covers."""
    ranges = [engine.get_tensor_profile_shape(tensor.name, profile) for tensor in spec.inputs]
    return max(shapes[0][0] for shapes in ranges), min(shapes[2][0] for shapes in ranges)


def _shape(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    return (batch, *(int(axis) for axis in tensor.shape[1:]))
