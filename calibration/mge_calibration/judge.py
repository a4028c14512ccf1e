"""From answers to temperatures and exit thresholds, with the figures that say how good they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge_calibration.collect import Answers
from mge_calibration.cost import Cost
from mge_calibration.exits import NEVER, certify, count_disagreements, fewest_images, stops, upper_bound
from mge_calibration.intervals import Interval
from mge_calibration.metrics import Quality, measure_quality
from mge_calibration.path import propose_path
from mge_calibration.temperature import Fit, fit_temperature
from mge_runtime.calibrated import Promise, confidence
from mge_runtime.metrics import bootstrap_mean, calibration_bins

__all__ = [
    "ExitCurve",
    "ExitOutcome",
    "TemperatureOutcome",
    "apply_exits",
    "learn_exits",
    "learn_temperatures",
]


@dataclass(frozen=True)
class TemperatureOutcome:
    """One answer's temperature, and its probabilities before and after on the images that judge it."""

    answer: str
    fit: Fit
    before: Quality  # at temperature 1
    after: Quality
    bins_before: list[tuple[float, float, int]]  # mean confidence, accuracy, images
    bins_after: list[tuple[float, float, int]]


@dataclass(frozen=True, eq=False)
class ExitCurve:
    """The J candidates of the path on the images that test them, for the plot."""

    cost: NDArray[np.float64]  # [J], mean, as a share of the full chain's
    accuracy: NDArray[np.float64]  # [J], in [0, 1]
    disagreement: NDArray[np.float64]  # [J], in [0, 1]
    bound: NDArray[np.float64]  # [J], upper bound on it
    always: tuple[tuple[float, float], ...]  # cost share and accuracy of stopping every image after each answer


@dataclass(frozen=True)
class ExitOutcome:
    """Thresholds and what they do on the images that set them."""

    thresholds: Mapping[str, float | None]  # by answer before the last; None: nothing stops there
    images: int
    stopped: Mapping[str, int]  # images that each answer answers, the last one included
    disagreements: int
    bound: float  # upper bound on their share at level 1 - delta
    mean_cost: float  # in `Cost.unit`
    cost_share: float  # the same as a share of the full chain's
    accuracy: float  # in [0, 1], with exits
    accuracy_full: float  # without
    accuracy_change: Interval  # with minus without, 95 % paired bootstrap
    curve: ExitCurve


def learn_temperatures(fitted: Answers, judged: Answers, *, seed: int) -> dict[str, TemperatureOutcome]:
    """Fit a temperature for every answer on some images and judge it on others.

    Args:
        fitted: the images that set the temperatures.
        judged: those that judge them; may be the same, if there are no others.
        seed: of bootstrap and noise floor.
    """
    outcomes: dict[str, TemperatureOutcome] = {}
    for name, logits in fitted.logits.items():
        fit = fit_temperature(logits, fitted.labels)
        judged_logits, labels = judged.logits[name], judged.labels
        correct = judged_logits.argmax(1) == labels
        outcomes[name] = TemperatureOutcome(
            name,
            fit,
            measure_quality(judged_logits, labels, 1.0, seed=seed),
            measure_quality(judged_logits, labels, fit.temperature, seed=seed),
            calibration_bins(confidence(judged_logits, 1.0), correct),
            calibration_bins(confidence(judged_logits, fit.temperature), correct),
        )
    return outcomes


def learn_exits(
    proposing: Answers, testing: Answers, temperatures: Mapping[str, float], cost: Cost, promise: Promise, *, seed: int
) -> ExitOutcome | str:
    """Choose exit thresholds that keep the promise.

    Args:
        proposing: images that fix the path of candidates.
        testing: other images, which test them.
        temperatures: by answer.
        cost: of stopping after each answer.
        promise: to keep.
        seed: of the bootstrap.

    Returns:
        The outcome or, where no exit keeps the promise, the reason.
    """
    names = list(testing.logits)
    if len(names) < 2:
        return "the chain has a single answer, there is nowhere to stop before it"
    count, least = len(testing), fewest_images(promise.epsilon, promise.delta)
    if count < least:
        return (
            f"too few images for the promise: {count} to set thresholds, at least {least} are needed for epsilon "
            f"{promise.epsilon:.3g} and delta {promise.delta:.3g}: add images or allow a larger epsilon"
        )
    path = propose_path(
        *_sure(proposing, temperatures), cost.stops, classes=next(iter(testing.logits.values())).shape[1]
    )
    sure, differs = _sure(testing, temperatures)
    counts = count_disagreements(sure, differs, path)
    kept = int(certify(counts, count, promise.epsilon, promise.delta)) if len(path) else 0
    if not kept:
        return (
            "no exit keeps the promise: of the images that would stop first too many get another class than from the "
            f"full chain (epsilon {promise.epsilon:.3g}, delta {promise.delta:.3g}, {count} images)"
        )
    chosen, bounds = path[kept - 1], upper_bound(counts, count, promise.delta)
    right = np.column_stack([logits.argmax(1) == testing.labels for logits in testing.logits.values()])
    stop = stops(sure, path)  # [J, N]
    costs = np.array(cost.stops)
    got = np.take_along_axis(right[None], stop[..., None], 2)[..., 0]  # [J, N]
    shares = costs / costs[-1]
    curve = ExitCurve(
        shares[stop].mean(1),
        got.mean(1),
        counts / count,
        bounds,
        tuple((float(share), float(accuracy)) for share, accuracy in zip(shares, right.mean(0), strict=True)),
    )
    answered = stop[kept - 1]
    return ExitOutcome(
        thresholds={n: None if t == NEVER else float(t) for n, t in zip(names[:-1], chosen, strict=True)},
        images=count,
        stopped={name: int((answered == k).sum()) for k, name in enumerate(names)},
        disagreements=int(counts[kept - 1]),
        bound=float(bounds[kept - 1]),
        mean_cost=float(costs[answered].mean()),
        cost_share=float(shares[answered].mean()),
        accuracy=float(got[kept - 1].mean()),
        accuracy_full=float(right[:, -1].mean()),
        accuracy_change=Interval(*bootstrap_mean(got[kept - 1].astype(np.float64) - right[:, -1], seed=seed)),
        curve=curve,
    )


def apply_exits(
    answers: Answers, temperatures: Mapping[str, float], thresholds: Mapping[str, float | None]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where each of N images stops, by the number of the answer from 0, and the class that it gets there.

    Args:
        answers: of the images.
        temperatures: by answer.
        thresholds: by answer before the last; None: nothing stops there.
    """
    limits = [NEVER if (t := thresholds.get(name)) is None else t for name in list(answers.logits)[:-1]]
    stopped = stops(_sure(answers, temperatures)[0], limits)
    classes = np.column_stack([logits.argmax(1) for logits in answers.logits.values()])
    return stopped, classes[np.arange(len(answers)), stopped]


def _sure(answers: Answers, temperatures: Mapping[str, float]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Calibrated confidence [N, E] of the answers before the last, and whether their class differs from its."""
    *early, last = answers.logits.items()
    final = last[1].argmax(1)
    sure = np.column_stack([confidence(logits, temperatures[name]) for name, logits in early])
    return sure, np.column_stack([logits.argmax(1) != final for _, logits in early])
