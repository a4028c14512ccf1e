"""What stopping early costs."""

import sys

import numpy as np
import pytest

from mge_calibration.cost import chain_cost, measure_times
from mge_runtime.bundle import Bundle
from mge_runtime.pipeline import Pipeline

# By hand, from tiny_chain: 4 channels of 8 x 8, each a sum of 3 x 4 x 4 products; then 4 x 5 of the linear layer.
EXPERT = 4 * 8 * 8 * 3 * 4 * 4 + 4 * 5
GATE = 3 * 3


def test_multiply_accumulates_are_those_of_the_graphs(tiny_path):
    with Bundle.open(tiny_path) as bundle:
        cost = chain_cost(bundle)
    assert cost.unit == "GMACs"
    assert cost.stops == pytest.approx([EXPERT / 1e9, 2 * EXPERT / 1e9, (3 * EXPERT + GATE) / 1e9], rel=1e-12)


def test_without_onnx_trunks_are_counted(tiny_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    with Bundle.open(tiny_path) as bundle:
        cost = chain_cost(bundle)
    assert (cost.unit, cost.stops) == ("trunks", (1.0, 2.0, 3.0))  # the tiny gate has no convolution


def test_every_stop_is_timed(tiny_path):
    with Pipeline.open(tiny_path, threads=1) as pipeline:
        times = measure_times(pipeline, [np.zeros((32, 32, 3), np.uint8)], runs=5, warm_up=1)
    assert len(times) == 3
    assert all(0 < time < 1000 for time in times)
