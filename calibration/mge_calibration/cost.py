"""What stopping after each graph costs: multiply-accumulates, and measured time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mge_runtime.manifest import Manifest

if TYPE_CHECKING:
    from mge_runtime.chain import Exit
    from mge_runtime.pipeline import Pipeline

__all__ = ["Cost", "Times", "chain_cost", "measure_times"]


@dataclass(frozen=True)
class Cost:
    """Cost of one image, by how far the chain runs."""

    unit: str  # "GMACs"
    stops: tuple[float, ...]  # rising, one for each graph: everything up to it; the last is the full chain


@dataclass(frozen=True)
class Times:
    """Measured milliseconds of one image through the chain, decoding not counted."""

    images: int  # that were timed
    stops: tuple[float, ...]  # median over images, by the graph they are stopped after; the last is the full chain
    full: float  # mean over images of the full chain
    exits: float | None  # the same with calibrated exits; None: there are none


def chain_cost(manifest: Manifest) -> Cost:
    """Multiply-accumulates of convolutions and matrix products for one image, summed up to each graph."""
    return Cost("GMACs", tuple(float(value) for value in np.cumsum([manifest.gmacs[g.name] for g in manifest.graphs])))


def measure_times(pipeline: Pipeline, frames: Sequence[NDArray[np.uint8]], *, rounds: int = 3) -> Times:
    """Time the chain frame by frame, stopped after each graph and, where it has them, with calibrated exits.

    All ways are taken in turn on every frame, from round to round in another order, so that a machine that slows down
    slows all of them. Decoding is not counted.

    Args:
        pipeline: opened with one stream.
        frames: uint8 RGB [S, S, 3].
        rounds: in which each frame is timed; another one before is not.

    Raises:
        BackendError: a graph failed.
    """
    count = len(pipeline.manifest.graphs)
    ways: list[Exit] = [*range(1, count), "never"]
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
    stops = tuple(float(value) for value in np.median(usual[:, :count], axis=0))
    full = float(usual[:, count - 1].mean())
    exits = float(usual[:, count].mean()) if len(ways) > count else None
    return Times(len(frames), stops, full, exits)
