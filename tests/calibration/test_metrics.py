"""Calibration error, its noise floor and intervals."""

import numpy as np
import pytest

from mge_calibration.metrics import calibration_bins, calibration_error, measure_quality, noise_floor


def true_model(count, rng, *, shift=0.0):
    """Confidences, and whether each answer is right: with that probability, less `shift`."""
    confidence = rng.beta(4, 1.5, count)
    return confidence, rng.random(count) < confidence - shift


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


def test_the_floor_falls_with_the_number_of_images():
    rng = np.random.default_rng(3)
    few, many = (noise_floor(rng.beta(4, 1.5, count)).mean() for count in (100, 1600))
    assert few / many == pytest.approx(4, rel=0.15)  # as the square root


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(4)
    # Two classes, log-odds z: the true mean loss is that of a million images.
    odds = rng.normal(0, 2, 1_000_000)
    truth = np.logaddexp(0, -odds) / (1 + np.exp(-odds)) + np.logaddexp(0, odds) / (1 + np.exp(odds))
    held = 0
    for seed in range(120):
        odds = rng.normal(0, 2, 250)
        labels = (rng.random(250) < 1 / (1 + np.exp(-odds))).astype(int)
        logits = np.column_stack([np.zeros(250), odds])
        nll = measure_quality(logits, labels, 1.0, seed=seed).nll
        held += nll.low <= truth.mean() <= nll.high
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


def test_the_interval_of_a_true_model_s_error_reaches_down_to_none():
    # Percentiles of resamples would begin near the floor: a resample's error is that of a resample of a resample.
    rng = np.random.default_rng(7)
    odds = rng.normal(0, 2, 400)
    labels = (rng.random(400) < 1 / (1 + np.exp(-odds))).astype(int)
    quality = measure_quality(np.column_stack([np.zeros(400), odds]), labels, 1.0)
    assert quality.ece.value > 0.5 * quality.floor
    assert quality.ece.low < 0.5 * quality.floor


def test_resamples_are_binned_by_confidence():
    # Too sure where it is sure, not sure enough where it is not: without bins, or with others, the gaps cancel.
    rng = np.random.default_rng(8)
    confidence = np.concatenate([np.full(500, 0.6), np.full(500, 0.9)]) + rng.uniform(-0.02, 0.02, 1000)
    correct = rng.random(1000) < 0.75
    logits = np.column_stack([np.zeros(1000), np.log(confidence / (1 - confidence))])
    ece = measure_quality(logits, correct.astype(int), 1.0).ece
    assert ece.value == pytest.approx(0.15, abs=0.03)
    assert 0.1 < ece.low < ece.value < ece.high < 0.2
