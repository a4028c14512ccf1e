"""Temperatures against answers whose temperature is known."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mge_calibration.temperature import BOUNDS, fit_temperature, set_temperature, with_temperature
from mge_runtime.metrics import log_softmax


def draw(temperature, count, seed=0, classes=8):
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, classes)).astype(np.float32)
    probabilities = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    labels = (rng.random((count, 1)) < probabilities.cumsum(1)).argmax(1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.7])
def test_the_temperature_that_drew_the_labels_is_found(temperature):
    fit = fit_temperature(*draw(temperature, 20_000))
    assert fit.temperature == pytest.approx(temperature, rel=0.03)
    assert not fit.bounded


def test_no_other_temperature_is_likelier():
    logits, labels = draw(1.6, 300)

    def loss(temperature):
        return -log_softmax(logits / temperature)[np.arange(300), labels].mean()

    best = fit_temperature(logits, labels).temperature
    others = np.geomspace(*BOUNDS, 400)
    assert loss(best) <= min(map(loss, others)) + 1e-9
    assert loss(best) < loss(best * 1.05)
    assert loss(best) < loss(best / 1.05)


def test_answers_that_are_all_right_end_at_the_bound():
    logits, _ = draw(1.0, 200)
    fit = fit_temperature(logits, logits.argmax(1))
    assert fit.bounded
    assert fit.temperature == pytest.approx(BOUNDS[0], rel=1e-2)


def test_answers_of_pure_chance_end_at_the_other_bound():
    logits, _ = draw(1.0, 4000)
    labels = np.random.default_rng(9).integers(8, size=4000)
    fit = fit_temperature(100 * logits, labels)
    assert fit.bounded
    assert fit.temperature == pytest.approx(BOUNDS[1], rel=1e-2)


def test_a_chain_in_one_graph_takes_the_temperature_that_was_learned():
    node = helper.make_node("Div", ["logits", "temperature"], ["scaled"])
    tensors = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("logits", "scaled")]
    model = helper.make_model(helper.make_graph([node], "chain", tensors[:1], tensors[1:]))
    helper.set_model_props(model, {"size": "448"})
    for value in (1.0, 2.5):
        set_temperature(model, value)
    changed = onnx.load_from_string(with_temperature(model.SerializeToString(), 1.75))
    for chain, value in ((model, 2.5), (changed, 1.75)):
        (initializer,) = chain.graph.initializer
        assert (initializer.name, float(numpy_helper.to_array(initializer))) == ("temperature", value)
        assert {entry.key: entry.value for entry in chain.metadata_props} == {"size": "448", "temperature": str(value)}
