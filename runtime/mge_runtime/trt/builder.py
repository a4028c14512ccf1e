"""Build one graph's engine from its ONNX bytes, with `tensorrt` 10.3 to 11 or with `tensorrt_rtx`. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mge_runtime.backends.base import Found, check_tensors
from mge_runtime.errors import BuildError, one_line
from mge_runtime.fields import JsonValue
from mge_runtime.manifest import GraphSpec
from mge_runtime.trt.attest import Counts, attest_engine, attest_network
from mge_runtime.trt.target import BatchRange
from mge_runtime.trt.vendor import Api, Vendor, dtype_name, sizes

if TYPE_CHECKING:
    import tensorrt as trt


Progress = Callable[[float, str], bool]  # share done in [0, 1] and the phase's name -> whether to go on


@dataclass(frozen=True)
class BuildOptions:
    """How to build."""

    batch: BatchRange = field(default_factory=BatchRange)
    optimization_level: int | None = None  # 0 (quick build) to 5 (quick engine); None: the library's default
    workspace: int | None = None  # bytes that a layer may use beside its tensors; None: all of the device's


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine."""

    data: memoryview
    attested: str  # "network", or "engine" where the engine itself was read back; "no" where the plan names no type
    layers: Counts  # layer type -> floating type -> layers, of what was attested
    scratch: int | None  # bytes of device memory for activations, at the largest batch; None: known on the device alone
    timing: bytes  # kernels that TensorRT measured, for the next graph; empty for TensorRT-RTX, which measures nothing


class Parsed(NamedTuple):
    """A network with what must live as long as it does."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser  # owns the weights that the network points to


def build_engine(
    vendor: Vendor,
    spec: GraphSpec,
    model: bytes,
    path: Path,
    *,
    plan: Mapping[str, JsonValue],
    capabilities: Sequence[str] | None,
    options: BuildOptions,
    timing: bytes = b"",
    progress: Progress = lambda _share, _phase: True,
) -> BuiltEngine:
    """Build a graph's engine.

    Args:
        vendor: the library.
        spec: inputs and outputs of the graph.
        model: serialized ModelProto.
        path: a file beside which the graph's external data lies.
        plan: precision plan of the graph, `Manifest.precision`.
        capabilities: build ahead of time for these, such as ("sm86", "sm120"), TensorRT-RTX alone; None: for the
            current CUDA device, and read the engine back there.
        options: batch range, effort, memory.
        timing: `BuiltEngine.timing` of an engine that was built before on this device, by this process.
        progress: is told of every step and may stop the build.

    Raises:
        BuildError: the graph cannot be parsed or built, is not of its plan's precision, or the build was stopped.
        BundleError: the graph has other inputs or outputs than the manifest says.
    """
    parsed = parse_graph(vendor, spec, model, path)
    layers = attest_network(spec.name, parsed.network, model, plan)
    config: Any = configure(vendor, parsed, options, capabilities)
    cache = None if vendor.is_rtx else config.create_timing_cache(timing)
    if cache is not None:
        config.set_timing_cache(cache, False)
    monitor: Any = _monitor(vendor.api, progress)
    config.progress_monitor = monitor
    host = parsed.builder.build_serialized_network(parsed.network, config)
    if monitor.error is not None:
        raise monitor.error
    said = vendor.messages.take()
    if host is None:  # pyright: ignore[reportUnnecessaryComparison] - the stubs do not know failure
        raise BuildError(
            f"{vendor.name} {vendor.version} cannot build graph {spec.name}: {said or 'it gave no reason'}"
        )
    data = memoryview(host)  # pyright: ignore[reportArgumentType] - IHostMemory is a buffer
    attested, scratch = "network" if plan.get("type") else "no", None
    if capabilities is None:
        information, scratch = _inspect(vendor, spec.name, data)
        if (read := attest_engine(spec.name, information, plan)) is not None and plan.get("type"):
            attested, layers = "engine", read
    measured = b"" if cache is None else bytes(cache.serialize())
    return BuiltEngine(data, attested, layers, scratch, measured)


def parse_graph(vendor: Vendor, spec: GraphSpec, model: bytes, path: Path) -> Parsed:
    """Parse a graph, as for `build_engine`, and check the network's inputs and outputs against the specification.

    Raises:
        BuildError: an operator is not supported; the message names the node.
        BundleError: inputs or outputs differ.
    """
    api, messages = vendor.api, vendor.messages
    messages.take()
    builder = api.Builder(vendor.logger)
    # Required on 10; 11 knows no other networks and ignores it.
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, vendor.logger)
    if not parser.parse(model, path=str(path)):  # pyright: ignore[reportUnknownMemberType] - a buffer
        logged = messages.take()
        # The parser's own errors, each with its node; the log repeats them in pieces.
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = "; ".join(
            one_line(f"node {e.node_name()!r} ({e.node_operator()}): {e.code().name}, {e.desc()}") for e in errors
        )
        raise BuildError(
            f"{vendor.name} {vendor.version} cannot parse graph {spec.name}: {reasons or logged or 'it gave no reason'}"
        )
    messages.take()  # what it warned of, and parsed all the same
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    check_tensors(spec, _found(inputs), _found(outputs), "export it again")
    return Parsed(builder, network, parser)


def _found(tensors: Sequence[trt.ITensor]) -> Found:
    return {t.name: (dtype_name(t.dtype), [None if size < 0 else size for size in sizes(t.shape)]) for t in tensors}


def configure(
    vendor: Vendor, parsed: Parsed, options: BuildOptions, capabilities: Sequence[str] | None
) -> trt.IBuilderConfig:
    """The library's settings for a build; the arguments are those of `build_engine`."""
    api = vendor.api
    config = parsed.builder.create_builder_config()
    config.clear_flag(api.BuilderFlag.TF32)  # on by default: FP32 would mean ten bits of mantissa
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # lets the inspector read types back
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, options.workspace)
    config.add_optimization_profile(profile(parsed, options.batch))
    if vendor.is_rtx:
        rtx: Any = api  # TensorRT has none of the following
        rtx_config: Any = config
        names = ["CURRENT"] if capabilities is None else [name.upper() for name in capabilities]
        rtx_config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            rtx_config.set_compute_capability(getattr(rtx.ComputeCapability, name), index)
        # Memory that the runtime would allocate by itself cannot be captured in a CUDA graph.
        config.set_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
    return config


