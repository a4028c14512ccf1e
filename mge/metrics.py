"""Figures of merit of class scores, in NumPy."""

from __future__ import annotations

import numpy as np

__all__ = ["expected_calibration_error", "log_softmax", "paired_bootstrap", "top_k_correct", "view_areas"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [N, C] of logits [N, C]."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def top_k_correct(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Whether the true class is among the k best: logits [N, C], labels [N] -> bool [N]. Ties go to the lower index."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return (best == labels[:, None]).any(1)


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence (Guo et al. 2017), in [0, 1].

    Args:
        logits: [N, C].
        labels: [N].
        bins: of the confidence, over (0, 1].
    """
    confidence = np.exp(log_softmax(logits).max(1))
    correct = top_k_correct(logits, labels)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def view_areas(views: np.ndarray) -> np.ndarray:
    """Share of the first view that each view shows: boxes [N, K, 4] in source pixels -> [N, K] in (0, 1]."""
    areas = (views[..., 2] - views[..., 0]) * (views[..., 3] - views[..., 1])
    return areas / areas[:, :1]


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two means over the same images, with a percentile bootstrap interval (Efron 1979).

    Args:
        first: [N] per-image values (correct or not, or means over seeds).
        second: [N], the same images in the same order.
        resamples: bootstrap draws.
        level: coverage of the interval, in (0, 1).
        seed: of the draws.

    Returns:
        mean(first - second), and the interval's ends.
    """
    difference = first.astype(float) - second.astype(float)
    picks = np.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    means = difference[picks].mean(1)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(difference.mean()), float(low), float(high)
