"""What stopping early costs."""

import numpy as np
import pytest

from mge_calibration.cost import chain_cost, measure_times
from mge_runtime.bundle import Bundle
from mge_runtime.calibrated import Calibrated, Promise
from mge_runtime.pipeline import Pipeline


def test_what_a_stop_costs_is_the_sum_of_the_graphs_before_it(tiny_path):
    with Bundle.open(tiny_path) as bundle:
        cost = chain_cost(bundle.manifest)
    assert cost.unit == "GMACs"
    assert cost.stops == pytest.approx([1e-6, 3e-6, 6e-6])


def test_every_stop_is_timed(tiny_path):
    with Pipeline.open(tiny_path, threads=1) as pipeline:
        times = measure_times(pipeline, [np.zeros((32, 32, 3), np.uint8)])
    assert (times.images, len(times.stops), times.exits) == (1, 3, None)
    assert all(0 < time < 1000 for time in (*times.stops, times.full))


class Slow:
    """A pipeline whose runs take as long as its frame says, in ms: with exits, and without by where they stop."""

    def __init__(self, pipeline):
        self.manifest, self.calibrated = pipeline.manifest, Calibrated({}, {"mean_logits_1": 0.5}, Promise(0.01, 0.05))
        self.now, self.order = 0.0, []

    def run(self, frame, *, exit, outputs):  # noqa: ARG002 - as the pipeline's
        self.order.append(exit)
        self.now += frame.max() * {1: 1, 2: 2, "never": 4, "calibrated": 3}[exit] / 1e3


def test_exits_are_timed_beside_the_full_chain(tiny_path, monkeypatch):
    with Pipeline.open(tiny_path, threads=1) as pipeline:
        slow = Slow(pipeline)
    monkeypatch.setattr("mge_calibration.cost.time.perf_counter", lambda: slow.now)
    frames = [np.full((32, 32, 3), value, np.uint8) for value in (1, 2, 9)]
    times = measure_times(slow, frames, rounds=2)
    assert times.stops == pytest.approx([2, 4, 8])  # medians over images
    assert (times.full, times.exits) == pytest.approx((16, 12))  # means over images
    assert len(slow.order) == 3 * 3 * 4  # with a round that is not counted
    groups = {tuple(slow.order[start : start + 4]) for start in range(0, 36, 4)}
    assert len(groups) == 4  # each way comes first somewhere
    assert all(set(group) == {1, 2, "never", "calibrated"} for group in groups)