def profile(parsed: Parsed, batch: BatchRange) -> trt.IOptimizationProfile:
    """The batch sizes that an engine is built for, as TensorRT is told them."""
    made = parsed.builder.create_optimization_profile()
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        least, usual, most = ((size, *sizes(tensor.shape)[1:]) for size in batch.sizes)
        made.set_shape(tensor.name, least, usual, most)  # pyright: ignore[reportArgumentType] - tuples are taken
    return made


def _monitor(api: Api, progress: Progress) -> trt.IProgressMonitor:
    """A monitor that tells `progress` of every step; TensorRT asks after each of them whether to go on.

    Phases nest, and each has its share of one step of its parent; the share done never falls. An exception that
    `progress` raises stops the build and is kept as `error`: it must not pass through TensorRT.
    """

    class Monitor(api.IProgressMonitor):
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)  # the binding wants its own, not super()'s
            self.error: BaseException | None = None
            # Phase -> where its next step starts, a step's width, where the phase ends.
            self._phases: dict[str, tuple[float, float, float]] = {}
            self._share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            start, width, _ = self._phases.get(parent_phase or "", (0.0, 1.0, 1.0))
            self._phases[phase_name] = start, width / max(num_steps, 1), start + width
            self._tell(start, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            del step  # steps are counted, so their order does not matter
            start, width, end = self._phases.get(phase_name, (self._share, 0.0, self._share))
            self._phases[phase_name] = start + width, width, end
            return self._tell(start + width, phase_name)

        def phase_finish(self, phase_name: str) -> None:
            # Two phases of one name may run at once: the second to finish finds none, and nothing may be raised here.
            self._tell(self._phases.pop(phase_name, (0.0, 0.0, 0.0))[2], phase_name)

        def _tell(self, share: float, phase: str) -> bool:
            self._share = min(1.0, max(self._share, share))
            if self.error is None:
                try:
                    if progress(self._share, phase):
                        return True
                except BaseException as error:
                    self.error = error
            return False

    return Monitor()


def _inspect(vendor: Vendor, graph: str, data: memoryview) -> tuple[str, int]:
    """What the engine says of its layers, as JSON, and the memory it wants."""
    runtime = vendor.api.Runtime(vendor.logger)
    engine = runtime.deserialize_cuda_engine(data)  # pyright: ignore[reportUnknownMemberType] - a buffer
    if engine is None:  # pyright: ignore[reportUnnecessaryComparison] - the stubs do not know failure
        raise BuildError(f"the engine of graph {graph} cannot be opened after its build: {vendor.messages.take()}")
    information = engine.create_engine_inspector().get_engine_information(vendor.api.LayerInformationFormat.JSON)
    return information, engine.get_device_memory_size_for_profile_v2(0)
