"""Early exits with a promise: how often an answer may differ from the full chain's.

An image stops after the first answer whose calibrated confidence, the largest probability of softmax(answer / T), is at
or above that answer's threshold. It disagrees where the class it gets there is not the full chain's.

Promise: with probability at least 1 - delta over the draw of the n images that set the thresholds, at most a share
epsilon of new images from the same source disagree. This is Learn-then-Test (Angelopoulos, Bates, Candes, Jordan and
Lei, "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control", 2021) with 0/1 losses:

- Candidates t_1, t_2, ..., ever more exiting, are fixed before the n images are looked at (`mge_calibration.path`).
- Candidate j is tested for H_j: R(t_j) > epsilon. With k_j disagreements among n, its p-value is the binomial tail
  P(Bin(n, epsilon) <= k_j); it is at most delta exactly where the Clopper-Pearson upper bound on R(t_j) at level
  1 - delta, the (1 - delta)-quantile of Beta(k_j + 1, n - k_j), is at most epsilon.
- Fixed-sequence testing: candidates are tested in order, each at level delta, until the first that fails. The
  family-wise error is at most delta: a wrong acceptance needs the first true H_j of the sequence to be rejected, which
  has probability at most delta. So the last candidate before the failure may be chosen after looking.

Even without any disagreement (1 - epsilon)^n <= delta is needed: 299 images at 1 % and 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEVER", "certify", "count_disagreements", "fewest_images", "stops", "upper_bound"]

NEVER = math.inf  # the threshold that no confidence reaches


def fewest_images(epsilon: float, delta: float) -> int:
    """How many images without a single disagreement are the least that allow the promise.

    Args:
        epsilon: share that may disagree, in (0, 1).
        delta: probability that the promise fails, in (0, 1).
    """
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


def upper_bound(disagreements: NDArray[np.integer] | int, images: int, delta: float) -> NDArray[np.float64]:
    """Clopper-Pearson (1934) upper bound on a probability, which holds with probability at least 1 - delta.

    Args:
        disagreements: counts of any shape, from 0 to `images`.
        images: how many were looked at; at least 1.
        delta: in (0, 1).
    """
    from scipy.stats import beta

    counts = np.asarray(disagreements)
    failed = counts >= images  # where the quantile's second parameter would be zero
    return np.where(failed, 1.0, beta.ppf(1 - delta, counts + 1, np.where(failed, 1, images - counts)))


def certify(disagreements: NDArray[np.integer], images: int, epsilon: float, delta: float) -> NDArray[np.intp]:
    """Fixed-sequence test along the last axis.

    Args:
        disagreements: counts [..., J] of the J candidates, in the order fixed beforehand.
        images: how many were looked at.
        epsilon: share that may disagree.
        delta: probability that the promise fails.

    Returns:
        [...], how many candidates from the first on keep the promise; the last of them is the one to choose, 0: none.
    """
    if images < 1:
        return np.zeros(disagreements.shape[:-1], np.intp)
    kept = upper_bound(disagreements, images, delta) <= epsilon
    return np.logical_and.accumulate(kept, axis=-1).sum(-1)


def stops(confidence: NDArray[np.floating], thresholds: Sequence[float] | NDArray[np.floating]) -> NDArray[np.intp]:
    """Which answer each image gets.

    Args:
        confidence: calibrated, [N, E], of the E answers before the last.
        thresholds: [..., E]; `NEVER` for an answer where nothing stops.

    Returns:
        [..., N] index of the answer, from 0; E: the whole chain ran.
    """
    limits = np.asarray(thresholds)
    answer = np.full((*limits.shape[:-1], len(confidence)), confidence.shape[1], np.intp)
    for k in range(confidence.shape[1])[::-1]:
        np.putmask(answer, confidence[:, k] >= limits[..., k, None], k)
    return answer


def count_disagreements(
    confidence: NDArray[np.floating], differs: NDArray[np.bool_], thresholds: NDArray[np.floating]
) -> NDArray[np.intp]:
    """How many images get another class than from the full chain.

    Args:
        confidence: calibrated, [N, E].
        differs: [N, E], whether the class of each answer before the last is another than the last one's.
        thresholds: [..., E].

    Returns:
        [...] counts.
    """
    answered = np.column_stack([differs, np.zeros(len(differs), bool)])  # the full chain's own class never differs
    first = np.arange(len(differs)) * answered.shape[1]
    return np.count_nonzero(answered.ravel().take(first + stops(confidence, thresholds)), axis=-1)
