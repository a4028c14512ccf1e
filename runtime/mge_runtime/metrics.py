"""Figures of merit of predictions, one definition each for training, calibration and export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BINS", "bin_starts", "calibration_bins", "calibration_error", "log_softmax"]

BINS = 15  # of equal mass


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
