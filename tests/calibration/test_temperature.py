"""Temperatures, how good probabilities are before and after them, and the figures that say so, by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest

from mge_calibration.collect import ChainLogits
from mge_calibration.quality import measure_quality, noise_floor
from mge_calibration.temperature import BOUNDS, fit_temperature, learn_temperatures
from mge_runtime.metrics import calibration_bins, calibration_error, log_softmax, share_interval


def draw(temperature, count, seed=0, classes=8):
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, classes)).astype(np.float32)
    probabilities = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    return logits, (rng.random((count, 1)) < probabilities.cumsum(1)).argmax(1)


@pytest.mark.parametrize("temperature", [0.4, 2.7])
def test_the_temperature_that_drew_the_labels_is_found(temperature):
    fit = fit_temperature(*draw(temperature, 20_000))
    assert fit.temperature == pytest.approx(temperature, rel=0.03)
    assert not fit.bounded


@pytest.mark.parametrize("end", [0, 1], ids=["all right", "pure chance"])
def test_labels_that_set_no_temperature_end_at_a_bound(end):
    logits, _ = draw(1.0, 4000)
    labels = np.random.default_rng(9).integers(8, size=4000) if end else logits.argmax(1)
    fit = fit_temperature(100 * logits if end else logits, labels)
    assert fit.bounded
    assert fit.temperature == pytest.approx(BOUNDS[end], rel=1e-2)


def test_temperatures_are_judged_on_the_other_images():
    found = [ChainLogits((), labels, {"logits": logits}) for logits, labels in (draw(2, 500), draw(2, 400, seed=1))]
    outcome, again = (learn_temperatures(fitted, found[1], seed=0)["logits"] for fitted in found)
    assert outcome.fit == fit_temperature(found[0].logits["logits"], found[0].labels)
    assert outcome.before == again.before
    assert again.after.nll.value < outcome.after.nll.value < outcome.before.nll.value
    assert sum(count for _, _, count in outcome.after.bins) == 400


def true_model(count, rng, *, shift=0.0):
    """Confidences, and whether each class is right: with that probability, less `shift`."""
    confidence = rng.beta(4, 1.5, count)
    return confidence, rng.random(count) < confidence - shift


def test_the_floor_is_what_a_true_model_shows():
    rng = np.random.default_rng(1)
    above, errors, means = 0, [], []
    for seed in range(100):
        confidence, correct = true_model(400, rng)
        floor = noise_floor(confidence, draws=100, seed=seed)
        errors.append(calibration_error(confidence, correct))
        means.append(floor.mean())
        above += errors[-1] > np.quantile(floor, 0.95)
    assert np.mean(errors) == pytest.approx(np.mean(means), rel=0.05)
    assert above <= 14  # 5 % of 100, and four standard deviations


def test_an_overconfident_model_shows_more_than_the_floor():
    confidence, correct = true_model(2000, np.random.default_rng(2), shift=0.08)
    assert calibration_error(confidence, correct) > np.quantile(noise_floor(confidence), 0.999)


def test_errors_are_binned_by_confidence():
    # Overconfident where it is confident, underconfident where it is not: without bins the gaps cancel.
    rng = np.random.default_rng(8)
    confidence = np.concatenate([np.full(500, 0.6), np.full(500, 0.9)]) + rng.uniform(-0.02, 0.02, 1000)
    correct = rng.random(1000) < 0.75
    logits = np.column_stack([np.zeros(1000), np.log(confidence / (1 - confidence))])
    assert measure_quality(logits, correct.astype(int), 1.0).ece == pytest.approx(0.15, abs=0.03)


def test_one_seed_gives_one_result():
    logits, labels = draw(1.3, 80)
    first = measure_quality(logits, labels, 1.3, seed=1)
    assert first == measure_quality(logits, labels, 1.3, seed=1)
    assert first != measure_quality(logits, labels, 1.3, seed=2)


def test_the_error_is_the_mean_gap_over_bins_of_equal_mass():
    confidence = np.array([0.9, 0.2, 0.6, 0.4, 0.8, 0.3])
    correct = np.array([True, False, False, True, True, False])
    # Three bins of two images: (0.2, 0.3), (0.4, 0.6), (0.8, 0.9).
    expected = (abs(0 - 0.25) + abs(0.5 - 0.5) + abs(1 - 0.85)) / 3
    assert calibration_error(confidence, correct, 3) == pytest.approx(expected)
    assert calibration_bins(confidence, correct, 3) == [
        pytest.approx(row) for row in ((0.25, 0.0, 2), (0.5, 0.5, 2), (0.85, 1.0, 2))
    ]


def test_fewer_images_than_bins_are_a_bin_each():
    assert calibration_error(np.array([0.5, 1.0]), np.array([True, True]), 15) == pytest.approx(0.25)


def test_log_softmax_of_large_logits():
    np.testing.assert_allclose(np.exp(log_softmax(np.array([[1000.0, 1000.0]]))), [[0.5, 0.5]])


@pytest.mark.parametrize(("count", "total"), [(0, 10), (10, 10), (494, 538), (1, 1)])
def test_the_interval_of_a_share_is_wilsons(count, total):
    expected = binomtest(count, total).proportion_ci(method="wilson")
    assert share_interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-6)
