"""The guarantee of early exits, on logits whose true risk is known, and the temperatures they rest on."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from mge_calibration.collect import ChainLogits
from mge_calibration.exits import (
    NEVER,
    apply_exits,
    certify,
    count_disagreements,
    fewest_images,
    learn_exits,
    propose_path,
    stops,
    upper_bound,
)
from mge_calibration.images import LabeledImage
from mge_calibration.quality import learn_temperatures
from mge_runtime.calibrated import Promise, confidence

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
def test_the_least_is_the_least_for_other_guarantees(epsilon, delta):
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


def test_the_guarantee_holds_over_many_draws(draws):
    counts, risk, cost = draws
    kept = certify(counts, 600, EPSILON, DELTA)
    violations = int((risk[kept] > EPSILON).sum())
    assert violations <= MARGIN
    assert violations > 0  # a rule that never comes near the limit would prove nothing
    assert cost[kept].mean() < 0.75


def test_the_guarantee_fails_for_a_rule_without_the_bound(draws):
    counts, risk, _ = draws
    kept = np.logical_and.accumulate(counts / 600 <= EPSILON, axis=1).sum(1)
    assert (risk[kept] > EPSILON).sum() > 2 * MARGIN


def test_the_guarantee_fails_for_the_best_of_many_tested_each_alone():
    # Candidates that do not follow from one another: with the bound but without the sequence, one of fifty passes by
    # chance alone.
    rng = np.random.default_rng(6)
    counts = rng.binomial(600, 1.2 * EPSILON, (2000, 50))
    alone = (upper_bound(counts, 600, DELTA) <= EPSILON).any(1).sum()
    assert alone > 2 * MARGIN
    assert (certify(counts, 600, EPSILON, DELTA) > 0).sum() <= MARGIN


SAME = {"mean_logits_1": 1.0, "mean_logits_2": 1.0, "logits": 1.0}


def make_answers(count, seed, *, noise=(1.0, 0.3)):
    """ChainLogits of two experts, which are the last one's with noise."""
    rng = np.random.default_rng(seed)
    last = rng.normal(0, 4, (count, 6))
    labels = np.where(rng.random(count) < 0.9, last.argmax(1), rng.integers(6, size=count))
    early = [last + rng.normal(0, scale, last.shape) for scale in noise]
    logits = {name: v.astype(np.float32) for name, v in zip(SAME, (*early, last), strict=True)}
    images = tuple(LabeledImage(str(i), None, int(label), str(i)) for i, label in enumerate(labels))
    return ChainLogits(images, labels, logits)


@pytest.fixture(scope="module")
def answers():
    return make_answers(500, 0), make_answers(1000, 1)


def test_exits_are_what_their_figures_say(answers):
    outcome = learn_exits(*answers, SAME, COSTS, Promise(0.02, 0.05), seed=0)
    tested = answers[1]
    sure = np.column_stack([confidence(tested.logits[n], 1.0) for n in ("mean_logits_1", "mean_logits_2")])
    stopped = stops(sure, list(outcome.thresholds.values()))
    classes = np.column_stack([v.argmax(1) for v in tested.logits.values()])
    got = classes[np.arange(1000), stopped]
    assert 0 < outcome.disagreements == (got != classes[:, 2]).sum()
    assert outcome.bound <= 0.02
    assert binom.cdf(outcome.disagreements, 1000, outcome.bound) == pytest.approx(0.05)
    assert list(outcome.stopped.values()) == np.bincount(stopped, minlength=3).tolist()
    assert outcome.mean_cost == pytest.approx(np.array(COSTS)[stopped].mean())
    assert outcome.mean_cost_share == pytest.approx(outcome.mean_cost / 4)
    assert outcome.mean_cost_share < 0.6
    assert outcome.accuracy == pytest.approx((got == tested.labels).mean())
    assert outcome.accuracy_full == pytest.approx((classes[:, 2] == tested.labels).mean())
    assert outcome.accuracy_change.value == pytest.approx(outcome.accuracy - outcome.accuracy_full)
    applied = apply_exits(tested, SAME, outcome.thresholds)
    assert [part.tolist() for part in applied] == [stopped.tolist(), got.tolist()]


def test_a_larger_epsilon_saves_more(answers):
    costs = [learn_exits(*answers, SAME, COSTS, Promise(e, 0.05), seed=0).mean_cost_share for e in (0.005, 0.02, 0.1)]
    assert costs[0] > costs[1] > costs[2]


def test_thresholds_are_chosen_from_a_path_that_the_tested_images_do_not_shape(answers):
    proposing, tested = answers
    final = proposing.logits["logits"].argmax(1)
    early = [proposing.logits[name] for name in ("mean_logits_1", "mean_logits_2")]
    sure = np.column_stack([confidence(logits, 1.0) for logits in early])
    differs = np.column_stack([logits.argmax(1) != final for logits in early])
    path = {tuple(None if np.isinf(t) else t for t in row) for row in propose_path(sure, differs, COSTS, 6)}
    found = set()
    for seed in range(6):
        some = tested.take(np.random.default_rng(seed).permutation(1000)[:700])
        found.add(tuple(learn_exits(proposing, some, SAME, COSTS, Promise(0.02, 0.05), seed=0).thresholds.values()))
    assert len(found) > 1
    assert found <= path


def test_too_few_images_are_said_so(answers):
    reason = learn_exits(answers[0], answers[1].take(np.arange(298)), SAME, COSTS, Promise(0.01, 0.05), seed=0)
    assert "too few images for the guarantee: 298" in reason
    assert "at least 299" in reason


def test_experts_that_never_agree_get_no_exits():
    proposing, testing = (make_answers(400, seed, noise=(60, 60)) for seed in (2, 3))
    reason = learn_exits(proposing, testing, SAME, COSTS, Promise(0.01, 0.05), seed=0)
    assert "no exit keeps the guarantee" in reason
    assert "400 images" in reason


def test_a_chain_with_a_single_answer_has_nowhere_to_stop(answers):
    one = [ChainLogits(a.images, a.labels, {"logits": a.logits["logits"]}) for a in answers]
    assert "single graph" in learn_exits(*one, SAME, COSTS, Promise(0.5, 0.5), seed=0)


def test_temperatures_are_judged_on_the_other_images(answers):
    fitted, judged = answers
    outcome = learn_temperatures(fitted, judged, seed=0)["mean_logits_1"]
    again = learn_temperatures(judged, judged, seed=0)["mean_logits_1"]
    assert outcome.fit.temperature == learn_temperatures(fitted, fitted, seed=0)["mean_logits_1"].fit.temperature
    assert outcome.before == again.before
    assert outcome.fit != again.fit
    assert again.after.nll.value < outcome.after.nll.value < outcome.before.nll.value
    assert sum(count for _, _, count in outcome.after.bins) == 1000
