"""Figures of merit against values worked out by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest

from mge_runtime.metrics import calibration_bins, calibration_error, log_softmax, share_interval


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
