"""Figures of merit of predictions, one definition each for training, calibration and export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


BINS = 15  # of equal mass
_CHUNK = 1 << 22  # values drawn at once
_Z = 1.959964  # standard deviations of a normal distribution that hold 95 %


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities [..., C] of logits [..., C], in double precision, <= 0."""
    scores = logits.astype(np.float64)
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def calibration_error(confidence: NDArray[Any], correct: NDArray[Any], bins: int = BINS) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over bins of confidence, in [0, 1].

    Naeini et al., AAAI 2015, with bins of equal mass (Nguyen and O'Connor, EMNLP 2015): a trained network is confident
    of most images, so bins of equal width put nearly all of them into one and leave a handful of images, all noise, to
    each of the others. Here every bin's gap is known equally well, and the bias, upwards, is smaller (Roelofs et al.,
    "Mitigating Bias in Calibration Error Estimation", AISTATS 2022).

    Args:
        confidence: [N], probability of the predicted class.
        correct: [N], whether it was right.
        bins: number of bins; fewer images than bins are a bin each.
    """
    rows = calibration_bins(confidence, correct, bins)
    return sum(abs(accuracy - mean) * count for mean, accuracy, count in rows) / len(confidence)


def calibration_bins(
    confidence: NDArray[Any], correct: NDArray[Any], bins: int = BINS
) -> list[tuple[float, float, int]]:
    """The bins of `calibration_error`, by rising confidence, for a reliability diagram.

    Args:
        confidence: as for `calibration_error`.
        correct: as well.
        bins: as well.

    Returns:
        Of each bin: mean confidence in [0, 1], accuracy in [0, 1], number of images.
    """
    order = np.argsort(confidence, kind="stable")
    starts = bin_starts(len(order), bins)
    sizes = np.diff([*starts.tolist(), len(order)])
    means, accuracies = (np.add.reduceat(v[order].astype(np.float64), starts) / sizes for v in (confidence, correct))
    return list(zip(means.tolist(), accuracies.tolist(), sizes.tolist(), strict=True))


def bin_starts(images: int, bins: int = BINS) -> NDArray[np.intp]:
    """Where each bin of equal mass begins among so many images sorted by confidence: [bins], from 0."""
    sizes = [len(part) for part in np.array_split(np.arange(images), min(bins, images))]
    return np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.intp)


def share_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, `count` of `total` >= 1 (Wilson, JASA 1927): never empty, never outside [0, 1]."""
    share, spread = count / total, _Z * _Z / total
    middle, half = share + spread / 2, _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max((middle - half) / (1 + spread), 0.0), min((middle + half) / (1 + spread), 1.0)


def mean_interval(values: NDArray[np.floating], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """A mean with its 95 % percentile bootstrap interval (Efron 1979).

    For two predictions of the same images give the differences, image by image: the bootstrap is paired then.

    Args:
        values: [N], one for each image, N >= 2.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    from scipy.stats import bootstrap  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    exact, batch = values.astype(np.float64), max(1, _CHUNK // len(values))
    found = bootstrap((exact,), np.mean, n_resamples=resamples, batch=batch, method="percentile", rng=seed)
    return Interval(float(exact.mean()), *map(float, found.confidence_interval))
