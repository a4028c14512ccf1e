"""One temperature for every answer, so that a probability means what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge_runtime.metrics import log_softmax

__all__ = ["BOUNDS", "Fit", "fit_temperature"]

BOUNDS = (0.05, 20.0)  # temperatures beyond are a sign of too few images, or of answers that are all right


@dataclass(frozen=True)
class Fit:
    """A temperature and whether the data set it."""

    temperature: float  # > 0; the logits are divided by it
    bounded: bool  # the likelihood still rises beyond `BOUNDS`


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
