"""What stopping after each segment costs: multiply-accumulates from the graphs' shapes, and measured time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mge_runtime.backends.ort_layers import stage_layers
from mge_runtime.bundle import Bundle
from mge_runtime.bundle.layout import stage_weights
from mge_runtime.errors import BackendError
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

    Without ONNX Runtime, or where it cannot infer a shape, a stage with at least a tenth of the largest one's
    weights counts as one trunk.

    Raises:
        BundleError: a stage's graph is damaged.
    """
    manifest = bundle.manifest
    try:
        layers = stage_layers(bundle)
    except BackendError:
        sizes = {stage.name: bundle.sizes.get(stage_weights(stage.name), 0) for stage in manifest.stages}
        largest = max(sizes.values())
        return Cost("trunks", _summed(manifest, {name: float(size >= largest / 10) for name, size in sizes.items()}))
    return Cost("GMACs", _summed(manifest, {n: sum(x.macs for x in found) / _GIGA for n, found in layers.items()}))


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
