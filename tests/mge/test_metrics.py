"""Figures of merit against values worked out by hand."""

import numpy as np
import pytest

from mge.metrics import expected_calibration_error, log_softmax, paired_bootstrap, top_k_correct, view_areas


def test_top_k():
    logits = np.array([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = np.array([0, 1, 2])
    assert top_k_correct(logits, labels, 1).tolist() == [True, False, False]
    assert top_k_correct(logits, labels, 2).tolist() == [True, True, False]


def test_log_softmax_of_large_logits():
    np.testing.assert_allclose(np.exp(log_softmax(np.array([[1000.0, 1000.0]]))), [[0.5, 0.5]])


def test_calibration_error_of_a_known_mixture():
    # Four answers at confidence 0.75, two of them right: the gap is 0.25.
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    assert expected_calibration_error(logits, np.array([0, 0, 1, 1])) == pytest.approx(0.25)
    # Two bins, half of the images each: 0.9 right always (gap 0.1), 0.6 right never (gap 0.6).
    logits = np.log(np.array([[0.9, 0.1], [0.6, 0.4]]))
    assert expected_calibration_error(logits, np.array([0, 1])) == pytest.approx(0.35)


def test_view_areas_are_shares_of_the_first_view():
    views = np.array([[[0, 0, 10, 20], [0, 0, 5, 20], [1, 1, 3, 11]]])
    np.testing.assert_allclose(view_areas(views), [[1, 0.5, 0.1]])


def test_bootstrap_interval_holds_the_difference_and_shrinks_with_pairing():
    random = np.random.default_rng(0)
    first = random.random(400) < 0.9
    second = first & (random.random(400) < 0.97)
    mean, low, high = paired_bootstrap(first, second)
    assert mean == pytest.approx(first.mean() - second.mean())
    assert 0 < low < mean < high < 0.06
