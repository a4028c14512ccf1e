"""Early exits in a pipeline: what a prediction says that stopped early, and what is asked for."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mge_runtime import Pipeline
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.calibrated import confidence
from mge_runtime.errors import BackendError, BundleError
from mge_runtime.prediction import softmax
from tests.helpers import chain_runs as runs

frames = runs.shuffled_frames

TEMPERATURES = {"mean_logits_1": 2.0, "mean_logits_2": 1.5, "logits": 0.8}


def calibrate(path, exits, temperatures=TEMPERATURES):
    values = {"temperatures": temperatures, "exits": None, "data": {}, "seed": 0, "made_by": "test", "report": {}}
    if exits is not None:
        values["exits"] = {"epsilon": 0.01, "delta": 0.05, "thresholds": exits}
    add_calibration(path, values)
    return path


def thresholds(path, photos):
    """Such that of the photos some leave after each graph."""
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        first = sorted(confidence(pipeline.predict(p, exit=1).logits, 2.0) for p in photos)
        second = sorted(confidence(pipeline.predict(p, exit=2).logits, 1.5) for p in photos)
    return {"mean_logits_1": float(np.mean(first[4:6])), "mean_logits_2": float(np.mean(second[3:5]))}


@pytest.fixture
def path(copy, photos):
    return calibrate(copy, thresholds(copy, photos))


@pytest.fixture
def opened(path):
    """Opens the calibrated bundle on the CPU, and closes it."""
    pipelines = []

    def open_one(exit="calibrated", **options):
        pipelines.append(Pipeline.open(path, device="cpu", **{"threads": 1, "exit": exit, **options}))
        return pipelines[-1]

    yield open_one
    for pipeline in pipelines:
        pipeline.close()


@pytest.mark.parametrize(("at_opening", "at_call"), [("calibrated", None), ("never", "calibrated")])
def test_exits_that_were_learned_elsewhere_are_noted_once(path, opened, photos, caplog, at_opening, at_call):
    with Bundle.open(path) as bundle:
        values = dict(bundle.calibration().values)
    for backend, device, lines in (("onnxruntime", "cpu", 0), ("tensorrt", "cuda:0", 1)):
        add_calibration(path, values | {"runs_on": {"backend": backend, "device": device}})
        caplog.clear()
        pipeline = opened(at_opening)
        pipeline.predict(photos[0], exit="never")
        for _ in range(2):
            pipeline.predict(photos[0], exit=at_call)
        assert [record.name for record in caplog.records] == ["mge_runtime"] * lines
    assert "they guarantee nothing for onnxruntime on cpu" in caplog.text


def same(found, expected):
    assert found.class_index == expected.class_index
    assert found.experts_used == expected.experts_used
    assert (found.temperature, found.calibrated) == (expected.temperature, expected.calibrated)
    assert found.probability == pytest.approx(expected.probability, abs=1e-5)
    for name in ("logits", "expert_logits", "boxes"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert (found.gate is None) == (expected.gate is None)
    if found.gate is not None:
        np.testing.assert_allclose(found.gate, expected.gate, rtol=1e-4)
    assert list(found.timings_ms) == list(expected.timings_ms)


def test_a_prediction_that_stops_early_is_that_of_its_graph(opened, photos):
    pipeline = opened()
    found = [pipeline.predict(photo) for photo in photos]
    assert {prediction.experts_used for prediction in found} == {1, 2, 3}
    for photo, prediction in zip(photos, found, strict=True):
        experts = prediction.experts_used
        same(prediction, pipeline.predict(photo, exit=experts))
        assert prediction.expert_logits.shape == (experts, 5)
        assert prediction.boxes.shape == (experts, 4)
        assert len(prediction.heatmaps) == experts
        assert (prediction.gate is None) == (experts < 3)
        steps = ["decode", "preprocess", *(f"expert_{k + 1}" for k in range(experts))]
        assert list(prediction.timings_ms) == [*steps, "total"]
        assert prediction.temperature == list(TEMPERATURES.values())[experts - 1]
        json.dumps(prediction.to_dict())


@pytest.mark.parametrize("batch", [3, 7, 8])
@pytest.mark.parametrize("streams", [1, 2])
def test_batches_predict_as_one_by_one_and_in_order(opened, photos, batch, streams):
    pipeline = opened(threads=2, streams=streams)
    alone = [pipeline.predict(photo) for photo in photos]
    assert {prediction.experts_used for prediction in alone} == {1, 2, 3}
    iterated = [prediction for _, prediction in pipeline.predict_iter(photos, batch=batch)]
    for found in (iterated, pipeline.predict_batch(photos)):
        for prediction, expected in zip(found, alone, strict=True):
            same(prediction, expected)


def test_time_is_shared_by_those_that_took_part(opened, photos, monkeypatch):
    pipeline = opened()
    run = pipeline._chain._executor.run

    def timed(*arguments):
        result = run(*arguments)
        return replace(result, times_ms=dict.fromkeys(result.times_ms, 12.0))

    monkeypatch.setattr(pipeline._chain._executor, "run", timed)
    found = pipeline.predict_batch(photos)
    for prediction in found:
        for expert in range(1, prediction.experts_used + 1):
            took_part = sum(other.experts_used >= expert for other in found)
            assert prediction.timings_ms[f"expert_{expert}"] == pytest.approx(12.0 / took_part)


def test_the_exit_said_when_opening_is_kept_until_a_call_says_another(opened, photos):
    pipeline = opened()
    assert {pipeline.predict(photo).experts_used for photo in photos} == {1, 2, 3}
    assert {prediction.experts_used for _, prediction in pipeline.predict_iter(photos, exit="never")} == {3}
    assert {prediction.experts_used for prediction in pipeline.predict_batch(photos, exit=2)} == {2}
    assert pipeline.run(frames(2))["logits"].shape == (2, 5), "parity checks run the whole chain unless they ask"
    first = opened(1)
    assert first.predict(photos[0]).experts_used == 1
    assert first.predict(photos[0], exit="never").experts_used == 3
    assert {prediction.experts_used for prediction in opened("never").predict_batch(photos)} == {3}


def test_frames_that_are_ready_run_with_exits_too(opened):
    pipeline = opened("never")
    tensors = pipeline.run(frames(8), exit="calibrated")
    full = pipeline.run(frames(8), outputs=["mean_logits_1", "mean_logits_2"])
    goes_on = confidence(full["mean_logits_1"], 2.0) < pipeline.calibrated.exits["mean_logits_1"]
    np.testing.assert_allclose(tensors["mean_logits_1"], full["mean_logits_1"], rtol=1e-5)
    np.testing.assert_allclose(tensors["mean_logits_2"], full["mean_logits_2"][goes_on], rtol=1e-4, atol=1e-5)


def test_probabilities_are_those_of_the_temperature_and_logits_stay_raw(copy, photos):
    with Pipeline.open(copy, device="cpu", threads=1) as pipeline:
        plain = {exit: pipeline.predict(photos[0], exit=exit) for exit in (1, 2, "never")}
    assert all(not p.calibrated and p.temperature is None for p in plain.values())
    assert plain[1].probability == pytest.approx(float(softmax(plain[1].logits).max()))
    calibrate(copy, None)
    with Pipeline.open(copy, device="cpu", threads=1) as pipeline:
        for exit, temperature in zip((1, 2, "never"), TEMPERATURES.values(), strict=True):
            found = pipeline.predict(photos[0], exit=exit)
            assert found.calibrated
            np.testing.assert_array_equal(found.logits, plain[exit].logits)
            wanted = softmax(found.logits.astype(np.float64) / temperature)
            assert found.probability == pytest.approx(wanted.max())
            assert found.probability != pytest.approx(plain[exit].probability, abs=1e-3)
            assert [p for _, p in found.top_k(3)] == pytest.approx(np.sort(wanted)[::-1][:3].tolist())
            assert found.top == found.top_k(5)
            assert found.class_index == plain[exit].class_index
            values = found.to_dict()
            assert values["calibrated"] is True
            assert values["probability"] == pytest.approx(wanted.max(), abs=1e-6)
            alone = float(softmax(found.expert_logits[0]).max())
            assert values["experts"][0]["probability"] == pytest.approx(alone, abs=1e-6)


def test_calibrated_exits_that_are_not_there_are_one_line(copy, photos):
    with Pipeline.open(copy, device="cpu", threads=1) as pipeline:
        for ask in (
            lambda: pipeline.predict(photos[0], exit="calibrated"),
            lambda: pipeline.predict_batch([], exit="calibrated"),
            lambda: pipeline.predict_iter([], exit="calibrated"),
            lambda: pipeline.run(frames(1), exit="calibrated"),
        ):
            with pytest.raises(BackendError, match="no calibration; learn them with `mge-calibrate"):
                ask()
    for exits in (None, {"mean_logits_1": None, "mean_logits_2": None}):
        calibrate(copy, exits)
        with pytest.raises(BackendError, match=r"this bundle has none \(none were learned\); calibrate with more"):
            Pipeline.open(copy, device="cpu", exit="calibrated")


def test_a_calibration_that_cannot_be_read_names_the_file_and_can_be_passed_over(copy, photos):
    calibrate(copy, None, {"mean_logits_1": 1.0, "mean_logits_2": -1.0, "logits": 1.0})
    with pytest.raises(
        BundleError, match=r"mge\.plan: calibration\.json: temperatures\.mean_logits_2 is -1\.0; expected"
    ):
        Pipeline.open(copy, device="cpu")
    with Pipeline.open(copy, device="cpu", threads=1, calibration=False) as pipeline:
        assert not pipeline.predict(photos[0]).calibrated
