"""Rounds, percentiles, ratios and noise: the arithmetic of `mge-bench`."""

import os
from itertools import islice, pairwise

import numpy as np
import pytest

from mge_runtime.bench import noise
from mge_runtime.bench.measure import _steps
from mge_runtime.bench.noise import Watch
from mge_runtime.bench.report_tables import _numbers
from mge_runtime.bench.rounds import Plan, Series, Stepped, interleave, plan_rounds, shuffled, warm_up
from mge_runtime.bench.stats import Percentiles, Ratio, median_interval, percentile


class Fake(Stepped):
    """Writes down when it ran."""

    unit = "ms"

    def __init__(self, name, log, ms=1.0):
        self.name, self.log, self.ms = name, log, ms
        self.steps_ms = {}

    def run(self):
        self.log.append(self.name)
        self.steps_ms = {"step": self.ms}

    def close(self):
        pass


def test_percentiles_are_numpys_and_rare_ones_need_many_runs():
    values = np.random.default_rng(0).exponential(1, 101).tolist()
    for percent in (0, 10, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert Percentiles.of(values).p99 == pytest.approx(np.percentile(values, 99))
    assert (Percentiles.of(values[:99]).p99, Percentiles.of(values[:9]).p90) == (None, None)


def test_a_ratio_is_taken_within_a_round():
    ratio = Ratio.of("x", [2, 20, 200], [1, 10, 50])  # medians apart would give 20 / 10, too; the rounds tell
    assert (ratio.median, ratio.rounds) == (2, (2, 2, 4))


def test_nothing_follows_itself_and_blocks_start_with_a_run_that_does_not_count():
    log = []
    contenders = [Fake(name, log) for name in "abc"]
    series = interleave(contenders, Plan(60, 1))
    rounds = ["".join(log[n : n + 3]) for n in range(0, len(log), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) == 6, "every order comes"
    assert all(before != after for before, after in pairwise(log))
    again = []
    interleave([Fake(name, again) for name in "abc"], Plan(60, 1))
    assert again == log, "the orders are drawn with a seed"
    log.clear()
    series = interleave(contenders[:2], Plan(2, 2))
    assert "".join(log) in ("aaabbbaaabbb", "bbbaaabbbaaa")
    assert [len(block) for block in series["a"].rounds] == [2, 2]
    assert series["a"].step_medians("step") == [1.0, 1.0]
    log.clear()
    interleave(contenders[:1], Plan(3, 1))
    assert log == ["a"] * 3


def test_probes_run_once_in_each_round():
    log = []
    series = interleave([Fake(name, log) for name in "ab"], Plan(20, 2), probes=[Fake("p", log, 7.0)])
    rounds = ["".join(log[n : n + 7]) for n in range(0, len(log), 7)]
    assert {"".join(sorted(names)) for names in rounds} == {"aaabbbp"}
    assert len({names.index("p") for names in rounds}) == 3, "in a place that is drawn"
    assert series["p"].step_medians("step") == [7.0] * 20
    assert plan_rounds([100], None, 10, probes_ms=100) == Plan(50, 1)


def test_two_that_may_follow_themselves_change_places():
    firsts = [order[0] for order in islice(shuffled("ab", apart=False), 100)]
    assert 30 < firsts.count("a") < 70
    assert len(set(firsts[:3])) == 2, "the pipelined rounds are three"
    assert len({order[0] for order in islice(shuffled("ab"), 100)}) == 1


def test_a_median_has_an_interval_that_narrows_with_the_rounds():
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for _ in range(200):
        values = rng.normal(1, 0.1, 25).tolist()
        low, high = median_interval(values, resamples=500)
        held += low <= 1 <= high
        widths.append(high - low)
    assert 0.89 <= held / 200 <= 0.99  # 95 %, with the noise of 200 draws; p10 to p90 would hold all of them
    few = Ratio.of("x", rng.normal(1, 0.1, 6).tolist(), [1] * 6)
    many = Ratio.of("x", rng.normal(1, 0.1, 600).tolist(), [1] * 600)
    assert few.interval[1] - few.interval[0] > np.mean(widths) > 3 * (many.interval[1] - many.interval[0])
    assert many.p10 < many.interval[0] < many.median < many.interval[1] < many.p90
    five = Ratio.of("x", [1, 2, 3, 4, 5], [1] * 5)
    assert five.interval is None
    assert "rounds from 1.000 to 5.000 (too few for a 95 % interval)" in _numbers(five)


def test_steps_have_percentiles_and_what_lies_between_them_is_left_over():
    rounds = [[10.0 + n % 5] * 2 for n in range(50)]  # a hundred runs: as many as the 99th percentile needs
    blocks = [[{"ingest": 1.0, "expert_1": ms - 4.0} for ms in block] for block in rounds]
    blocks[7][1]["ingest"], blocks[8][0]["ingest"] = 2.0, 2.0
    ingest, expert, between = _steps(Series(None, rounds, blocks))
    assert [step.name for step in (ingest, expert, between)] == ["ingest", "expert_1", "between the steps (derived)"]
    assert (ingest.ms, expert.ms, between.ms) == (1.0, 8.0, 3.0)
    assert (expert.times.p50, expert.times.p90, expert.times.p99) == (8.0, 10.0, 10.0)
    assert (ingest.times.p90, ingest.times.p99, ingest.times.most) == (1.0, 2.0, 2.0)
    assert (between.times.count, between.times.least, between.times.most) == (100, 2.0, 3.0)
    assert expert.share == pytest.approx(8 / 12)


def test_a_plan_keeps_to_its_time_or_to_its_iterations():
    assert plan_rounds([1000, 1100], None, 40) == Plan(19, 1)
    assert plan_rounds([9000, 8000], None, 40) == Plan(2, 1), "what fits, though six are enough for an interval"
    assert plan_rounds([9000, 8000], None, 1) == Plan(1, 1)
    assert plan_rounds([2, 200], None, 4) == Plan(6, 2), "rounds go before runs in a round"
    assert plan_rounds([1, 2], None, 40).runs == 10
    plan = plan_rounds([1, 2], 100, 40)
    assert plan.rounds * plan.runs >= 100
    assert plan_rounds([1, 2], 3, 40) == Plan(3, 1)


def test_warming_up_ends_when_nothing_gets_faster():
    log = []
    assert warm_up([Fake("a", log)], 7)[0] == len(log) == 7
    count, estimates = warm_up([Fake("a", log)], None)
    assert 4 <= count <= 20
    assert set(estimates) == {"a"}


def test_noise_counts_others_on_our_processors_alone(monkeypatch):
    ours = sorted(os.sched_getaffinity(0))[0]
    ticks = os.sysconf("SC_CLK_TCK")
    lines = iter([0, 3 * ticks])
    busy = {"ticks": 0}

    def read(path):
        if path == noise._STAT:
            busy["ticks"] = next(lines)
            used = busy["ticks"]
            return f"cpu 0\ncpu{ours} {used} 0 0 {used} 0 0 0 {used // 2}\ncpu999 {9 * used} 0 0 0 0 0 0 0"
        return "0.5 0.4 0.3"

    monkeypatch.setattr(noise, "_read", read)
    moments = iter([(10.0, 5.0), (13.0, 6.0)])

    def now():
        wall, own = next(moments)
        monkeypatch.setattr(noise.time, "perf_counter", lambda: wall)
        monkeypatch.setattr(noise.os, "times", lambda: os.times_result((own, 0.0, 0.0, 0.0, 0.0)))
        return real()

    real = noise._now
    monkeypatch.setattr(noise, "_now", now)
    found = Watch().stop("x", [1.0, 1.0, 2.0])
    assert found.others == pytest.approx((3 - 1) / 3)
    assert found.steal == pytest.approx(0.2)
    assert found.spread == pytest.approx(0.8)
    assert found.warning.startswith("too noisy to trust: the rounds of 'x' lie 80% apart, other processes kept 0.7")
