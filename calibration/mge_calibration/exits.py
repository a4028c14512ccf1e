"""Early exits with a guarantee: how often a class may differ from the full chain's.

An image stops after the first graph whose calibrated confidence, the largest probability of softmax(logits / T), is at
or above that graph's threshold. It disagrees where the class it gets there is not the full chain's.

Guarantee: with probability at least 1 - delta over the draw of the n images that set the thresholds, at most a share
epsilon of new images from the same source disagree. This is Learn-then-Test (Angelopoulos, Bates, Candes, Jordan and
Lei, "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control", 2021) with 0/1 losses:

- Candidates t_1, t_2, ..., ever more exiting, are fixed before the n images are looked at (`propose_path`).
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge_calibration.collect import FEWEST, TEMPERATURE_SHARE, ChainLogits
from mge_runtime.calibrated import Guarantee, confidence
from mge_runtime.metrics import Interval, mean_interval

NEVER = math.inf  # the threshold that no confidence reaches
_LEVELS = 128  # thresholds tried for each graph: quantiles of its confidence
_PRIOR = 10.0  # standard deviation of the logistic fit's coefficients, which keeps them finite


@dataclass(frozen=True)
class ExitOutcome:
    """Thresholds and what they do on the images that set them."""

    thresholds: Mapping[str, float | None]  # by tensor of logits before the last; None: nothing stops there
    images: int
    stopped: Mapping[str, int]  # images that stop with each tensor, the last one included
    disagreements: int
    bound: float  # upper bound on their share at level 1 - delta
    mean_cost: float  # GMACs
    mean_cost_share: float  # the same as a share of the full chain's
    accuracy: float  # in [0, 1], with exits
    accuracy_full: float  # without
    accuracy_change: Interval  # with minus without, 95 % paired bootstrap


def learn_exits(
    proposing: ChainLogits,
    testing: ChainLogits | None,
    temperatures: Mapping[str, float],
    gmacs: Sequence[float],
    guarantee: Guarantee,
    *,
    seed: int,
) -> ExitOutcome | str:
    """Choose exit thresholds that keep the guarantee.

    Args:
        proposing: images that fix the path of candidates.
        testing: other images, which test them; None: there were too few to set some apart.
        temperatures: by tensor of logits.
        gmacs: of everything up to each graph; the last is the full chain's.
        guarantee: to keep.
        seed: of the bootstrap.

    Returns:
        The outcome or, where no exit keeps the guarantee, the reason.
    """
    names, epsilon, delta = list(proposing.logits), guarantee.epsilon, guarantee.delta
    if len(names) < 2:
        return "the chain has a single graph, there is nowhere to stop before it"
    least = fewest_images(epsilon, delta)
    if testing is None or len(testing) < least:
        in_all = max(math.ceil(least / (1 - TEMPERATURE_SHARE)), math.ceil(FEWEST / TEMPERATURE_SHARE))
        return (
            f"too few images for the guarantee: {len(testing or proposing)}; epsilon {epsilon:.3g} and delta "
            f"{delta:.3g} need {least} beside those that set the temperatures, {in_all} in all where one folder "
            "serves both: add images, name a folder with --exit-data, or allow a larger epsilon"
        )
    count = len(testing)
    path = propose_path(*_confident(proposing, temperatures), gmacs, testing.logits[names[-1]].shape[1])
    stop, predicted = apply_exits(testing, temperatures, path)  # [J, N] both
    full = testing.logits[names[-1]].argmax(1)
    disagreements = np.count_nonzero(predicted != full, axis=1)
    bounds = upper_bound(disagreements, count, delta)
    kept = int(certify(bounds, epsilon))
    if not kept:
        return (
            "no exit keeps the guarantee: of the images that would stop first too many get another class than from the "
            f"full chain (epsilon {epsilon:.3g}, delta {delta:.3g}, {count} images)"
        )
    best = kept - 1
    cost = float(np.array(gmacs)[stop[best]].mean())
    right, right_full = predicted[best] == testing.labels, full == testing.labels
    return ExitOutcome(
        thresholds={n: None if t == NEVER else float(t) for n, t in zip(names[:-1], path[best], strict=True)},
        images=count,
        stopped={name: int((stop[best] == k).sum()) for k, name in enumerate(names)},
        disagreements=int(disagreements[best]),
        bound=float(bounds[best]),
        mean_cost=cost,
        mean_cost_share=cost / gmacs[-1],
        accuracy=float(right.mean()),
        accuracy_full=float(right_full.mean()),
        accuracy_change=mean_interval(right.astype(np.float64) - right_full, seed=seed),
    )


def apply_exits(
    found: ChainLogits, temperatures: Mapping[str, float], thresholds: Sequence[float] | NDArray[np.floating]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """After which graph each of N images stops, and the class that it gets there.

    Args:
        found: of the images.
        temperatures: by tensor of logits.
        thresholds: [..., E], of the E graphs before the last; `NEVER` where nothing stops.

    Returns:
        [..., N] number of the graph, from 0; E: the whole chain ran. [..., N] class.
    """
    stop = exit_indices(_confident(found, temperatures)[0], thresholds)
    return stop, _classes(found)[np.arange(len(found)), stop]


def fewest_images(epsilon: float, delta: float) -> int:
    """How many images without a single disagreement are the least that allow the guarantee.

    Args:
        epsilon: share that may disagree, in (0, 1).
        delta: probability that the guarantee fails, in (0, 1).
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
    return np.where(counts < images, beta.ppf(1 - delta, counts + 1, images - counts), 1.0)


