"""Temperature scaling: fit a temperature for each tensor of logits, judge it, write it to a chain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mge_calibration.quality import Quality, measure_quality
from mge_runtime.metrics import log_softmax

if TYPE_CHECKING:
    import onnx

    from mge_calibration.collect import ChainLogits


BOUNDS = (0.05, 20.0)  # temperatures beyond are a sign of too few images, or of predictions that are all right
TEMPERATURE = "temperature"  # of `chain.onnx`: a scalar initializer, and a member of its metadata_props


@dataclass(frozen=True)
class Fit:
    """A temperature and whether the data set it."""

    temperature: float  # > 0; the logits are divided by it
    bounded: bool  # the likelihood still rises beyond `BOUNDS`


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
    """The T that minimizes the mean negative log-likelihood of softmax(logits / T).

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
