"""Figures of merit against values worked out by hand."""

import numpy as np
import pytest

from mge_runtime.metrics import bootstrap_mean, calibration_bins, calibration_error, log_softmax


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


def test_bootstrap_interval_holds_the_difference_and_shrinks_with_pairing():
    random = np.random.default_rng(0)
    first = random.random(400) < 0.9
    second = first & (random.random(400) < 0.97)
    mean, low, high = bootstrap_mean(first.astype(float) - second)
    assert mean == pytest.approx(first.mean() - second.mean())
    assert 0 < low < mean < high < 0.06
    assert high - low < 0.6 * np.diff(bootstrap_mean(first)[1:])[0]


def test_a_bootstrap_in_pieces_draws_as_often_as_it_is_told():
    values = np.arange(100_000) % 2  # 42 resamples at once
    mean, low, high = bootstrap_mean(values, resamples=200)
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(len(values)), rel=0.3)
