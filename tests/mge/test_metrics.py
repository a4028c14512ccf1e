"""Figures of merit against values worked out by hand."""

import numpy as np

from mge.evaluation import top_k_correct, view_areas


def test_top_k():
    logits = np.array([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = np.array([0, 1, 2])
    assert top_k_correct(logits, labels, 1).tolist() == [True, False, False]
    assert top_k_correct(logits, labels, 2).tolist() == [True, True, False]


def test_view_areas_are_shares_of_the_first_view():
    views = np.array([[[0, 0, 10, 20], [0, 0, 5, 20], [1, 1, 3, 11]]])
    np.testing.assert_allclose(view_areas(views), [[1, 0.5, 0.1]])
