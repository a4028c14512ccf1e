"""What a calibration says, read and checked."""

import copy
import json

import numpy as np
import pytest

from mge_runtime.calibrated import Calibrated, ExitPoint, Guarantee, RunsOn, confidence
from mge_runtime.errors import BackendError, BundleError

EXITS = {"epsilon": 0.01, "delta": 0.05, "thresholds": {"mean_logits_1": 0.93, "mean_logits_2": 0.88}}
VALUES = {
    "temperatures": {"mean_logits_1": 1.31, "mean_logits_2": 1, "logits": 1.07},
    "exits": EXITS,
    "data": {"temperatures": {"images": 500, "sha256": "0" * 64}, "exits": {"images": 2000, "sha256": "1" * 64}},
    "seed": 0,
    "made_by": "mge 0.1.0",
    "report": {"anything": [1, 2]},
}


@pytest.fixture(scope="module")
def manifest(tiny):
    return tiny.make_manifest(tiny.make_graphs())


def changed(path, value):
    values = copy.deepcopy(VALUES)
    *parents, last = path.split(".")
    place = values
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


def test_values_are_read(manifest):
    found = Calibrated.from_values(json.loads(json.dumps(VALUES)), manifest)
    assert found.temperatures == {"mean_logits_1": 1.31, "mean_logits_2": 1.0, "logits": 1.07}
    assert found.exits == {"mean_logits_1": 0.93, "mean_logits_2": 0.88}
    assert found.guarantee == Guarantee(0.01, 0.05)
    assert found.images == {"temperatures": 500, "exits": 2000}
    assert found.exits
    assert found.exit_points(manifest) == (
        ExitPoint(1, "mean_logits_1", 1.31, 0.93),
        ExitPoint(2, "mean_logits_2", 1.0, 0.88),
    )


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (..., r"has none \(none were learned\); .*more images"),
        (None, "has none"),
        (EXITS | {"thresholds": {}}, "has none"),
        (EXITS | {"thresholds": {"mean_logits_1": None, "mean_logits_2": None}}, "has none"),
        ("no calibration", r"^asked for calibrated exits, but .* no calibration; .*mge-calibrate"),
    ],
)
def test_without_exits_nothing_stops(manifest, exits, message):
    missing = exits == "no calibration"
    found = Calibrated() if missing else Calibrated.from_values(changed("exits", exits), manifest)
    assert not found.exits
    with pytest.raises(BackendError, match=message):
        found.exit_points(manifest)


def test_what_is_null_or_missing_stays_out(manifest):
    for thresholds in ({"mean_logits_1": None, "mean_logits_2": 0.5}, {"mean_logits_2": 0.5}):
        found = Calibrated.from_values(changed("exits.thresholds", thresholds), manifest)
        assert [point.graphs for point in found.exit_points(manifest)] == [2]
    for data, images in ((..., {}), (None, {}), ({"exits": None, "temperatures": {"images": 7}}, {"temperatures": 7})):
        assert Calibrated.from_values(changed("data", data), manifest).images == images


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("temperatures", ..., r"temperatures is null; expected an object"),
        ("temperatures.logits", ..., r"temperatures\.logits is null; expected this field, which is missing"),
        ("temperatures.logits", 0, r"temperatures\.logits is 0; expected a number from 0\.001 to 1000"),
        ("temperatures.mean_logits_1", True, r"temperatures\.mean_logits_1 is true; expected a finite number"),
        ("temperatures.logits", 1.7e308, r"temperatures\.logits is 1\.7e\+308; expected a number from 0\.001 to 1000"),
        ("temperatures.mean_logits_9", 1.0, r"temperatures\.mean_logits_9 is 1\.0; expected no field of this name"),
        ("exits", 3, r"exits is 3; expected an object"),
        ("exits.delta", ..., r"exits\.delta is null; expected this field, which is missing"),
        ("exits.epsilon", 0, r"exits\.epsilon is 0; expected a number between 0 and 1"),
        ("exits.delta", 1.0, r"exits\.delta is 1\.0; expected a number between 0 and 1"),
        ("exits.thresholds.mean_logits_1", 1.01, r"mean_logits_1 is 1\.01; expected a number from 0 to 1"),
        ("exits.thresholds.mean_logits_2", "high", r"mean_logits_2 is \"high\"; expected a finite number"),
        ("exits.thresholds.logits", 0.5, r"logits is 0\.5; expected thresholds of mean_logits_1, mean_logits_2 alone"),
        ("runs_on", "cpu", r"runs_on is \"cpu\"; expected an object"),
        ("runs_on", {"backend": "onnxruntime"}, r"runs_on\.device is null; expected this field, which is missing"),
        ("report", {"exits": {"none_because": 3}}, r"report\.exits\.none_because is 3; expected"),
        ("data.exits.images", 1.5, r"data\.exits\.images is 1\.5; expected a whole number"),
    ],
)
def test_values_that_are_wrong_are_one_line(manifest, path, value, message):
    with pytest.raises(BundleError, match=message) as caught:
        Calibrated.from_values(changed(path, value), manifest)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("calibration.json: ")
    assert str(caught.value).endswith(": calibrate again with mge-calibrate")


def test_what_it_was_learned_on_is_noted_elsewhere(manifest):
    for values in (VALUES, VALUES | {"runs_on": None}):
        assert Calibrated.from_values(values, manifest).note("tensorrt", "cuda:0") is None
    found = Calibrated.from_values(VALUES | {"runs_on": {"backend": "onnxruntime", "device": "cuda:0"}}, manifest)
    assert found.runs_on == RunsOn("onnxruntime", "cuda:0")
    assert found.note("onnxruntime", "cuda:1") is None
    for elsewhere in (("tensorrt", "cuda:0"), ("onnxruntime", "cpu")):
        assert (
            f"learned with onnxruntime on cuda:0; they guarantee nothing for {elsewhere[0]} on {elsewhere[1]}"
            in found.note(*elsewhere)
        )


def test_confidence_is_the_largest_of_the_softmax():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], np.float32))
    np.testing.assert_allclose(confidence(logits, 1.0), [0.7, 0.8], rtol=1e-6)
    squares = np.sqrt(np.exp(logits.astype(np.float64)))
    np.testing.assert_allclose(confidence(logits, 2.0), (squares / squares.sum(1, keepdims=True)).max(1), rtol=1e-12)
    assert confidence(np.array([1e4, -1e4, 0], np.float32), 0.01) == 1.0


def test_the_confidence_of_a_row_does_not_depend_on_the_others():
    logits = np.random.default_rng(0).standard_normal((64, 37)).astype(np.float32) * 5
    together = confidence(logits, 1.3)
    assert [float(confidence(row, 1.3)) for row in logits] == together.tolist()
    assert confidence(logits[::3], 1.3).tolist() == together[::3].tolist()


def test_an_image_stops_at_its_threshold_and_never_where_its_logits_are_not_finite():
    logits = np.array([[2, 0], [1, 0], [np.nan, 0], [np.inf, 0], [np.inf, np.inf], [0, 0], [2, -np.inf]], np.float32)
    threshold = float(confidence(logits, 1.5)[1])
    found = ExitPoint(1, "mean_logits_1", 1.5, threshold).stops(logits)
    assert found.tolist() == [True, True, False, False, False, False, False]
    above = ExitPoint(1, "mean_logits_1", 1.5, float(np.nextafter(threshold, 1))).stops(logits)
    assert above.tolist() == [True, False, False, False, False, False, False]
    assert np.isnan(confidence(logits[[2, 3, 4, 6]], 1.5)).all()  # no row that `Prediction` refuses has a confidence
