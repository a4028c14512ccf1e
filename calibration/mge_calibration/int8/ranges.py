"""From many values of a tensor to the largest magnitude that its INT8 code keeps: four methods."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "LEVELS", "METHODS", "Magnitudes", "pick_range"]

BINS = 2048  # of a histogram of magnitudes
STRIDE = 5  # of the values counted: neighbours are alike, and no usual width of a map is a multiple of it
LEVELS = 127  # magnitudes that symmetric INT8 tells apart, beside zero
_PERCENTILE = 99.99
_CANDIDATES = np.arange(LEVELS + 1, BINS + 1, 3)  # bins that a clipped range may keep; fewer could code exactly

Counts = NDArray[np.int64]


class Magnitudes:
    """A histogram of |x| with a fixed end, filled batch by batch.

    Args:
        largest: the largest magnitude that will be seen, > 0.
    """

    def __init__(self, largest: float) -> None:
        self.largest = largest
        self.counts: Counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[np.floating]) -> None:
        """Take in a tensor of any shape, every `STRIDE`th of its values."""
        scaled = np.abs(values.reshape(-1)[::STRIDE]) * np.float32(BINS / self.largest)
        self.counts += np.bincount(np.minimum(scaled, BINS - 1).astype(np.int32), minlength=BINS)


def pick_range(magnitudes: Magnitudes, method: str) -> float:
    """The magnitude that becomes code 127; what is above it is clipped.

    Args:
        magnitudes: of all that was seen.
        method: one of `METHODS`.

    Returns:
        In (0, `magnitudes.largest`].
    """
    return METHODS[method](magnitudes.counts) * magnitudes.largest / BINS


def _max(counts: Counts) -> float:
    del counts
    return BINS


def _percentile(counts: Counts) -> float:
    """The magnitude that 99.99 % of all values stay below or meet, as an upper edge of a bin."""
    return int(np.searchsorted(counts.cumsum(), counts.sum() * _PERCENTILE / 100)) + 1


def _mse(counts: Counts) -> float:
    """The range of the least expected squared error, of rounding and clipping together."""
    centres = np.arange(BINS) + 0.5
    errors: list[float] = []
    for kept in _CANDIDATES:
        step = kept / LEVELS
        coded = np.minimum(np.rint(centres / step), LEVELS) * step
        errors.append(float(counts @ (coded - centres) ** 2))
    return int(_CANDIDATES[int(np.argmin(errors))])


def _entropy(counts: Counts) -> float:
    """The range whose coded distribution tells least from the clipped one (Kullback-Leibler divergence).

    S. Migacz, "8-bit Inference with TensorRT", GTC 2017: the clipped tail is added to the last bin of the reference
    and not to what is coded. Exact zeros, which a ReLU makes and every range codes exactly, are left out.
    """
    best, least = BINS, np.inf
    counted = counts.astype(np.float64)
    counted[0] = counted[1]
    edges_of_codes = np.arange(LEVELS + 1) / (LEVELS + 1)
    for kept in _CANDIDATES:
        reference = counted[:kept].copy()
        coded = reference.copy()
        reference[-1] += counted[kept:].sum()
        starts = (edges_of_codes * kept).astype(np.int64)
        present = (reference > 0).astype(np.float64)
        sums, filled = np.add.reduceat(coded, starts), np.add.reduceat(present, starts)
        means = np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0)
        coded = np.repeat(means, np.diff(np.append(starts, kept))) * present
        divergence = _divergence(reference, coded)
        if divergence < least:
            best, least = int(kept), divergence
    return best


def _divergence(reference: NDArray[np.float64], coded: NDArray[np.float64]) -> float:
    """KL(reference || coded); infinite where something present is coded as absent."""
    total, other = reference.sum(), coded.sum()
    if total == 0 or other == 0:
        return np.inf
    present = reference > 0
    p, q = reference[present] / total, coded[present] / other
    return np.inf if (q == 0).any() else float((p * np.log(p / q)).sum())


METHODS: dict[str, Callable[[Counts], float]] = {
    "max": _max,
    "entropy": _entropy,
    "percentile": _percentile,
    "mse": _mse,
}
