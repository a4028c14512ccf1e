"""Percentiles of times, and ratios of what ran in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["FEWEST_FOR_P99", "Percentiles", "Ratio", "median_interval", "percentile"]

FEWEST_FOR_P99 = 100  # iterations; with fewer the 99th percentile is the slowest of them
_FEWEST_FOR_P90 = 10
_FEWEST_FOR_INTERVAL = 6


@dataclass(frozen=True)
class Percentiles:
    """Of the times of one contender, milliseconds; None where there are too few iterations for one."""

    count: int
    p50: float
    p90: float | None
    p99: float | None
    least: float
    most: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Percentiles:
        """Of at least one time."""
        return cls(
            count=len(times_ms),
            p50=percentile(times_ms, 50),
            p90=percentile(times_ms, 90) if len(times_ms) >= _FEWEST_FOR_P90 else None,
            p99=percentile(times_ms, 99) if len(times_ms) >= FEWEST_FOR_P99 else None,
            least=min(times_ms),
            most=max(times_ms),
        )


@dataclass(frozen=True)
class Ratio:
    """Two contenders, or a share of one, compared within each round."""

    name: str
    median: float
    interval: tuple[float, float] | None  # of the median, see `median_interval`
    p10: float  # how far apart the rounds are, which says nothing of how well the median is known
    p90: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, name: str, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Of pairs: the first of the ones to the first of the others, and so on."""
        ratios = tuple(a / b for a, b in zip(above, below, strict=True))
        return cls(
            name, median(ratios), median_interval(ratios), percentile(ratios, 10), percentile(ratios, 90), ratios
        )


def median_interval(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of a median: percentiles of the medians of resamples (percentile bootstrap, Efron 1979).

    Rounds count as independent; a drift that is slower than a round makes the interval too narrow.

    Args:
        values: one for each round.
        resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        Its ends; None below six values, whose whole range holds the median with less than 95 % (1 - 2 / 2^N).
    """
    if len(values) < _FEWEST_FOR_INTERVAL:
        return None
    import numpy as np

    exact = np.asarray(values, np.float64)
    numbers = np.random.default_rng(seed).integers(len(exact), size=(resamples, len(exact)))
    low, high = np.quantile(np.median(exact[numbers], axis=1), (0.025, 0.975))
    return float(low), float(high)


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile of at least one value, between two of them in proportion (NumPy's "linear")."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low + (high - low) * (position - math.floor(position))
