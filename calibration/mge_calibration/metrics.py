"""Figures of merit of probabilities: likelihood, calibration error, their intervals and the error's noise floor."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BINS",
    "Interval",
    "Quality",
    "calibration_bins",
    "calibration_error",
    "log_softmax",
    "measure_quality",
    "noise_floor",
]

BINS = 15  # of equal mass
_RESAMPLES = 1000
_CHUNK = 1 << 22  # values drawn at once


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """How good the probabilities of one answer are, on N images."""

    nll: Interval  # nats, mean negative log-likelihood
    ece: Interval  # in [0, 1], expected calibration error
    floor: float  # the ECE that a perfectly calibrated model with these confidences shows at N images, on average
    floor_95: float  # and what it stays below 95 % of the time

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities [..., C] of logits [..., C], in double precision."""
    scores = logits.astype(np.float64)
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def calibration_bins(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], bins: int = BINS
) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of images of each bin of equal mass, by rising confidence."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [(float(confidence[part].mean()), float(correct[part].mean()), len(part)) for part in parts]


def calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over bins of confidence, in [0, 1].

    Naeini et al., AAAI 2015, with bins of equal mass (Nguyen and O'Connor, EMNLP 2015): a trained network is sure of
    most images, so bins of equal width put nearly all of them into one and leave a handful of images, all noise, to
    each of the others. Here every bin's gap is known equally well.

    Args:
        confidence: [N], probability of the answered class.
        correct: [N], whether it was right.
        bins: number of bins.
    """
    order = np.argsort(confidence, kind="stable")
    gaps = (correct.astype(np.float64) - confidence)[order]
    return float(_binned(gaps[None], bins)[0])


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
    """Likelihood and calibration of softmax(logits / temperature), with 95 % bootstrap intervals over the images.

    The intervals are basic ones (Davison and Hinkley, 1997, section 5.2): 2 x estimate - quantile. An ECE is biased
    upwards, and that of a resample twice over, so that percentiles of resamples may not even hold the estimate.

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
    order = np.argsort(confidence, kind="stable")
    losses, gaps = losses[order], (correct - confidence)[order]
    rng = np.random.default_rng(seed)
    nll: list[NDArray[np.float64]] = []
    ece: list[NDArray[np.float64]] = []
    for count in _chunks(_RESAMPLES, len(labels)):
        picks = np.sort(rng.integers(len(labels), size=(count, len(labels))), axis=1)  # sorted: in order of confidence
        nll.append(losses[picks].mean(1))
        ece.append(_binned(gaps[picks], BINS))
    floor = noise_floor(confidence, seed=seed)
    return Quality(
        _basic(float(losses.mean()), np.concatenate(nll)),
        _basic(calibration_error(confidence, correct), np.concatenate(ece)),
        float(floor.mean()),
        float(np.quantile(floor, 0.95)),
    )


def _basic(value: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(value, max(0.0, float(2 * value - high)), max(0.0, float(2 * value - low)))


def _binned(gaps: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    """Sum over bins of |sum of gaps| / N, for rows [R, N] that are in order of confidence."""
    count = gaps.shape[1]
    sizes = [len(part) for part in np.array_split(np.arange(count), min(bins, count))]
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    return np.abs(np.add.reduceat(gaps, starts, axis=1)).sum(1) / count


def _chunks(draws: int, width: int) -> list[int]:
    """`draws` in pieces that keep memory flat."""
    size = max(1, min(draws, _CHUNK // max(width, 1)))
    return [min(size, draws - start) for start in range(0, draws, size)]
