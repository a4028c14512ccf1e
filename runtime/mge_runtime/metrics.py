"""Figures of merit of answers, one definition each for training, calibration and export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BINS", "bin_starts", "calibration_bins", "calibration_error", "log_softmax"]

BINS = 15  # of equal mass


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities [..., C] of logits [..., C], in double precision."""
    scores = logits.astype(np.float64)
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def calibration_error(confidence: NDArray[Any], correct: NDArray[Any], bins: int = BINS) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over bins of confidence, in [0, 1].

    Naeini et al., AAAI 2015, with bins of equal mass (Nguyen and O'Connor, EMNLP 2015): a trained network is sure of
    most images, so bins of equal width put nearly all of them into one and leave a handful of images, all noise, to
    each of the others. Here every bin's gap is known equally well, and the bias, upwards, is smaller (Roelofs et al.,
    "Mitigating Bias in Calibration Error Estimation", AISTATS 2022).

    Args:
        confidence: [N], probability of the answered class.
        correct: [N], whether it was right.
        bins: number of bins.
    """
    rows = calibration_bins(confidence, correct, bins)
    return sum(abs(right - sure) * count for sure, right, count in rows) / len(confidence)


def calibration_bins(
    confidence: NDArray[Any], correct: NDArray[Any], bins: int = BINS
) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of images of each bin of equal mass, by rising confidence."""
    order = np.argsort(confidence, kind="stable")
    starts = bin_starts(len(order), bins)
    sizes = np.diff([*starts.tolist(), len(order)])
    sure, right = (np.add.reduceat(v[order].astype(np.float64), starts) / sizes for v in (confidence, correct))
    return list(zip(sure.tolist(), right.tolist(), sizes.tolist(), strict=True))


def bin_starts(images: int, bins: int = BINS) -> NDArray[np.intp]:
    """Where each bin of equal mass begins among images sorted by confidence; fewer images than bins are a bin each."""
    sizes = [len(part) for part in np.array_split(np.arange(images), min(bins, images))]
    return np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.intp)
