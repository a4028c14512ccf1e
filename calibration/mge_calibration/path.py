"""Candidates for the exit thresholds, ever more exiting, chosen on other images than those that test them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mge_calibration.exits import NEVER, stops

__all__ = ["propose_path"]

_LEVELS = 128  # thresholds tried for each answer: quantiles of its confidence
_PRIOR = 10.0  # standard deviation of the logistic fit's coefficients, which keeps them finite


def propose_path(
    confidence: NDArray[np.floating], differs: NDArray[np.bool_], costs: Sequence[float], classes: int
) -> NDArray[np.float64]:
    """A sequence of thresholds that saves much for few disagreements from its first step on.

    Each step lowers the threshold of one answer to the next quantile of its confidence: that one which costs fewest
    expected disagreements for each unit of cost saved. What is expected comes from a logistic fit of disagreement to
    the confidence's log-odds, one for each answer, since counts of a few disagreements say nothing of single steps.
    Whether the promise holds does not depend on any of this; how much is saved does.

    Args:
        confidence: calibrated, [N, E], of the E answers before the last.
        differs: [N, E], whether the class of each is another than the full chain's.
        costs: E + 1 rising costs of stopping after each answer, the last is the full chain's; any unit.
        classes: number C of classes; no confidence is below 1 / C.

    Returns:
        [J, E], J >= 0; each row stops every image at the same answer as the row before, or at an earlier one.
    """
    count, answers = confidence.shape
    saved = 1 - np.asarray(costs, np.float64) / costs[-1]
    risk = np.column_stack([*(_expected(confidence[:, k], differs[:, k]) for k in range(answers)), np.zeros(count)])
    levels = [_levels(confidence[:, k], classes) for k in range(answers)]
    position = [-1] * answers  # in `levels`; -1: NEVER
    current = np.full(answers, NEVER)
    path: list[NDArray[np.float64]] = []
    rows = np.arange(count)

    def weigh(thresholds: NDArray[np.float64]) -> tuple[float, float]:
        stop = stops(confidence, thresholds)
        return float(saved[stop].mean()), float(risk[rows, stop].mean())

    while True:
        gain, danger = weigh(current)
        best: tuple[float, int, int] | None = None
        for k in range(answers):
            for step in range(position[k] + 1, len(levels[k])):
                candidate = current.copy()
                candidate[k] = levels[k][step]
                more, worse = weigh(candidate)
                if more > gain:
                    price = (worse - danger) / (more - gain)
                    if best is None or price < best[0]:
                        best = (price, k, step)
                    break
        if best is None:
            return np.array(path).reshape(-1, answers)
        _, k, step = best
        position[k] = step
        current = current.copy()
        current[k] = levels[k][step]
        path.append(current)


def _levels(confidence: NDArray[np.floating], classes: int) -> NDArray[np.float64]:
    """Falling thresholds; the last one lets every image stop."""
    shares = np.linspace(1, 0, _LEVELS, endpoint=False)
    levels = np.unique(np.quantile(confidence, shares, method="higher"))[::-1]
    return np.append(levels[levels > 1 / classes], 1 / classes)


def _expected(confidence: NDArray[np.floating], differs: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Probability [N] that an answer of this confidence disagrees: a logistic fit to the log-odds of the confidence."""
    from scipy.optimize import minimize
    from scipy.special import expit

    clipped = np.clip(confidence, 1e-6, 1 - 1e-6)
    odds = np.log(clipped / (1 - clipped))
    spread = float(odds.std()) or 1.0
    features = np.column_stack([np.ones(len(odds)), (odds - odds.mean()) / spread])
    target = differs.astype(np.float64)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scores = features @ weights
        value = np.logaddexp(0, scores).sum() - target @ scores + weights @ weights / (2 * _PRIOR**2)
        return float(value), features.T @ (expit(scores) - target) + weights / _PRIOR**2

    return expit(features @ minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B").x)
