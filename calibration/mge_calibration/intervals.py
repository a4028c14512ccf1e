"""An interval for the true calibration error, which the measured one overstates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge_runtime.metrics import BINS, calibration_bins

__all__ = ["Interval", "error_interval"]

_GRID = 41  # true errors tried
_REACH = 2.0  # how far above the measured error they go, in 1 / sqrt(N): four standard deviations and more
_BISECTIONS = 30


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def error_interval(
    confidence: NDArray[np.floating],
    correct: NDArray[np.bool_],
    *,
    bins: int = BINS,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The calibration error with an interval for the true one, by inverting a parametric bootstrap test.

    A measured error is biased upwards, the more the smaller the true one is: noise of either sign adds to it. So
    neither percentiles of resamples nor twice the estimate less those hold the truth (at a true error of 0 both miss
    it more often than not). Here a true error is tried: a number of right answers is drawn for each bin from its mean
    confidence less a gap, and the true error stays in the interval where errors as high as the measured one (for the
    lower end) or as low (for the upper one) come up in more than (1 - level) / 2 of the draws. See Carpenter,
    "Test inversion bootstrap confidence intervals", JRSS B 61 (1999); Hansen, "The grid bootstrap", Review of
    Economics and Statistics 81 (1999). At no true error the draws are those of `noise_floor`.

    The error alone does not say which bins have the gaps. Three ways are tried and the widest interval is taken: gaps
    as they were measured, scaled; one gap in all bins, which hides least of the noise's bias; and gaps in as few of
    the surest bins as possible, which leaves the most.

    What is true is the binned error: the mean over the bins of |mean confidence - probability to be right|, for these
    confidences. The interval is made to hold the measured error, too.

    Args:
        confidence: [N], probability of the answered class.
        correct: [N], whether it was right.
        bins: of equal mass, as for `calibration_error`.
        resamples: draws for each true error.
        level: of the interval, in (0, 1).
        seed: of the draws.
    """
    sure, right, sizes = (np.array(column) for column in zip(*calibration_bins(confidence, correct, bins), strict=True))
    weights = sizes / sizes.sum()
    value = float(weights @ np.abs(right - sure))
    errors = np.linspace(0, min(1.0, value + _REACH / np.sqrt(len(confidence))), _GRID)
    rng, tail = np.random.default_rng(seed), (1 - level) / 2
    low = high = value
    for gaps in _ways(errors, sure, right - sure, weights):
        true = np.abs(gaps) @ weights  # not quite as asked for where an accuracy would leave [0, 1]
        drawn = rng.binomial(sizes, np.clip(sure + gaps, 0, 1)[:, None], (_GRID, resamples, len(sizes))) / sizes
        measured = np.abs(drawn - sure) @ weights  # [errors, resamples]
        low = min(low, *true[(measured >= value).mean(1) > tail], value)
        high = max(high, *true[(measured <= value).mean(1) > tail], value)
    return Interval(value, float(low), float(high))


def _ways(
    errors: NDArray[np.float64], sure: NDArray[np.float64], gaps: NDArray[np.float64], weights: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Gaps [errors, bins] that make up each of the true errors, in three ways."""
    scale = weights @ np.abs(gaps)
    ways = [_even(errors, sure, weights), _few(errors, sure, weights)]
    return ways if scale == 0 else [*ways, np.clip(errors[:, None] * gaps / scale, -sure, 1 - sure)]


def _even(errors: NDArray[np.float64], sure: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """One gap in all bins, downwards; less only where an accuracy would fall below 0."""
    low, high = np.zeros(len(errors)), np.ones(len(errors))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        short = np.minimum(middle[:, None], sure) @ weights < errors
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return -np.minimum(high[:, None], sure)


def _few(errors: NDArray[np.float64], sure: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bin after bin from the surest on, downwards: each to an accuracy of a half; where that is not enough, to 0."""
    gaps = np.zeros((len(errors), len(sure)))
    left = errors.copy()
    for floor in (0.5, 0.0):
        for k in range(len(sure))[::-1]:
            more = np.clip(np.minimum(left / weights[k], sure[k] + gaps[:, k] - floor), 0, None)
            gaps[:, k] -= more
            left -= weights[k] * more
    return gaps
