"""TensorRT and TensorRT-RTX: one engine for each graph, all on one stream, over memory of the device layer.

One implementation for `tensorrt` 10.3 to 11.x and `tensorrt_rtx`. Engines that run in turn share one piece of scratch
memory: contexts are created without memory of their own and given the chain's.

Experimental: not yet run on a GPU by this project.
"""

# TensorRT's stubs leave some types open; names and arguments are checked all the same.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

from mge_runtime.backends.base import Executor, Found, check_tensors
from mge_runtime.backends.choice import Choice, device_index
from mge_runtime.device.cuda import CudaDevice
from mge_runtime.device.executor import DeviceExecutor
from mge_runtime.device.program import Addresses, Launch, Unit, shape_of
from mge_runtime.errors import BackendError, MGEError, brief
from mge_runtime.manifest import GraphSpec
from mge_runtime.trt.engines import why_not
from mge_runtime.trt.target import build_command
from mge_runtime.trt.vendor import Vendor, dtype_name, load_vendor, sizes

if TYPE_CHECKING:
    import tensorrt as trt

    from mge_runtime.bundle import Bundle
    from mge_runtime.device.base import Device, Stream


def open_tensorrt_chain(choice: Choice, bundle: Bundle, *, cuda_graphs: bool = True) -> Executor:
    """Open a chain of engines on a GPU; each is checked against its hash before and the manifest after it is read.

    Args:
        choice: one that names engines.
        bundle: what it was made for, open.
        cuda_graphs: whether to capture CUDA graphs.

    Raises:
        BackendError: the library is missing or broken, the engines are not for it, or it refuses one.
        BundleError: an engine is damaged, or has other inputs or outputs than the manifest says.
    """
    machine, gpu, engines = choice.machine, choice.gpu, choice.engines
    assert gpu is not None and engines is not None  # noqa: S101, PT018 - `choose` names both
    vendor = load_vendor(choice.backend)
    # Package metadata chose the engines; the library itself has the last word, before anything is deserialized.
    here = replace(machine, libraries={**machine.libraries, vendor.name: vendor.version})
    if problem := why_not(engines, here, gpu, bundle.manifest):
        command = build_command(choice.backend, machine, gpu, bundle.path)
        raise BackendError(f"{engines.target} {engines.place} {problem}; build again: {command}")

    def open_units(device: Device, stream: Stream) -> Generator[Unit]:  # noqa: ARG001 - each launch is told
        runtime = vendor.api.Runtime(vendor.logger)
        for spec in bundle.manifest.graphs:
            yield TensorRTGraph(vendor, runtime, engines.plan(spec.name), spec)

    executor = DeviceExecutor(
        bundle.manifest, CudaDevice(device_index(choice.device)), open_units, cuda_graphs=cuda_graphs
    )
    executor.maps_weights = False  # engines are copied to the device
    return executor


class TensorRTGraph(Unit):
    """One engine; its bytes are not needed once it is open, the runtime that deserialized it is kept alive.

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
        inputs, outputs = _tensors(self._engine, "INPUT"), _tensors(self._engine, "OUTPUT")
        check_tensors(self.spec, inputs, outputs, "build its engines again with mge-build")
        count = self._engine.num_optimization_profiles
        self._profiles = [_batch_range(self._engine, self.spec, index) for index in range(count)]
        self.min_batch = min(least for least, _ in self._profiles)
        self.max_batch = max(most for _, most in self._profiles)
        sizes = [self._engine.get_device_memory_size_for_profile_v2(index) for index in range(count)]
        self.scratch_bytes = max(1, *sizes)  # an engine that needs none is given an address all the same
        if self.vendor.is_rtx:
            self._configure_rtx(self._engine)

    def prepare(self, addresses: Addresses, stream: Stream) -> Launch:
        """Create a context for a batch size, over the chain's scratch memory."""
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
            shape = shape_of(tensor, batch)
            self.check(context.set_input_shape(tensor.name, shape), f"the shape {list(shape)} of {tensor.name}")
        if missing := context.infer_shapes():
            self.fail(f"cannot infer shapes for a batch of {batch} without {missing}")
        for tensor in self.spec.outputs:
            found = sizes(context.get_tensor_shape(tensor.name))
            if found != shape_of(tensor, batch):
                self.fail(f"has the output {tensor.name} as {list(found)}; expected {list(shape_of(tensor, batch))}")
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
        """Raise BackendError where a call returned False; every call that returns True or False passes here."""
        if not done:
            self.fail(f"refuses {what}")

    def fail(self, problem: str) -> NoReturn:
        """Raise BackendError, with what TensorRT said."""
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
            self.fail(f"failed: {brief(error)}")


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


def _tensors(engine: trt.ICudaEngine, mode: str) -> Found:
    """The inputs or the outputs of an engine; tensors that must lie on the host are of no type that we know."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        if engine.get_tensor_mode(name).name == mode:
            dtype, place = dtype_name(engine.get_tensor_dtype(name)), engine.get_tensor_location(name).name
            found[name] = dtype if place == "DEVICE" else f"{dtype} on the host", sizes(engine.get_tensor_shape(name))
    return found


def _batch_range(engine: trt.ICudaEngine, spec: GraphSpec, profile: int) -> tuple[int, int]:
    """The batch sizes that one profile covers."""
    ranges = [engine.get_tensor_profile_shape(tensor.name, profile) for tensor in spec.inputs]
    return max(shapes[0][0] for shapes in ranges), min(shapes[2][0] for shapes in ranges)
