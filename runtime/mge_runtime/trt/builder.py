"""Build one graph's engine from its ONNX bytes, with `tensorrt` 10.3 to 11 or with `tensorrt_rtx`. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mge_runtime.errors import BackendError, BuildError
from mge_runtime.fields import JsonValue
from mge_runtime.manifest import GraphSpec
from mge_runtime.trt.attest import attest_engine, attest_network
from mge_runtime.trt.batch import BatchRange
from mge_runtime.trt.network import Parsed, parse_graph
from mge_runtime.trt.progress import Progress, make_monitor
from mge_runtime.trt.vendor import Vendor

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["SMALLEST_WORKSPACE", "BuildOptions", "BuiltEngine", "build_engine"]

LEVELS = range(6)  # of optimisation; 3 is TensorRT's default
SMALLEST_WORKSPACE, LARGEST_WORKSPACE = 1 << 20, 1 << 40  # bytes


@dataclass(frozen=True)
class BuildOptions:
    """How to build."""

    batch: BatchRange = field(default_factory=BatchRange)
    optimization_level: int | None = None  # 0 (quick build) to 5 (quick engine); None: the library's default
    workspace: int | None = None  # bytes that a layer may use beside its tensors; None: all of the device's
    timing_cache: Path | None = None  # file of measured kernels, read if it is there and written afterwards

    def __post_init__(self) -> None:
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise BackendError(f"the optimisation level is {self.optimization_level}; expected 0 to {LEVELS[-1]}")
        if self.workspace is not None and not SMALLEST_WORKSPACE <= self.workspace <= LARGEST_WORKSPACE:
            raise BackendError(
                f"the workspace is {self.workspace} bytes; expected {SMALLEST_WORKSPACE} to {LARGEST_WORKSPACE}"
            )


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine."""

    data: memoryview
    attested: str  # "network", or "engine" where the engine itself was read back; "no" where the plan names no type
    layers: Mapping[str, Mapping[str, int]]  # layer type -> floating type -> layers, of what was attested
    scratch: int | None  # bytes of device memory for activations, at the largest batch; None: known on the device alone


def build_engine(
    vendor: Vendor,
    spec: GraphSpec,
    model: bytes,
    path: Path,
    *,
    plan: Mapping[str, JsonValue],
    capabilities: Sequence[str] | None,
    options: BuildOptions,
    timing_cache: bytes = b"",
    progress: Progress = lambda _share, _phase: True,
) -> tuple[BuiltEngine, bytes]:
    """Build a graph's engine.

    Args:
        vendor: the library.
        spec: inputs and outputs of the graph.
        model: serialised ModelProto.
        path: a file beside which the graph's external data lies.
        plan: precision plan of the graph, `Manifest.precision`.
        capabilities: build ahead of time for these, such as ("sm86", "sm120"), TensorRT-RTX alone; None: for the
            current CUDA device, and read the engine back there.
        options: batch range, effort, memory.
        timing_cache: what the last build returned, or a file's content; empty to begin with.
        progress: is told of every step and may stop the build.

    Returns:
        The engine, and the timing cache to go on with (empty for TensorRT-RTX, which measures on the first run).

    Raises:
        BuildError: the graph cannot be parsed or built, is not of its plan's precision, or the build was stopped.
    """
    parsed = parse_graph(vendor, spec, model, path)
    layers = attest_network(spec.name, parsed.network, model, plan)
    config, cache = _configure(vendor, parsed, options, capabilities, timing_cache)
    monitor: Any = make_monitor(vendor.api, progress)
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
    return BuiltEngine(data, attested, layers, scratch), b"" if cache is None else bytes(cache.serialize())  # pyright: ignore


def _configure(
    vendor: Vendor, parsed: Parsed, options: BuildOptions, capabilities: Sequence[str] | None, timing_cache: bytes
) -> tuple[trt.IBuilderConfig, trt.ITimingCache | None]:
    api = vendor.api
    config = parsed.builder.create_builder_config()
    config.clear_flag(api.BuilderFlag.TF32)  # on by default: FP32 would mean ten bits of mantissa
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # lets the inspector read types back
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, options.workspace)
    config.add_optimization_profile(_profile(parsed, options.batch))
    if vendor.is_rtx:
        _configure_rtx(api, config, capabilities)
        return config, None
    return config, _set_timing_cache(config, timing_cache)


def _profile(parsed: Parsed, batch: BatchRange) -> trt.IOptimizationProfile:
    profile = parsed.builder.create_optimization_profile()
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        shape = [tensor.shape[axis] for axis in range(1, len(tensor.shape))]
        least, usual, most = ((size, *shape) for size in batch.sizes)
        profile.set_shape(tensor.name, least, usual, most)  # pyright: ignore[reportArgumentType] - tuples are taken
    return profile


def _set_timing_cache(config: Any, content: bytes) -> trt.ITimingCache:
    cache = config.create_timing_cache(content)
    if not config.set_timing_cache(cache, False):  # from another version or another GPU: begin anew
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _configure_rtx(api: Any, config: Any, capabilities: Sequence[str] | None) -> None:
    """What TensorRT-RTX has and TensorRT has not; its timing cache does nothing."""
    names = ["CURRENT"] if capabilities is None else [name.upper() for name in capabilities]
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(api.ComputeCapability, name), index)
    # Memory that the runtime would allocate by itself cannot be captured in a CUDA graph.
    config.set_flag(api.BuilderFlag.REQUIRE_USER_ALLOCATION)


def _inspect(vendor: Vendor, graph: str, data: memoryview) -> tuple[str, int]:
    """What the engine says of its layers, as JSON, and the memory it wants."""
    runtime = vendor.api.Runtime(vendor.logger)
    engine = runtime.deserialize_cuda_engine(data)  # pyright: ignore[reportUnknownMemberType] - a buffer
    if engine is None:  # pyright: ignore[reportUnnecessaryComparison] - the stubs do not know failure
        raise BuildError(f"the engine of graph {graph} cannot be opened after its build: {vendor.messages.take()}")
    information = engine.create_engine_inspector().get_engine_information(vendor.api.LayerInformationFormat.JSON)
    return information, engine.get_device_memory_size_for_profile_v2(0)