def certify(bounds: NDArray[np.floating], epsilon: float) -> NDArray[np.intp]:
    """Fixed-sequence test along the last axis: how many candidates from the first on keep the guarantee.

    Args:
        bounds: [..., J], upper bounds on the J candidates' risks, in the order fixed beforehand.
        epsilon: share that may disagree.

    Returns:
        [...], from 0 to J; the last candidate that keeps it is the one to choose.
    """
    return np.logical_and.accumulate(bounds <= epsilon, axis=-1).sum(-1)


def exit_indices(
    confident: NDArray[np.floating], thresholds: Sequence[float] | NDArray[np.floating]
) -> NDArray[np.intp]:
    """After which graph each image stops.

    Args:
        confident: calibrated confidence, [N, E], after the E graphs before the last.
        thresholds: [..., E]; `NEVER` where nothing stops.

    Returns:
        [..., N] index of the graph, from 0; E: the whole chain ran.
    """
    limits = np.asarray(thresholds)
    stop = np.full((*limits.shape[:-1], len(confident)), confident.shape[1], np.intp)
    for k in range(confident.shape[1])[::-1]:
        np.putmask(stop, confident[:, k] >= limits[..., k, None], k)
    return stop


def propose_path(
    confident: NDArray[np.floating], differs: NDArray[np.bool_], costs: Sequence[float], classes: int
) -> NDArray[np.float64]:
    """A sequence of thresholds that saves much for few disagreements from its first step on.

    Each step lowers the threshold of one graph to the next quantile of its confidence: that one which costs fewest
    expected disagreements for each unit of cost saved. What is expected comes from a logistic fit of disagreement to
    the confidence's log-odds, one for each graph, since counts of a few disagreements say nothing of single steps.
    Whether the guarantee holds does not depend on any of this; how much is saved does.

    Args:
        confident: calibrated confidence, [N, E], after the E graphs before the last.
        differs: [N, E], whether the class of each is another than the full chain's.
        costs: E + 1 rising costs of stopping after each graph, the last is the full chain's; any unit.
        classes: number C of classes; no confidence is below 1 / C.

    Returns:
        [J, E], J >= 0; each row stops every image at the same graph as the row before, or at an earlier one.
    """
    count, exits = confident.shape
    saved = 1 - np.asarray(costs, np.float64) / costs[-1]
    risk = np.column_stack([*(_expected(confident[:, k], differs[:, k]) for k in range(exits)), np.zeros(count)])
    levels = [_levels(confident[:, k], classes) for k in range(exits)]
    position = [0] * exits  # in `levels`, of the next to try
    current = np.full(exits, NEVER)
    path: list[NDArray[np.float64]] = []
    rows = np.arange(count)

    def weigh(thresholds: NDArray[np.float64]) -> tuple[float, float]:
        stop = exit_indices(confident, thresholds)
        return float(saved[stop].mean()), float(risk[rows, stop].mean())

    while True:
        gain, danger = weigh(current)
        steps: list[tuple[float, int, int, NDArray[np.float64]]] = []  # price, graph, position, thresholds
        for k in range(exits):
            for place in range(position[k], len(levels[k])):
                candidate = current.copy()
                candidate[k] = levels[k][place]
                more, worse = weigh(candidate)
                if more > gain:
                    steps.append(((worse - danger) / (more - gain), k, place, candidate))
                    break
        if not steps:
            return np.array(path).reshape(-1, exits)
        _, k, place, current = min(steps, key=lambda step: step[0])
        position[k] = place + 1
        path.append(current)


def _levels(confident: NDArray[np.floating], classes: int) -> NDArray[np.float64]:
    """Falling thresholds; the last one lets every image stop."""
    shares = np.linspace(1, 0, _LEVELS, endpoint=False)
    levels = np.unique(np.quantile(confident, shares, method="higher"))[::-1]
    return np.append(levels[levels > 1 / classes], 1 / classes)


def _expected(confident: NDArray[np.floating], differs: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Probability [N] that a class of this confidence disagrees: a logistic fit to the log-odds of the confidence."""
    from scipy.optimize import minimize
    from scipy.special import expit, logit

    odds = logit(np.clip(confident, 1e-6, 1 - 1e-6))
    spread = float(odds.std()) or 1.0
    features = np.column_stack([np.ones(len(odds)), (odds - odds.mean()) / spread])
    target = differs.astype(np.float64)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scores = features @ weights
        value = np.logaddexp(0, scores).sum() - target @ scores + weights @ weights / (2 * _PRIOR**2)
        return float(value), features.T @ (expit(scores) - target) + weights / _PRIOR**2

    return expit(features @ minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B").x)


def _confident(found: ChainLogits, temperatures: Mapping[str, float]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Calibrated confidence [N, E] after the graphs before the last, and whether their class differs from its."""
    early = list(found.logits)[:-1]
    confident = np.column_stack([confidence(found.logits[name], temperatures[name]) for name in early])
    classes = _classes(found)
    return confident, classes[:, :-1] != classes[:, -1:]


def _classes(found: ChainLogits) -> NDArray[np.intp]:
    """The likeliest class [N, E + 1] after each graph."""
    return np.column_stack([logits.argmax(1) for logits in found.logits.values()])
