"""Temperature scaling: fit a temperature for each tensor of logits, judge the probabilities, write it to a chain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mge_runtime.metrics import bin_starts, calibration_bins, calibration_error, log_softmax

if TYPE_CHECKING:
    import onnx

    from mge_calibration.collect import ChainLogits

__all__ = [
    "BOUNDS",
    "TEMPERATURE",
    "Fit",
    "Interval",
    "Quality",
    "TemperatureOutcome",
    "fit_temperature",
    "learn_temperatures",
    "mean_interval",
    "measure_quality",
    "noise_floor",
    "set_temperature",
    "with_temperature",
]

BOUNDS = (0.05, 20.0)  # temperatures beyond are a sign of too few images, or of predictions that are all right
TEMPERATURE = "temperature"  # of `chain.onnx`: a scalar initializer, and a member of its metadata_props
_RESAMPLES = 1000
_CHUNK = 1 << 22  # values drawn at once


@dataclass(frozen=True)
class Fit:
    """A temperature and whether the data set it."""

    temperature: float  # > 0; the logits are divided by it
    bounded: bool  # the likelihood still rises beyond `BOUNDS`


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
    ece: float  # in [0, 1], expected calibration error
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


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> Fit:
    """The T that minimises the mean negative log-likelihood of softmax(logits / T).

    Temperature scaling of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. The loss is convex in
    1 / T, so it has one minimum over log T, which is where SciPy's bounded scalar search looks for it. The likeliest
    class stays what it was.

    Args:
        logits: [N, C], finite.
        labels: [N], class indices.
    """
    from scipy.optimize import minimize_scalar

    scores = logits.astype(np.float64)
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(scores / math.exp(log_temperature))[rows, labels].mean())

    low, high = map(math.log, BOUNDS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    best = float(found.x)
    return Fit(math.exp(best), bounded=min(best - low, high - best) < 1e-3)


def measure_quality(
    logits: NDArray[np.floating], labels: NDArray[np.integer], temperature: float, *, seed: int = 0
) -> Quality:
    """Likelihood and calibration of softmax(logits / temperature).

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
        calibration_error(confidence, correct),
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


def noise_floor(confidence: NDArray[np.float64], *, draws: int = _RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """The ECE of a model whose every probability is true, on this many images: above zero by chance alone.

    Labels are drawn from the probabilities themselves; the predicted class is right with probability `confidence`.

    Args:
        confidence: [N], calibrated.
        draws: sets of labels.
        seed: of the draws.

    Returns:
        [draws], unsorted.
    """
    rng, ordered, starts = np.random.default_rng(seed), np.sort(confidence), bin_starts(len(confidence))
    gaps = ((rng.random(len(ordered)) < ordered) - ordered for _ in range(draws))
    return np.array([np.abs(np.add.reduceat(gap, starts)).sum() / len(ordered) for gap in gaps])


def set_temperature(model: onnx.ModelProto, value: float) -> None:
    """Set the temperature of a `chain.onnx` in place.

    Args:
        model: the chain, whose probabilities are softmax(logits / T).
        value: T, > 0.
    """
    from onnx import helper, numpy_helper

    kept = [tensor for tensor in model.graph.initializer if tensor.name != TEMPERATURE]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, numpy_helper.from_array(np.array(value, np.float32), TEMPERATURE)])
    props = {entry.key: entry.value for entry in model.metadata_props} | {TEMPERATURE: repr(value)}
    helper.set_model_props(model, props)


def with_temperature(chain: bytes, value: float) -> bytes:
    """A serialized `chain.onnx` with another temperature; its weights stay where they are.

    Args:
        chain: serialized ModelProto.
        value: T, > 0.
    """
    import onnx

    model = onnx.load_model_from_string(chain)
    set_temperature(model, value)
    return model.SerializeToString(deterministic=True)
