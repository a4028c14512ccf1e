"""The guarantee of early exits, on logits whose true risk is known."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from mge_calibration.collect import ChainLogits
from mge_calibration.exits import (
    NEVER,
    apply_exits,
    certify,
    exit_indices,
    fewest_images,
    learn_exits,
    propose_path,
    upper_bound,
)
from mge_calibration.images import LabeledImage
from mge_runtime.calibrated import Guarantee, confidence

COSTS = (1.0, 2.0, 4.0)
CLASSES = 10


def population(count, rng):
    """Confidence [N, 2] and disagreement [N, 2]; the second expert is more confident and more often right."""
    ease = rng.beta(2, 1, count)
    noise = rng.normal(0, 0.6, (count, 2))
    odds = np.log(ease / (1 - ease + 1e-9))[:, None] * 1.5 + (0.5, 1.5) + noise
    confidence = 0.1 + 0.9 / (1 + np.exp(-odds))
    differs = rng.random((count, 2)) < 0.6 * (1 - confidence) ** 1.3 + (0.004, 0.001)
    return confidence, differs


def count_disagreements(confidence, differs, path):
    padded = np.column_stack([differs, np.zeros(len(differs), bool)])
    return padded[np.arange(len(differs)), exit_indices(confidence, path)].sum(-1)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 0.05), (0.1, 0.2), (0.5, 0.5), (1e-6, 0.05)])
def test_the_fewest_images_are_the_fewest(epsilon, delta):
    least = fewest_images(epsilon, delta)
    assert (1 - epsilon) ** least <= delta < (1 - epsilon) ** (least - 1)
    assert [certify(upper_bound([0], n, delta), epsilon) for n in (least - 1, least)] == [0, 1]


def test_the_bound_is_where_so_few_disagreements_become_unlikely():
    for count in (0, 1, 7, 120):
        assert binom.cdf(count, 200, upper_bound(count, 200, 0.05)) == pytest.approx(0.05, rel=1e-6)
    assert upper_bound(200, 200, 0.05) == 1


def test_testing_ends_at_the_first_failure():
    # With 2000 images at 1 %, 12 disagreements pass and 13 do not.
    counts = np.array([[0, 5, 12, 13, 0], [13, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
    assert certify(upper_bound(counts, 2000, 0.05), 0.01).tolist() == [3, 0, 5]


def test_an_image_stops_after_the_first_graph_that_is_confident_enough():
    confidence = np.array([[0.9, 0.1], [0.5, 0.8], [0.5, 0.7], [0.9, 0.9]])
    path = [[0.9, 0.8], [NEVER, 0.8], [NEVER, NEVER]]
    assert exit_indices(confidence, path).tolist() == [[0, 1, 2, 0], [2, 1, 2, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize("agree", [False, True])
def test_a_path_exits_ever_more_and_ends_with_everything_after_the_first_graph(agree):
    confidence, differs = population(400, np.random.default_rng(1))
    path = propose_path(confidence, differs & (not agree), COSTS, CLASSES)
    assert len(path) > 50
    assert (np.diff(np.where(np.isinf(path), 2.0, path), axis=0) <= 0).all()
    stopped = exit_indices(confidence, path)
    assert (np.diff(stopped, axis=0) <= 0).all()
    assert (np.diff(stopped.sum(1)) < 0).all()  # no step for nothing
    assert (stopped[-1] == 0).all()


def test_a_path_begins_with_the_exit_that_is_safe():
    confidence, differs = population(2000, np.random.default_rng(2))
    differs[:, 0] = np.random.default_rng(3).random(2000) < 0.5
    differs[:, 1] = False
    path = propose_path(confidence, differs, COSTS, CLASSES)
    both = [row for row in path if not math.isinf(row[0])]
    assert both[0][1] <= np.quantile(confidence[:, 1], 0.05)  # expert 2 ends nearly all before expert 1 ends any


EPSILON, DELTA, DRAWS = 0.03, 0.05, 1000
MARGIN = DRAWS * DELTA + 3 * math.sqrt(DRAWS * DELTA * (1 - DELTA))


@pytest.fixture(scope="module")
def draws():
    """Draws of 600 images: counts of each candidate, and the candidates' true risk and cost."""
    rng = np.random.default_rng(5)
    path = propose_path(*population(300, rng), COSTS, CLASSES)[::4]
    confidence, differs = population(100_000, rng)
    risk = count_disagreements(confidence, differs, path) / 100_000
    cost = np.array(COSTS)[exit_indices(confidence, path)].mean(1) / COSTS[-1]
    picks = rng.integers(100_000, size=(DRAWS, 600))
    counts = np.array([count_disagreements(confidence[rows], differs[rows], path) for rows in picks])
    return counts, np.append(0, risk), np.append(1, cost)  # index 0: no exit


