from importlib import import_module

import numpy as np
import pytest

from mge_calibration.int8.ranges import BINS, METHODS, STRIDE, Magnitudes
from mge_runtime.backends.onnxruntime import load_onnxruntime


def clip_range(values, method):
    seen = Magnitudes(float(np.abs(values).max()))
    for part in np.array_split(np.repeat(values, STRIDE), 4):  # each value is counted once, whatever the stride
        seen.add(part)
    return seen.clip_range(method)


@pytest.fixture(scope="module")
def laplace():
    """Many small values, few large ones, as activations are, and one far out."""
    values = np.random.default_rng(0).laplace(0, 1, 200_000).astype(np.float32)
    values[7] = 40.0
    return values


def test_max_keeps_all(laplace):
    assert clip_range(laplace, "max") == pytest.approx(40.0)


@pytest.mark.parametrize("method", ["entropy", "percentile", "mse"])
def test_the_others_clip_what_is_far_out(laplace, method):
    assert np.percentile(np.abs(laplace), 95) < clip_range(laplace, method) < 20


@pytest.mark.parametrize("method", list(METHODS))
def test_values_that_all_count_alike_are_all_kept(method):
    values = np.random.default_rng(1).uniform(-3, 3, 100_000).astype(np.float32)
    assert clip_range(values, method) == pytest.approx(3, rel=0.03)


def squared_error(values, largest):
    step = largest / 127
    return float(((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2).mean())


def test_mse_is_the_least_of_many(laplace):
    kept = squared_error(laplace, clip_range(laplace, "mse"))
    assert kept <= 1.02 * min(squared_error(laplace, largest) for largest in np.linspace(2, 40, 100))
    assert kept < 0.6 * squared_error(laplace, 40.0)


def test_percentile_is_onnxruntimes(laplace):
    calibrate = import_module(f"{load_onnxruntime().__name__}.quantization.calibrate")
    collector = calibrate.HistogramCollector("percentile", True, BINS, 128, 99.99, "same")
    collector.collect({"x": laplace})
    low, high, *_ = collector.compute_collection_result()["x"]
    assert clip_range(laplace, "percentile") == pytest.approx(max(abs(float(low)), abs(float(high))), abs=2 * 40 / BINS)


def test_zeros_of_a_relu_do_not_move_entropy(laplace):
    positive = np.maximum(laplace, 0)
    more = np.concatenate([positive, np.zeros(len(positive), np.float32)])
    assert clip_range(more, "entropy") == clip_range(positive, "entropy")
