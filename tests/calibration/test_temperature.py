"""Temperatures against answers whose temperature is known."""

import numpy as np
import pytest

from mge_calibration.temperature import BOUNDS, fit_temperature
from mge_runtime.metrics import log_softmax


def draw(temperature, count, seed=0, classes=8):
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, classes)).astype(np.float32)
    probabilities = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    labels = (rng.random((count, 1)) < probabilities.cumsum(1)).argmax(1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.7])
def test_the_temperature_that_drew_the_labels_is_found(temperature):
    fit = fit_temperature(*draw(temperature, 20_000))
    assert fit.temperature == pytest.approx(temperature, rel=0.03)
    assert not fit.bounded


def test_no_other_temperature_is_likelier():
    logits, labels = draw(1.6, 300)

    def loss(temperature):
        return -log_softmax(logits / temperature)[np.arange(300), labels].mean()

    best = fit_temperature(logits, labels).temperature
    others = np.geomspace(*BOUNDS, 400)
    assert loss(best) <= min(map(loss, others)) + 1e-9
    assert loss(best) < loss(best * 1.05)
    assert loss(best) < loss(best / 1.05)


def test_answers_that_are_all_right_end_at_the_bound():
    logits, _ = draw(1.0, 200)
    fit = fit_temperature(logits, logits.argmax(1))
    assert fit.bounded
    assert fit.temperature == pytest.approx(BOUNDS[0], rel=1e-2)


def test_answers_of_pure_chance_end_at_the_other_bound():
    logits, _ = draw(1.0, 4000)
    labels = np.random.default_rng(9).integers(8, size=4000)
    fit = fit_temperature(100 * logits, labels)
    assert fit.bounded
    assert fit.temperature == pytest.approx(BOUNDS[1], rel=1e-2)
