"""Temperatures, calibration error, its noise floor and intervals."""

import numpy as np
import pytest

from mge_calibration.quality import error_interval, mean_interval, measure_quality, noise_floor
from mge_calibration.temperature import BOUNDS, fit_temperature
from mge_runtime.metrics import calibration_error, log_softmax


def true_model(count, rng, *, shift=0.0):
    """Confidences, and whether each answer is right: with that probability, less `shift`."""
    confidence = rng.beta(4, 1.5, count)
    return confidence, rng.random(count) < confidence - shift


def test_the_floor_is_what_a_true_model_shows():
    rng = np.random.default_rng(1)
    above, errors, means = 0, [], []
    for _ in range(200):
        confidence, correct = true_model(400, rng)
        floor = noise_floor(confidence, draws=200, seed=int(rng.integers(1 << 30)))
        error = calibration_error(confidence, correct)
        above += error > np.quantile(floor, 0.95)
        errors.append(error)
        means.append(floor.mean())
    assert np.mean(errors) == pytest.approx(np.mean(means), rel=0.05)
    assert 2 <= above <= 22  # 5 % of 200, and four standard deviations


def test_a_model_that_is_too_sure_shows_more_than_the_floor():
    confidence, correct = true_model(2000, np.random.default_rng(2), shift=0.08)
    assert calibration_error(confidence, correct) > np.quantile(noise_floor(confidence), 0.999)


def test_intervals_of_the_likelihood_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(4)
    # Two classes, log-odds z: the true mean loss is that of a million images.
    odds = rng.normal(0, 2, 1_000_000)
    truth = np.logaddexp(0, -odds) / (1 + np.exp(-odds)) + np.logaddexp(0, odds) / (1 + np.exp(odds))
    held = 0
    for seed in range(120):
        odds = rng.normal(0, 2, 250)
        labels = (rng.random(250) < 1 / (1 + np.exp(-odds))).astype(int)
        logits = np.column_stack([np.zeros(250), odds])
        found = mean_interval(-log_softmax(logits)[np.arange(250), labels], resamples=1000, seed=seed)
        held += found.low <= truth.mean() <= found.high
    assert held >= 105  # 95 % of 120 are 114; 105 is four standard deviations below


def test_one_seed_gives_one_result():
    rng = np.random.default_rng(5)
    logits, labels = rng.normal(size=(80, 4)), rng.integers(4, size=80)
    first = measure_quality(logits, labels, 1.3, seed=1)
    assert first == measure_quality(logits, labels, 1.3, seed=1)
    assert first != measure_quality(logits, labels, 1.3, seed=2)


def test_intervals_hold_their_estimate():
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, (300, 5))
    quality = measure_quality(logits, logits.argmax(1), 1.0)
    for interval in (quality.nll, quality.ece):
        assert 0 <= interval.low <= interval.value <= interval.high


def test_errors_are_binned_by_confidence():
    # Too sure where it is sure, not sure enough where it is not: without bins, or with others, the gaps cancel.
    rng = np.random.default_rng(8)
    confidence = np.concatenate([np.full(500, 0.6), np.full(500, 0.9)]) + rng.uniform(-0.02, 0.02, 1000)
    correct = rng.random(1000) < 0.75
    logits = np.column_stack([np.zeros(1000), np.log(confidence / (1 - confidence))])
    ece = measure_quality(logits, correct.astype(int), 1.0).ece
    assert ece.value == pytest.approx(0.15, abs=0.03)
    assert 0.1 < ece.low < ece.value < ece.high < 0.2


def gap(confidence, way, error):
    """How much too high each confidence is, so that the mean over images is the true error: the size of the gaps."""
    third, half = np.quantile(confidence, (2 / 3, 1 / 2))
    return {
        "even": np.full(len(confidence), error),
        "surest third": np.where(confidence > third, 3 * error, 0),
        "either sign": np.where(confidence > half, error, -error),
    }[way]


UNSURE, SURE = (4, 1.5), (12, 1)  # of the beta distribution of the confidences


@pytest.mark.parametrize(
    ("way", "error", "shape"),
    [
        *(("even", 0, shape) for shape in (UNSURE, SURE)),
        *((way, *rest) for way in ("even", "surest third", "either sign") for rest in ((0.02, SURE), (0.05, UNSURE))),
    ],
)
def test_intervals_of_the_error_hold_the_true_one_as_often_as_they_say(way, error, shape):
    """True is the binned error: the mean over the bins of |confidence - probability to be right|."""
    rng = np.random.default_rng(11)
    held, draws = 0, 100
    for seed in range(draws):
        confidence = 0.1 + 0.9 * rng.beta(*shape, 500)
        chance = np.clip(confidence - gap(confidence, way, error), 0, 1)
        true = calibration_error(confidence, chance)
        found = error_interval(confidence, rng.random(500) < chance, resamples=100, seed=seed)
        held += found.low <= true <= found.high
    assert held >= 0.93 * draws


def test_an_interval_of_the_error_tells_a_true_model_from_one_that_is_too_sure():
    rng = np.random.default_rng(14)
    confidence, correct = true_model(2000, rng)
    assert error_interval(confidence, correct).low == 0
    found = error_interval(confidence, rng.random(2000) < confidence - 0.1)
    assert 0.02 < found.low < 0.1 < found.high


def test_an_interval_of_the_error_narrows_with_the_number_of_images():
    rng = np.random.default_rng(13)
    widths = []
    for count in (200, 3200):
        found = error_interval(*true_model(count, rng, shift=0.1))
        widths.append(found.high - found.low)
    assert widths[1] < 0.5 * widths[0]


def test_answers_that_are_all_right_and_sure_have_an_interval():
    found = error_interval(np.ones(60), np.ones(60, bool))
    assert (found.value, found.low) == (0, 0)
    assert 0 < found.high < 0.2


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
