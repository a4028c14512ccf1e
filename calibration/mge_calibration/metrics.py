"""How good probabilities are: likelihood and calibration error with intervals, and the error's noise floor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge_calibration.intervals import Interval, error_interval
from mge_runtime.metrics import BINS, bin_starts, bootstrap_mean, log_softmax

__all__ = ["Quality", "measure_quality", "noise_floor"]

_RESAMPLES = 1000
_CHUNK = 1 << 22  # values drawn at once


@dataclass(frozen=True)
class Quality:
    """How good the probabilities of one answer are, on N images."""

    nll: Interval  # nats, mean negative log-likelihood
    ece: Interval  # in [0, 1], expected calibration error
    floor: float  # the ECE that a perfectly calibrated model with these confidences shows at N images, on average
    floor_95: float  # and what it stays below 95 % of the time


def noise_floor(
    confidence: NDArray[np.float64], *, bins: int = BINS, draws: int = _RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """The ECE of a model whose every probability is true, on this many images: above zero by chance alone.

    Labels are drawn from the probabilities themselves; the answered class is right with probability `confidence`.

    Args:
        confidence: [N], calibrated.
        bins: as for `calibration_error`.
        draws: sets of labels.
        seed: of the draws.

    Returns:
        [draws], unsorted.
    """
    rng = np.random.default_rng(seed)
    ordered = np.sort(confidence)
    parts = [_binned((rng.random((n, len(ordered))) < ordered) - ordered, bins) for n in _chunks(draws, len(ordered))]
    return np.concatenate(parts)


def measure_quality(
    logits: NDArray[np.floating], labels: NDArray[np.integer], temperature: float, *, seed: int = 0
) -> Quality:
    """Likelihood and calibration of softmax(logits / temperature), with 95 % intervals over the images.

    The likelihood's is the percentile bootstrap's, the error's is that of `error_interval`.

    Args:
        logits: [N, C].
        labels: [N].
        temperature: > 0.
        seed: of the resamples and of the noise floor.
    """
    log_probabilities = log_softmax(logits.astype(np.float64) / temperature)
    losses = -log_probabilities[np.arange(len(labels)), labels]
    confidence = np.exp(log_probabilities.max(1))
    correct = log_probabilities.argmax(1) == labels
    floor = noise_floor(confidence, seed=seed)
    return Quality(
        Interval(*bootstrap_mean(losses, resamples=_RESAMPLES, seed=seed)),
        error_interval(confidence, correct, seed=seed),
        float(floor.mean()),
        float(np.quantile(floor, 0.95)),
    )


def _binned(gaps: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    """Sum over bins of |sum of gaps| / N, for rows [R, N] that are in order of confidence."""
    count = gaps.shape[1]
    return np.abs(np.add.reduceat(gaps, bin_starts(count, bins), axis=1)).sum(1) / count


def _chunks(draws: int, width: int) -> list[int]:
    """`draws` in pieces that keep memory flat."""
    size = max(1, min(draws, _CHUNK // max(width, 1)))
    return [min(size, draws - start) for start in range(0, draws, size)]
