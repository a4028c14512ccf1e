"""The promise of early exits, on answers whose true risk is known."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from mge_calibration.exits import NEVER, certify, count_disagreements, fewest_images, stops, upper_bound
from mge_calibration.path import propose_path

COSTS = (1.0, 2.0, 4.0)
CLASSES = 10


def population(count, rng):
    """Confidence [N, 2] and disagreement [N, 2] of two answers; the second is the surer one and more often right."""
    ease = rng.beta(2, 1, count)
    noise = rng.normal(0, 0.6, (count, 2))
    odds = np.log(ease / (1 - ease + 1e-9))[:, None] * 1.5 + (0.5, 1.5) + noise
    confidence = 0.1 + 0.9 / (1 + np.exp(-odds))
    differs = rng.random((count, 2)) < 0.6 * (1 - confidence) ** 1.3 + (0.004, 0.001)
    return confidence, differs


def test_299_images_without_a_disagreement_are_the_least():
    assert fewest_images(0.01, 0.05) == 299
    for images, kept in ((298, 0), (299, 1)):
        assert certify(np.array([0]), images, 0.01, 0.05) == kept


@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 0.05), (0.03, 0.05), (0.1, 0.2), (0.5, 0.5)])
def test_the_least_is_the_least_for_other_promises(epsilon, delta):
    least = fewest_images(epsilon, delta)
    assert (1 - epsilon) ** least <= delta < (1 - epsilon) ** (least - 1)


def test_the_bound_is_where_so_few_disagreements_become_unlikely():
    for count in (0, 1, 7, 120):
        bound = float(upper_bound(count, 200, 0.05))
        assert binom.cdf(count, 200, bound) == pytest.approx(0.05, rel=1e-6)
    assert upper_bound(200, 200, 0.05) == 1
    assert upper_bound(0, 200, 0.05) == pytest.approx(1 - 0.05 ** (1 / 200))


def test_testing_ends_at_the_first_failure():
    # With 2000 images at 1 %, 12 disagreements pass and 13 do not.
    assert certify(np.array([12]), 2000, 0.01, 0.05) == 1
    assert certify(np.array([13]), 2000, 0.01, 0.05) == 0
    counts = np.array([[0, 5, 13, 5, 0], [13, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
    assert certify(counts, 2000, 0.01, 0.05).tolist() == [2, 0, 5]
    assert certify(counts, 0, 0.01, 0.05).tolist() == [0, 0, 0]


def test_an_image_gets_the_first_answer_that_is_sure_enough():
    confidence = np.array([[0.9, 0.1], [0.5, 0.8], [0.5, 0.7], [0.9, 0.9]])
    assert stops(confidence, [0.9, 0.8]).tolist() == [0, 1, 2, 0]
    assert stops(confidence, [NEVER, 0.8]).tolist() == [2, 1, 2, 1]
    assert stops(confidence, [NEVER, NEVER]).tolist() == [2, 2, 2, 2]


def test_disagreements_are_counted_where_images_stop():
    confidence, differs = population(500, np.random.default_rng(0))
    path = np.array([[NEVER, NEVER], [0.95, NEVER], [0.8, 0.6], [0.1, 0.1]])
    expected = []
    for thresholds in path:
        count = 0
        for sure, differ in zip(confidence, differs, strict=True):
            first = next((k for k in range(2) if sure[k] >= thresholds[k]), None)
            count += first is not None and bool(differ[first])
        expected.append(count)
    assert count_disagreements(confidence, differs, path).tolist() == expected
    assert expected[0] == 0
    assert expected[-1] > expected[1]


def test_a_path_exits_ever_more_and_ends_with_everything_at_the_first_answer():
    confidence, differs = population(400, np.random.default_rng(1))
    path = propose_path(confidence, differs, COSTS, CLASSES)
    assert len(path) > 50
    assert (np.diff(np.where(np.isinf(path), 2.0, path), axis=0) <= 0).all()
    stopped = stops(confidence, path)
    assert (np.diff(stopped, axis=0) <= 0).all()
    assert (np.diff(stopped.sum(1)) < 0).all()  # no step for nothing
    assert (stopped[-1] == 0).all()


def test_a_path_begins_with_the_answer_that_is_safe():
    confidence, differs = population(2000, np.random.default_rng(2))
    differs[:, 0] = np.random.default_rng(3).random(2000) < 0.5
    differs[:, 1] = False
    path = propose_path(confidence, differs, COSTS, CLASSES)
    both = [row for row in path if not math.isinf(row[0])]
    assert both[0][1] <= np.quantile(confidence[:, 1], 0.05)  # expert 2 ends nearly all before expert 1 ends any


def test_a_path_needs_no_disagreement_to_learn_from():
    confidence, differs = population(100, np.random.default_rng(4))
    assert len(propose_path(confidence, np.zeros_like(differs), COSTS, CLASSES)) > 10


@pytest.fixture(scope="module")
def draws():
    """2000 draws of 600 images: counts of each candidate, and the candidates' true risk and cost."""
    rng = np.random.default_rng(5)
    path = propose_path(*population(300, rng), COSTS, CLASSES)[::4]
    confidence, differs = population(100_000, rng)
    risk = count_disagreements(confidence, differs, path) / 100_000
    cost = np.array([np.array(COSTS)[stops(confidence, row)].mean() for row in path]) / COSTS[-1]
    picks = rng.integers(100_000, size=(2000, 600))
    counts = np.array([count_disagreements(confidence[rows], differs[rows], path) for rows in picks])
    return counts, np.append(0, risk), np.append(1, cost)  # index 0: no exit


EPSILON, DELTA = 0.03, 0.05
MARGIN = 2000 * DELTA + 3 * math.sqrt(2000 * DELTA * (1 - DELTA))


def test_the_promise_holds_over_many_draws(draws):
    counts, risk, cost = draws
    kept = certify(counts, 600, EPSILON, DELTA)
    violations = int((risk[kept] > EPSILON).sum())
    assert violations <= MARGIN
    assert violations > 0  # a rule that never comes near the limit would prove nothing
    assert cost[kept].mean() < 0.75


def test_the_promise_fails_for_a_rule_without_the_bound(draws):
    counts, risk, _ = draws
    kept = np.logical_and.accumulate(counts / 600 <= EPSILON, axis=1).sum(1)
    assert (risk[kept] > EPSILON).sum() > 2 * MARGIN


def test_the_promise_fails_for_the_best_of_many_tested_each_alone():
    # Candidates that do not follow from one another: with the bound but without the sequence, one of fifty passes by
    # chance alone.
    rng = np.random.default_rng(6)
    counts = rng.binomial(600, 1.2 * EPSILON, (2000, 50))
    alone = (upper_bound(counts, 600, DELTA) <= EPSILON).any(1).sum()
    assert alone > 2 * MARGIN
    assert (certify(counts, 600, EPSILON, DELTA) > 0).sum() <= MARGIN
