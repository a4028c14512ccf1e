"""How good probabilities are: likelihood and calibration, with what chance alone makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge_runtime.metrics import (
    Interval,
    bin_starts,
    calibration_bins,
    calibration_error,
    log_softmax,
    mean_interval,
)

_RESAMPLES = 1000


@dataclass(frozen=True)
class Quality:
    """How good the probabilities of one tensor of logits are, on N images."""

    nll: Interval  # nats, mean negative log-likelihood
    ece: float  # in [0, 1], expected calibration error
    ece_floor: float  # the ECE that a perfectly calibrated model with these confidences shows at N images, on average
    ece_floor_95: float  # and what it stays below 95 % of the time
    bins: list[tuple[float, float, int]]  # of equal mass: mean confidence, accuracy, images


def measure_quality(
    logits: NDArray[np.floating], labels: NDArray[np.integer], temperature: float, *, seed: int = 0
) -> Quality:
    """Likelihood and calibration of softmax(logits / temperature).

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
        mean_interval(losses, resamples=_RESAMPLES, seed=seed),
        calibration_error(confidence, correct),
        float(floor.mean()),
        float(np.quantile(floor, 0.95)),
        calibration_bins(confidence, correct),
    )


def noise_floor(confidence: NDArray[np.float64], *, draws: int = _RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """The ECE of a model whose every probability is true, on this many images: above zero by chance alone.

    Labels are drawn from the probabilities themselves; the predicted class is right with probability `confidence`.

    Args:
        confidence: [N], calibrated.
        draws: sets of labels.
        seed: of the draws.

    Returns:
        [draws], unsorted.
    """
    rng, ordered, starts = np.random.default_rng(seed), np.sort(confidence), bin_starts(len(confidence))
    gaps = ((rng.random(len(ordered)) < ordered) - ordered for _ in range(draws))
    return np.array([np.abs(np.add.reduceat(gap, starts)).sum() / len(ordered) for gap in gaps])
