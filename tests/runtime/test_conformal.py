"""Rejection, sets and coarser classes in the runtime: read, applied, shown."""

import copy
import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime import Pipeline
from mge_runtime.bundle import add_calibration
from mge_runtime.calibrated import Calibrated
from mge_runtime.cli.info import main as info
from mge_runtime.cli.run import main as run
from mge_runtime.conformal import EXITS, Conformal, Limit, energy
from mge_runtime.draw import draw_prediction
from mge_runtime.errors import BundleError
from tests.helpers.commands import succeeds

NAMES = ("elm", "oak", "fir", "rose")
PARENTS = {"elm": "broad", "oak": "broad", "broad": "tree", "fir": "tree"}
LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)  # energy 0 at temperature 1


def conformal(reject=-1.0, sets=0.4, coarse=0.7, share=0.05):
    limits = (
        None if threshold is None else Limit(share, {"logits": threshold}) for threshold in (reject, sets, coarse)
    )
    return Conformal(NAMES, 0.05, *limits, PARENTS)


@pytest.mark.parametrize(
    ("threshold", "rejected", "names", "node"),
    [
        (0.04, True, ("elm", "oak", "fir", "rose"), ("elm", 0.5)),
        (0.2, True, ("elm", "oak"), ("elm", 0.5)),
        (0.6, True, ("elm",), ("broad", 0.8)),  # a set is never empty
        (0.9, True, ("elm",), ("tree", 0.95)),
        (0.97, True, ("elm",), None),  # not even a root
        (-1e-6, False, ("elm", "oak", "fir", "rose"), ("elm", 0.5)),
    ],
)
def test_thresholds_are_applied(threshold, rejected, names, node):
    found = conformal(threshold, threshold, threshold).judge(LOGITS, 1.0, "logits")
    assert (found.rejected, found.set) == (rejected, names)
    assert node is None if found.coarse is None else found.coarse == (node[0], pytest.approx(node[1]))


def test_what_was_not_learned_is_not_said():
    assert conformal(None, None, None).judge(LOGITS, 1.0, "logits") == (None, None, None)


def test_energy_is_the_log_of_the_sum():
    rows = np.random.default_rng(0).normal(0, 3, (5, 4))
    np.testing.assert_allclose(energy(rows), np.log(np.exp(rows).sum(1)))
    assert energy(np.array([1e5, 0.0])) == 1e5


VALUES = {
    "temperatures": {"mean_logits_1": 2.0, "mean_logits_2": 1.5, "logits": 0.8},
    "exits": {"epsilon": 0.01, "delta": 0.05, "thresholds": {"mean_logits_1": 0.0}},  # all stop after the first graph
    "conformal": {
        "delta": 0.05,
        "reject": {"share": 0.05, "thresholds": dict.fromkeys(("mean_logits_1", "mean_logits_2", "logits"), -1e9)},
        "sets": {"share": 0.1, "thresholds": dict.fromkeys(("mean_logits_1", "mean_logits_2", "logits", EXITS), 0.1)},
        "coarse": {
            "share": 0.1,
            "thresholds": dict.fromkeys(("mean_logits_1", "mean_logits_2", "logits", EXITS), 0.99),
        },
        "parents": {f"bird {k}": "bird" for k in range(5)},
    },
}
VALUES["conformal"]["reject"]["thresholds"][EXITS] = 1e9  # this way to run the chain rejects all, the others nothing


@pytest.fixture
def path(copy):
    add_calibration(copy, VALUES)
    return copy


def test_each_way_to_run_the_chain_has_its_threshold(path, photos):
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        early = pipeline.predict(photos[0], exit="calibrated")
        assert (early.experts_used, early.rejected) == (1, True)
        for exit in (1, 2, "never"):
            found = pipeline.predict_batch(photos, exit=exit)
            assert {prediction.rejected for prediction in found} == {False}
            for prediction in found:
                likely = [name for name, probability in prediction.top if probability >= 0.1]
                assert prediction.set == tuple(likely)
                assert prediction.coarse.name in ("bird", prediction.class_name)
        values = json.loads(json.dumps(early.to_dict()))
    assert values["rejected"] is True
    assert values["set"] == list(early.set)
    assert values["coarse"] == {"class_name": "bird", "probability": 1.0}


def test_commands_say_what_is_rejected(path, photos, tmp_path):
    for number, photo in enumerate(photos[:2]):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    images = [tmp_path / "0.png", tmp_path / "1.png"]
    options = ("--engine", path, "--device", "cpu", "--threads", 1, "--exit", "calibrated")
    lines = succeeds(run, *images, *options).stdout.splitlines()
    assert all(line.split()[:4] == ["-", "none", "of", "these"] for line in lines)
    table = list(csv.DictReader(succeeds(run, *images, *options, "--csv", "-").stdout.splitlines()))
    assert [(row["rejected"], row["coarse"], row["set"].split("|")[0]) for row in table] == [
        ("yes", "bird", row["class_name"]) for row in table
    ]
    block = succeeds(run, images[0], *options).stdout.splitlines()
    assert block[1:3] == ["  none of these", "  bird 100.0%"]
    told = CliRunner().invoke(info, [str(path), "--all"]).output
    assert "rejects at most 5% of known images; sets miss the class of at most 10%" in " ".join(told.split())


def test_a_drawing_shows_what_is_rejected(path, photos):
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        drawn = [draw_prediction(photos[0], pipeline.predict(photos[0], exit=exit)) for exit in ("calibrated", 1)]
    with Pipeline.open(path, device="cpu", threads=1, calibration=False) as pipeline:
        drawn.append(draw_prediction(photos[0], pipeline.predict(photos[0], exit=1)))
    assert len({image.tobytes() for image in drawn}) == 3


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("delta", 1, r"conformal\.delta is 1; expected a number between 0 and 1"),
        ("reject", 3, r"conformal\.reject is 3; expected an object"),
        ("sets.share", 0, r"conformal\.sets\.share is 0; expected a number between 0 and 1"),
        ("sets.thresholds.logits", "high", r"thresholds\.logits is \"high\"; expected a finite number"),
        ("sets.thresholds.calibrated", ..., r"thresholds\.calibrated is null; expected this field, which is missing"),
        ("sets.thresholds.logits_9", 0.5, r"thresholds\.logits_9 is 0\.5; expected no field of this name"),
        ("parents", None, r"conformal\.parents is null; expected parents of the classes"),
        ("parents.bird 1", "a\x1b[2J", r"parents\.bird 1 is .*; expected a text"),
        ("parents.bird", "bird 0", r"expected a hierarchy, but 'bird 0' has no root: bird 0 < bird < bird 0"),
        ("parents", {f"{'bird ' * (not k)}{k}": f"{k + 1}" for k in range(40)}, r"'bird 0' has no root"),
    ],
)
def test_values_that_are_wrong_are_one_line(tiny, place, value, message):
    manifest = tiny.make_manifest(tiny.make_graphs())
    values = copy.deepcopy(VALUES)
    *parents, last = place.split(".")
    table = values["conformal"]
    for name in parents:
        table = table[name]
    if value is ...:
        del table[last]
    else:
        table[last] = value
    with pytest.raises(BundleError, match=message) as caught:
        Calibrated.from_values(values, manifest)
    assert "\n" not in str(caught.value)
