"""From answers to temperatures and exits, on answers made up with known disagreement."""

import numpy as np
import pytest
from scipy.stats import binom

from mge_calibration.collect import Answers
from mge_calibration.cost import Cost
from mge_calibration.exits import stops
from mge_calibration.folder import LabelledImage
from mge_calibration.judge import apply_exits, learn_exits, learn_temperatures
from mge_calibration.path import propose_path
from mge_runtime.calibrated import Promise, confidence

COST = Cost("trunks", (1.0, 2.0, 4.0))
SAME = {"mean_logits_1": 1.0, "mean_logits_2": 1.0, "logits": 1.0}


def make_answers(count, seed, *, noise=(1.0, 0.3)):
    """Answers of two experts, which are the last one's with noise."""
    rng = np.random.default_rng(seed)
    last = rng.normal(0, 4, (count, 6))
    labels = np.where(rng.random(count) < 0.9, last.argmax(1), rng.integers(6, size=count))
    early = [last + rng.normal(0, scale, last.shape) for scale in noise]
    logits = {name: v.astype(np.float32) for name, v in zip(SAME, (*early, last), strict=True)}
    images = tuple(LabelledImage(str(i), None, int(label), str(i)) for i, label in enumerate(labels))
    return Answers(images, labels, logits)


@pytest.fixture(scope="module")
def answers():
    return make_answers(500, 0), make_answers(1000, 1)


def test_exits_are_what_their_figures_say(answers):
    outcome = learn_exits(*answers, SAME, COST, Promise(0.02, 0.05), seed=0)
    tested = answers[1]
    sure = np.column_stack([confidence(tested.logits[n], 1.0) for n in ("mean_logits_1", "mean_logits_2")])
    stopped = stops(sure, list(outcome.thresholds.values()))
    classes = np.column_stack([v.argmax(1) for v in tested.logits.values()])
    got = classes[np.arange(1000), stopped]
    assert 0 < outcome.disagreements == (got != classes[:, 2]).sum()
    assert outcome.bound <= 0.02
    assert binom.cdf(outcome.disagreements, 1000, outcome.bound) == pytest.approx(0.05)
    assert list(outcome.stopped.values()) == np.bincount(stopped, minlength=3).tolist()
    assert outcome.mean_cost == pytest.approx(np.array(COST.stops)[stopped].mean())
    assert outcome.cost_share == pytest.approx(outcome.mean_cost / 4)
    assert outcome.cost_share < 0.6
    assert outcome.accuracy == pytest.approx((got == tested.labels).mean())
    assert outcome.accuracy_full == pytest.approx((classes[:, 2] == tested.labels).mean())
    assert outcome.accuracy_change.value == pytest.approx(outcome.accuracy - outcome.accuracy_full)
    applied = apply_exits(tested, SAME, outcome.thresholds)
    assert [part.tolist() for part in applied] == [stopped.tolist(), got.tolist()]


def test_a_larger_epsilon_saves_more(answers):
    costs = [learn_exits(*answers, SAME, COST, Promise(e, 0.05), seed=0).cost_share for e in (0.005, 0.02, 0.1)]
    assert costs[0] > costs[1] > costs[2]


def test_thresholds_are_chosen_from_a_path_that_the_tested_images_do_not_shape(answers):
    proposing, tested = answers
    final = proposing.logits["logits"].argmax(1)
    early = [proposing.logits[name] for name in ("mean_logits_1", "mean_logits_2")]
    sure = np.column_stack([confidence(logits, 1.0) for logits in early])
    differs = np.column_stack([logits.argmax(1) != final for logits in early])
    path = {tuple(None if np.isinf(t) else t for t in row) for row in propose_path(sure, differs, COST.stops, 6)}
    found = set()
    for seed in range(6):
        some = tested.take(np.random.default_rng(seed).permutation(1000)[:700])
        found.add(tuple(learn_exits(proposing, some, SAME, COST, Promise(0.02, 0.05), seed=0).thresholds.values()))
    assert len(found) > 1
    assert found <= path


def test_too_few_images_are_said_so(answers):
    reason = learn_exits(answers[0], answers[1].take(np.arange(298)), SAME, COST, Promise(0.01, 0.05), seed=0)
    assert "too few images for the promise: 298" in reason
    assert "at least 299" in reason


def test_experts_that_never_agree_get_no_exits():
    proposing, testing = (make_answers(400, seed, noise=(60, 60)) for seed in (2, 3))
    reason = learn_exits(proposing, testing, SAME, COST, Promise(0.01, 0.05), seed=0)
    assert "no exit keeps the promise" in reason
    assert "400 images" in reason


def test_a_chain_with_a_single_answer_has_nowhere_to_stop(answers):
    one = [Answers(a.images, a.labels, {"logits": a.logits["logits"]}) for a in answers]
    assert "single answer" in learn_exits(*one, SAME, COST, Promise(0.5, 0.5), seed=0)


def test_temperatures_are_judged_on_the_other_images(answers):
    fitted, judged = answers
    outcome = learn_temperatures(fitted, judged, seed=0)["mean_logits_1"]
    again = learn_temperatures(judged, judged, seed=0)["mean_logits_1"]
    assert outcome.fit.temperature == learn_temperatures(fitted, fitted, seed=0)["mean_logits_1"].fit.temperature
    assert outcome.before == again.before
    assert outcome.fit != again.fit
    assert again.after.nll.value < outcome.after.nll.value < outcome.before.nll.value
    assert sum(count for _, _, count in outcome.bins_after) == 1000
