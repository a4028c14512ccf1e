"""The statistics of two models on the same images."""

import numpy as np
import pytest
from scipy.stats import norm

from mge.comparison import compare_models, difference
from mge.evaluation import Predictions
from mge_runtime.errors import InputError


def test_a_difference_is_paired():
    """Two models that are right for the same images but five differ far less than two of the same accuracies apart."""
    random = np.random.default_rng(0)
    first = random.random(400) < 0.8
    second = first.copy()
    second[np.flatnonzero(~first)[:5]] = True
    found = difference(first, second)
    assert (found.only_first, found.only_second) == (0, 5)
    assert found.p == pytest.approx(2 * 0.5**5)
    assert found.change.value == pytest.approx(5 / 400)
    assert 0 < found.change.low < found.change.value < found.change.high
    half = norm.ppf(0.975) * np.sqrt(5 / 400 * (1 - 5 / 400) / 400)
    assert found.change.high - found.change.value == pytest.approx(half, rel=0.3)
    unpaired = difference(first, random.permutation(second))
    assert unpaired.change.high - unpaired.change.low > 3 * (found.change.high - found.change.low)
    assert difference(first, first).p == 1


def test_images_are_matched_by_name():
    labels = np.array([0, 1, 2])
    logits = np.eye(3)
    logits[2] = [1, 0, 0]  # the last image is taken for another class
    nothing = np.ones((3, 1)), np.zeros((3, 1, 4))
    first = Predictions(labels, {"expert 1": np.eye(3)}, *nothing), ["a", "b", "c"]
    second = Predictions(labels[::-1], {"expert 1": logits[::-1]}, *nothing), ["c", "b", "a"]
    found = compare_models(first, second)
    assert (found["only_first"], found["only_second"]) == (["c"], [])
    assert found["costs"] == [None, None]


@pytest.mark.parametrize("swapped", [False, True])
def test_classes_are_matched_by_name(swapped):
    """Models may have their classes in another order; images that changed class are others."""
    labels, nothing = np.array([0, 1, 1]), (np.ones((3, 1)), np.zeros((3, 1, 4)))
    one, other = np.eye(2)[labels], np.eye(2)[1 - labels]
    names = ["0.jpg", "1.jpg", "2.jpg"]
    first = Predictions(labels, {"expert 1": one}, *nothing, classes=("hen", "tench")), names
    if swapped:
        second = Predictions(1 - labels, {"expert 1": other}, *nothing, classes=("tench", "hen")), names
        assert compare_models(first, second)["heads"][0]["second"] == 1
    else:
        second = Predictions(labels, {"expert 1": one}, *nothing, classes=("tench", "hen")), names
        with pytest.raises(InputError, match=r"0\.jpg is of class 'hen' in the first evaluation and of 'tench' in the"):
            compare_models(first, second)
