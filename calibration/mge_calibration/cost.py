"""What stopping after each segment costs: multiply-accumulates from the graphs' shapes, and measured time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mge_runtime.bundle import Bundle
from mge_runtime.bundle.layout import stage_graph, stage_weights
from mge_runtime.manifest import Manifest

if TYPE_CHECKING:
    from mge_runtime.exits import Exit
    from mge_runtime.pipeline import Pipeline

__all__ = ["Cost", "Times", "chain_cost", "measure_times"]

_GIGA = 1e9


@dataclass(frozen=True)
class Cost:
    """Cost of one image, by how far the chain runs."""

    unit: str  # "GMACs", or "trunks" where the graphs' shapes cannot be told
    stops: tuple[float, ...]  # rising, one for each segment: everything up to it; the last is the full chain


@dataclass(frozen=True)
class Times:
    """Measured milliseconds of one image through the chain, decoding not counted."""

    images: int  # that were timed
    stops: tuple[float, ...]  # median over images, by the segment they are stopped after; the last is the full chain
    full: float  # mean over images of the full chain
    exits: float | None  # the same with calibrated exits; None: there are none


def chain_cost(bundle: Bundle) -> Cost:
    """Multiply-accumulates of convolutions and matrix products for one image, summed up to each segment.

    Without the package `onnx`, or where a shape cannot be inferred, a stage with at least a tenth of the largest one's
    weights counts as one trunk.

    Raises:
        BundleError: a stage's graph is damaged.
    """
    manifest = bundle.manifest
    graphs = {stage.name: bundle.read(stage_graph(stage.name)) for stage in manifest.stages}
    macs = {name: _macs(graph) for name, graph in graphs.items()}
    known = {name: count / _GIGA for name, count in macs.items() if count is not None}
    if len(known) == len(graphs):
        return Cost("GMACs", _summed(manifest, known))
    sizes = {name: bundle.sizes.get(stage_weights(name), 0) for name in graphs}
    largest = max(sizes.values())
    return Cost("trunks", _summed(manifest, {name: float(size >= largest / 10) for name, size in sizes.items()}))


def measure_times(pipeline: Pipeline, frames: Sequence[NDArray[np.uint8]], *, rounds: int = 3) -> Times:
    """Time the chain frame by frame, stopped after each segment and, where it has them, with calibrated exits.

    All ways are taken in turn on every frame, from round to round in another order, so that a machine that slows down
    slows all of them. Decoding is not counted.

    Args:
        pipeline: opened with one stream.
        frames: uint8 RGB [S, S, 3].
        rounds: in which each frame is timed; another one before is not.

    Raises:
        BackendError: a stage failed.
    """
    segments = pipeline.manifest.segments
    ways: list[Exit] = [*range(1, len(segments)), "never"]
    if pipeline.calibrated.has_exits:
        ways.append("calibrated")
    taken = np.zeros((rounds, len(frames), len(ways)))
    for turn in range(-1, rounds):
        for number, frame in enumerate(frames):
            for place in range(len(ways)):
                way = (place + number + turn) % len(ways)
                start = time.perf_counter()
                pipeline.run(frame[None], exit=ways[way], outputs=[])
                if turn >= 0:
                    taken[turn, number, way] = (time.perf_counter() - start) * 1e3
    usual = np.median(taken, axis=0)  # [frames, ways]
    stops = tuple(float(value) for value in np.median(usual[:, : len(segments)], axis=0))
    full = float(usual[:, len(segments) - 1].mean())
    exits = float(usual[:, len(segments)].mean()) if len(ways) > len(segments) else None
    return Times(len(frames), stops, full, exits)


def _summed(manifest: Manifest, costs: Mapping[str, float]) -> tuple[float, ...]:
    parts = [sum(costs[name] for name in segment.stages) for segment in manifest.segments]
    return tuple(float(value) for value in np.cumsum(parts))


def _macs(graph: bytes) -> int | None:
    """Multiply-accumulates of one image; None where they cannot be told."""
    try:
        import onnx
    except ImportError:
        return None
    model = onnx.load_from_string(graph)
    # What the exporter wrote of shapes between the nodes may be symbolic: infer it anew from one image.
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_param"):
                axis.dim_value = 1
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes: dict[str, list[int] | None] = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        shapes[value.name] = _shape(value)
    total = 0
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            first, second, out = (shapes.get(name) for name in (*node.input[:2], node.output[0]))
            if first is None or second is None or out is None:
                return None
            total += math.prod(out) * _depth(node, first, second)
    return total


def _depth(node: Any, first: list[int], second: list[int]) -> int:
    """Products that are summed for one output value."""
    if node.op_type == "Conv":
        return math.prod(second[1:])  # input channels of the group x kernel
    transposed = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
    return first[0] if transposed else first[-1]


def _shape(value: Any) -> list[int] | None:
    """The dimensions; None unless all of them are known."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(axis.HasField("dim_value") for axis in tensor.shape.dim):
        return None
    return [axis.dim_value for axis in tensor.shape.dim]
