"""How good probabilities are before and after their temperature: likelihood and calibration error with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge_calibration.collect import ChainLogits
from mge_calibration.temperature import Fit, fit_temperature
from mge_runtime.metrics import BINS, bin_starts, calibration_bins, log_softmax

__all__ = [
    "Interval",
    "Quality",
    "TemperatureOutcome",
    "error_interval",
    "learn_temperatures",
    "mean_interval",
    "measure_quality",
    "noise_floor",
]

_RESAMPLES = 1000
_CHUNK = 1 << 22  # values drawn at once
_GRID = 41  # true errors tried
_REACH = 2.0  # how far above the measured error they go, in 1 / sqrt(N): four standard deviations and more


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """How good the probabilities of one tensor of logits are, on N images."""

    nll: Interval  # nats, mean negative log-likelihood
    ece: Interval  # in [0, 1], expected calibration error
    ece_floor: float  # the ECE that a perfectly calibrated model with these confidences shows at N images, on average
    ece_floor_95: float  # and what it stays below 95 % of the time
    bins: list[tuple[float, float, int]]  # of equal mass: mean confidence, accuracy, images


@dataclass(frozen=True)
class TemperatureOutcome:
    """The temperature of one tensor of logits, and its probabilities on the images that judge it."""

    fit: Fit
    before: Quality  # at temperature 1
    after: Quality


def learn_temperatures(fitted: ChainLogits, judged: ChainLogits, *, seed: int) -> dict[str, TemperatureOutcome]:
    """Fit a temperature for every tensor of logits on some images and judge it on others.

    Args:
        fitted: the images that set the temperatures.
        judged: those that judge them; may be the same, if there are no others.
        seed: of bootstrap and noise floor.
    """
    outcomes: dict[str, TemperatureOutcome] = {}
    for name, logits in fitted.logits.items():
        fit = fit_temperature(logits, fitted.labels)
        qualities = (measure_quality(judged.logits[name], judged.labels, t, seed=seed) for t in (1.0, fit.temperature))
        outcomes[name] = TemperatureOutcome(fit, *qualities)
    return outcomes


def measure_quality(
    logits: NDArray[np.floating], labels: NDArray[np.integer], temperature: float, *, seed: int = 0
) -> Quality:
    """Likelihood and calibration of softmax(logits / temperature), with 95 % intervals over the images.

    The likelihood's is `mean_interval`, the error's is `error_interval`.

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
    floor = noise_floor(confidence, seed=seed)
    return Quality(
        mean_interval(losses, resamples=_RESAMPLES, seed=seed),
        error_interval(confidence, correct, seed=seed),
        float(floor.mean()),
        float(np.quantile(floor, 0.95)),
        calibration_bins(confidence, correct),
    )


def mean_interval(values: NDArray[np.floating], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """A mean with its 95 % percentile bootstrap interval (Efron 1979).

    For two predictions of the same images give the differences, image by image: the bootstrap is paired then.

    Args:
        values: [N], one for each image, N >= 2.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    from scipy.stats import bootstrap

    exact, batch = values.astype(np.float64), max(1, _CHUNK // len(values))
    found = bootstrap((exact,), np.mean, n_resamples=resamples, batch=batch, method="percentile", rng=seed)
    return Interval(float(exact.mean()), *map(float, found.confidence_interval))


def noise_floor(
    confidence: NDArray[np.float64], *, bins: int = BINS, draws: int = _RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """The ECE of a model whose every probability is true, on this many images: above zero by chance alone.

    Labels are drawn from the probabilities themselves; the predicted class is right with probability `confidence`.

    Args:
        confidence: [N], calibrated.
        bins: as for `calibration_error`.
        draws: sets of labels.
        seed: of the draws.

    Returns:
        [draws], unsorted.
    """
    rng, ordered, starts = np.random.default_rng(seed), np.sort(confidence), bin_starts(len(confidence), bins)
    gaps = ((rng.random(len(ordered)) < ordered) - ordered for _ in range(draws))
    return np.array([np.abs(np.add.reduceat(gap, starts)).sum() / len(ordered) for gap in gaps])


def error_interval(
    confidence: NDArray[np.floating],
    correct: NDArray[np.bool_],
    *,
    bins: int = BINS,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The calibration error with an interval for the true one, by inverting a parametric bootstrap test.

    A measured error is biased upwards, the more the smaller the true one is: percentiles of resamples miss a true error
    of 0 more often than not. Here a true error is tried: a number of right images is drawn for each bin from its mean
    confidence less a gap, and the true error stays in the interval where errors as high as the measured one (for the
    lower end) or as low (for the upper one) come up in more than (1 - level) / 2 of the draws (Carpenter, "Test
    inversion bootstrap confidence intervals", JRSS B 61, 1999). True is the binned error, for these confidences.

    The error alone does not say which bins have the gaps. Three ways are tried and the widest interval is taken: gaps
    as they were measured, scaled; one gap in all bins, which hides least of the noise's bias; and gaps in as few of
    the most confident bins as possible, which leaves the most.

    Args:
        confidence: [N], probability of the predicted class.
        correct: [N], whether it was right.
        bins: of equal mass, as for `calibration_error`.
        resamples: draws for each true error.
        level: of the interval, in (0, 1).
        seed: of the draws.
    """
    mean, right, sizes = (np.array(column) for column in zip(*calibration_bins(confidence, correct, bins), strict=True))
    weights = sizes / sizes.sum()
    value = float(weights @ np.abs(right - mean))
    errors = np.linspace(0, min(1.0, value + _REACH / np.sqrt(len(confidence))), _GRID)
    rng, tail = np.random.default_rng(seed), (1 - level) / 2
    low = high = value
    for gaps in _ways(errors, mean, right - mean, weights):
        true = np.abs(gaps) @ weights  # not quite as asked for where an accuracy would leave [0, 1]
        drawn = rng.binomial(sizes, np.clip(mean + gaps, 0, 1)[:, None], (_GRID, resamples, len(sizes))) / sizes
        measured = np.abs(drawn - mean) @ weights  # [errors, resamples]
        low = min(low, *true[(measured >= value).mean(1) > tail], value)
        high = max(high, *true[(measured <= value).mean(1) > tail], value)
    return Interval(value, float(low), float(high))


def _ways(
    errors: NDArray[np.float64], mean: NDArray[np.float64], gaps: NDArray[np.float64], weights: NDArray[np.float64]
) -> Iterable[NDArray[np.float64]]:
    """Gaps [errors, bins] that make up each of the true errors, in three ways."""
    # One gap in all bins, downwards; less only where an accuracy would fall below 0.
    steps = np.append(0, np.sort(mean))
    yield -np.minimum(np.interp(errors, np.minimum(steps[:, None], mean) @ weights, steps)[:, None], mean)
    # Bin after bin from the most confident on, downwards: each to an accuracy of a half; where not enough, to 0.
    few, left = np.zeros((len(errors), len(mean))), errors.copy()
    for floor in (0.5, 0.0):
        for k in range(len(mean))[::-1]:
            more = np.clip(np.minimum(left / weights[k], mean[k] + few[:, k] - floor), 0, None)
            few[:, k] -= more
            left -= weights[k] * more
    yield few
    if scale := weights @ np.abs(gaps):
        yield np.clip(errors[:, None] * gaps / scale, -mean, 1 - mean)