def test_the_guarantee_holds_over_many_draws(draws):
    counts, risk, cost = draws
    kept = certify(upper_bound(counts, 600, DELTA), EPSILON)
    violations = int((risk[kept] > EPSILON).sum())
    assert 0 < violations <= MARGIN  # a rule that never comes near the limit would prove nothing
    assert cost[kept].mean() < 0.75
    unbounded = certify(counts / 600, EPSILON)
    assert (risk[unbounded] > EPSILON).sum() > 2 * MARGIN


def test_the_guarantee_fails_for_the_best_of_many_tested_each_alone():
    # Candidates that do not follow from one another: without the sequence one of fifty passes by chance alone.
    counts = np.random.default_rng(6).binomial(600, 1.2 * EPSILON, (DRAWS, 50))
    bounds = upper_bound(counts, 600, DELTA)
    assert (bounds <= EPSILON).any(1).sum() > 2 * MARGIN
    assert (certify(bounds, EPSILON) > 0).sum() <= MARGIN


SAME = {"mean_logits_1": 1.0, "mean_logits_2": 1.0, "logits": 1.0}


def make_logits(count, seed, *, noise=(1.0, 0.3)):
    """ChainLogits of two experts, which are the last one's with noise."""
    rng = np.random.default_rng(seed)
    last = rng.normal(0, 4, (count, 6))
    labels = np.where(rng.random(count) < 0.9, last.argmax(1), rng.integers(6, size=count))
    early = [last + rng.normal(0, scale, last.shape) for scale in noise]
    logits = {name: v.astype(np.float32) for name, v in zip(SAME, (*early, last), strict=True)}
    images = tuple(LabeledImage(str(i), None, int(label), str(i)) for i, label in enumerate(labels))
    return ChainLogits(images, labels, logits)


@pytest.fixture(scope="module")
def found():
    return make_logits(500, 0), make_logits(1000, 1)


def learn(proposing, testing, epsilon=0.02, delta=0.05):
    return learn_exits(proposing, testing, SAME, COSTS, Guarantee(epsilon, delta), seed=0)


def test_exits_are_what_their_figures_say(found):
    tested = found[1]
    outcome = learn(*found)
    stopped, got = apply_exits(tested, SAME, list(outcome.thresholds.values()))
    full = tested.logits["logits"].argmax(1)
    assert 0 < outcome.disagreements == (got != full).sum()
    assert outcome.bound <= 0.02
    assert binom.cdf(outcome.disagreements, 1000, outcome.bound) == pytest.approx(0.05)
    assert list(outcome.stopped.values()) == np.bincount(stopped, minlength=3).tolist()
    assert outcome.mean_cost == pytest.approx(np.array(COSTS)[stopped].mean())
    assert outcome.mean_cost_share == pytest.approx(outcome.mean_cost / 4)
    assert outcome.mean_cost_share < 0.6
    assert outcome.accuracy == pytest.approx((got == tested.labels).mean())
    assert outcome.accuracy_full == pytest.approx((full == tested.labels).mean())
    assert outcome.accuracy_change.value == pytest.approx(outcome.accuracy - outcome.accuracy_full)


def test_a_larger_epsilon_saves_more(found):
    costs = [learn(*found, epsilon).mean_cost_share for epsilon in (0.005, 0.02, 0.1)]
    assert costs[0] > costs[1] > costs[2]


def test_thresholds_are_chosen_from_a_path_that_the_tested_images_do_not_shape(found):
    proposing, tested = found
    confident = np.column_stack([confidence(proposing.logits[name], 1.0) for name in list(SAME)[:2]])
    classes = np.column_stack([logits.argmax(1) for logits in proposing.logits.values()])
    path = propose_path(confident, classes[:, :2] != classes[:, 2:], COSTS, 6)
    chosen = set()
    for seed in range(6):
        some = tested.take(np.random.default_rng(seed).permutation(1000)[:700])
        chosen.add(tuple(NEVER if t is None else t for t in learn(proposing, some).thresholds.values()))
    assert len(chosen) > 1
    assert chosen <= set(map(tuple, path))


def test_why_there_are_no_exits_is_said(found):
    reason = learn(found[0], found[1].take(np.arange(298)), 0.01)
    assert "too few images for the guarantee: 298; epsilon 0.01 and delta 0.05 need 299" in reason
    reason = learn(*(make_logits(400, seed, noise=(60, 60)) for seed in (2, 3)), 0.01)
    assert "no exit keeps the guarantee" in reason
    assert "400 images" in reason
    one = [ChainLogits(a.images, a.labels, {"logits": a.logits["logits"]}) for a in found]
    assert "single graph" in learn(*one, 0.5, 0.5)
