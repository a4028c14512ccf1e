"""Thresholds to reject, for sets and coarser classes: their guarantee, and what `mge-calibrate` makes of them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

from mge_calibration.cli import main
from mge_calibration.collect import ChainLogits
from mge_calibration.conformal import (
    ConformalRequest,
    auroc,
    learn_conformal,
    order_statistic,
    read_parents,
    ways_to_run,
)
from mge_calibration.exits import fewest_images
from mge_calibration.images import LabeledImage, list_labeled, short_digest
from mge_runtime.bundle import Bundle, write_bundle
from mge_runtime.conformal import EXITS, energy
from mge_runtime.errors import MGEError
from mge_runtime.manifest import Crops
from mge_runtime.pipeline import Pipeline
from tests.helpers.commands import fails, succeeds

DRAWS, DELTA = 1000, 0.05
MARGIN = DRAWS * DELTA + 3 * np.sqrt(DRAWS * DELTA * (1 - DELTA))
NAMES = ("elm", "oak", "fir", "pine", "yew", "rose")
PARENTS = {"elm": "broad", "oak": "broad", "fir": "conifer", "pine": "conifer", "broad": "tree", "conifer": "tree"}
TEMPERATURES = {"mean_logits_1": 1.5, "mean_logits_2": 1.2, "logits": 0.9}


@pytest.mark.parametrize(("images", "share"), [(59, 0.05), (269, 0.05), (1000, 0.01), (500, 0.5)])
def test_the_threshold_is_the_last_one_that_keeps_the_guarantee(images, share):
    scores = np.random.default_rng(0).permutation(images) * 0.5
    below = round(order_statistic(scores, share, DELTA) * 2)  # scores under the threshold
    assert binom.cdf(below, images, share) <= DELTA < binom.cdf(below + 1, images, share)
    assert fewest_images(0.05, DELTA) == 59


def test_the_guarantee_holds_for_the_draw_that_was_calibrated_on():
    """The usual order statistic holds on average over draws alone."""
    rng = np.random.default_rng(1)
    draws = rng.random((DRAWS, 269))  # uniform: a threshold is the true share below it
    shares = np.array([order_statistic(draw, 0.05, DELTA) for draw in draws])
    assert 0 < (shares > 0.05).sum() <= MARGIN
    usual = np.sort(draws, axis=1)[:, int(0.05 * 270) - 1]
    assert usual.mean() == pytest.approx(0.05, abs=0.003)
    assert (usual > 0.05).sum() > 5 * MARGIN
    tied = [(np.arange(10) < 10 * order_statistic(np.floor(draw * 10) / 10, 0.15, DELTA)).mean() for draw in draws]
    assert np.mean(np.array(tied) > 0.15) <= DELTA  # scores of ten values


def make_logits(count, seed):
    """ChainLogits of three experts, each closer to the last; elm and oak, fir and pine are alike."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(NAMES), size=count)
    last = rng.normal(0, 1.5, (count, len(NAMES)))
    last[np.arange(count), labels] += 3
    pair = np.where(labels < 4, labels ^ 1, labels)
    last[np.arange(count), pair] += 2
    values = [last + rng.normal(0, noise, last.shape) for noise in (1.5, 0.7, 0)]
    logits = {name: v.astype(np.float32) for name, v in zip(TEMPERATURES, values, strict=True)}
    images = tuple(LabeledImage(str(i), None, int(label), str(i)) for i, label in enumerate(labels))
    return ChainLogits(images, labels, logits)


def test_every_way_to_run_the_chain_keeps_what_was_asked_for():
    """Of five calibrations none may be far above its share on new images, nor all far below."""
    exits = {"mean_logits_1": 0.9, "mean_logits_2": None}
    new = make_logits(1500, 99)
    ways = ways_to_run(new, TEMPERATURES, exits)
    assert list(ways) == [*TEMPERATURES, EXITS]
    missed = []
    for seed in range(5):
        request = ConformalRequest(reject=0.1, sets=0.1, coarse=0.1)
        outcome = learn_conformal(request, make_logits(800, seed), None, TEMPERATURES, exits, DELTA, NAMES, PARENTS)
        for way, rows in ways.items():
            judged = [outcome.learned.judge(row, 1.0, way) for row in rows]
            truth = [NAMES[label] for label in new.labels]
            above = [{name, PARENTS.get(name), PARENTS.get(PARENTS.get(name))} for name in truth]
            assert all(j.set for j in judged)
            missed.append(
                (
                    np.mean([j.rejected for j in judged]),
                    np.mean([name not in j.set for name, j in zip(truth, judged, strict=True)]),
                    np.mean([bool(j.coarse) and j.coarse.name not in up for up, j in zip(above, judged, strict=True)]),
                )
            )
    missed = np.array(missed, float)
    assert missed.max() < 0.13
    assert ((missed.mean(0) > 0.06) & (missed.mean(0) < 0.1)).all()


def test_unknown_images_are_counted_and_change_nothing():
    known, unknown = make_logits(400, 0), make_logits(300, 1)
    unknown = ChainLogits(
        unknown.images, unknown.labels, {name: 0.3 * values for name, values in unknown.logits.items()}
    )
    request = ConformalRequest(reject=0.05)
    with_them, without = (
        learn_conformal(request, known, others, TEMPERATURES, None, DELTA, NAMES) for others in (unknown, None)
    )
    assert with_them.learned == without.learned
    figures = with_them.figures["logits"]
    scores = [energy(found.logits["logits"] / np.float64(0.9)) for found in (known, unknown)]
    assert figures["auroc"] == np.mean(scores[0][:, None] > scores[1][None])
    assert figures["unknown_rejected"] == np.mean(scores[1] < with_them.learned.reject.thresholds["logits"])
    assert figures["unknown_rejected"] > 0.5 > 0.05 > figures["rejected"] > 0
    assert auroc(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == 7 / 8


TABLE = "label,parent\nelm,broad\noak,broad\nfir,conifer\npine,conifer\nyew,conifer\nrose,\nbroad,tree\nfox,animal\n"


def test_a_table_of_parents_is_read(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(TABLE)
    found = read_parents(path, NAMES)
    assert found["elm"] == "broad"
    assert found["broad"] == "tree"
    assert not {"rose", "conifer", "fox"} & set(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("name,parent\nelm,broad\n", "has no column 'label'"),
        ("label,parent\nelm,broad\n", "no row for 5 classes, such as 'oak'; expected a CSV table"),
        (TABLE + "elm,conifer\n", "a label has two rows"),
        (TABLE + "tree,elm\n", "'elm' has no root: elm < broad < tree < elm"),
        (TABLE.replace("broad,tree", "broad,a\x1b[2J"), "expected a text .* without control characters"),
        (b"label,parent\nelm,\xff\n", "cannot read"),
    ],
)
def test_a_table_that_is_no_hierarchy_is_one_line(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MGEError, match=message) as caught:
        read_parents(path, NAMES)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """Images of no class, one of them twice."""
    folder = tmp_path_factory.mktemp("unknown")
    (folder / "deep").mkdir()
    for number in range(6):
        Image.fromarray(np.full((20, 30, 3), 40 * number, np.uint8)).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "deep" / "again.png")
    return folder


@pytest.fixture(scope="module")
def calibrated(tiny_path, labeled, unknown, tmp_path_factory):
    """A bundle with everything that can be learned, and what was printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    path = Path(shutil.copy(tiny_path, folder / "mge.plan"))
    (folder / "labels.csv").write_text(
        "label,parent\n" + "".join(f"bird {k},{'water' if k < 3 else 'land'}\n" for k in range(5))
    )
    options = ("--reject", 0.2, "--reject-data", unknown, "--coverage", 0.8, "--hierarchy", folder / "labels.csv")
    done = succeeds(main, path, "--data", labeled, "--epsilon", 0.2, "--threads", 1, *options)
    return path, done.stdout


def test_the_runtime_does_what_was_learned(calibrated, labeled):
    path, printed = calibrated
    assert "thresholds from 60 images of their own; rejects at most 20% of known images; sets miss" in printed
    with Pipeline.open(path, threads=1) as pipeline:
        learned, names = pipeline.calibrated.conformal, pipeline.manifest.class_names
        assert pipeline.calibrated.images == {"temperatures": 60, "exits": 60, "conformal": 60}
        values = path_values(path)
        digests = set(values["data"]["conformal"]["digests"])
        assert not digests & (set(values["data"]["exits"]["digests"]) | set(values["data"]["temperatures"]["digests"]))
        images = [image for image in list_labeled(labeled, names)[1] if short_digest(image.sha256) in digests]
        assert list(learned.reject.thresholds) == ["mean_logits_1", "mean_logits_2", "logits", EXITS]
        for way, exit in ((EXITS, "calibrated"), ("mean_logits_1", 1), ("logits", "never")):
            found = [pipeline.predict(image.path, exit=exit) for image in images]
            figures = values["report"]["conformal"][way]
            assert np.mean([p.rejected for p in found]) == pytest.approx(figures["rejected"])
            assert np.mean([len(p.set) for p in found]) == pytest.approx(figures["set_size"])
            assert np.mean([p.coarse is None or p.coarse.name not in names for p in found]) == figures["coarsened"]
            assert figures["rejected"] <= 0.2
            assert np.mean([names[i.label] not in p.set for i, p in zip(images, found, strict=True)]) <= 0.2
            assert {p.coarse.name for p in found if p.coarse} <= {*names, "water", "land"}


def path_values(path):
    with Bundle.open(path) as bundle:
        return json.loads(bundle.read("calibration.json"))["values"]


def test_nothing_changes_unless_it_is_asked_for(copy, labeled):
    succeeds(main, copy, "--data", labeled, "--epsilon", 0.2, "--threads", 1)
    values = path_values(copy)
    assert values["conformal"] is None
    assert list(values["data"]) == ["temperatures", "exits"]
    with Pipeline.open(copy, threads=1) as pipeline:
        found = pipeline.predict(next(labeled.glob("*/*")))
    assert (found.rejected, found.set, found.coarse, found.notes()) == (None, None, None, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reject", "0.01"], "60 images are left to set rejection, .* a share of 0.01 and delta 0.05 need 299"),
        (["--coverage", "0.955"], "60 images are left to set rejection, .* a share of 0.045 and delta 0.05 need 66"),
        (["--reject-data", "nowhere"], "no folder nowhere; expected a folder of images of no class"),
        (["--reject-data", "."], "no image in the folder"),
        (["--hierarchy", "labels.csv"], "cannot read labels.csv"),
    ],
)
def test_what_cannot_be_learned_is_one_line_and_leaves_the_bundle(copy, labeled, monkeypatch, options, message):
    empty = copy.parent / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    before = copy.read_bytes()
    line = fails(main, copy, "--data", labeled, "--epsilon", "0.2", "--threads", "1", *options)
    assert re.search(message, line), line
    assert copy.read_bytes() == before


def test_a_single_network_rejects_too(tiny, labeled, tmp_path):
    (first, *_) = tiny.make_graphs()
    manifest = replace(tiny.make_manifest([first]), gate=None)
    manifest = replace(manifest, views=manifest.views[:1], crops=Crops(manifest.crops.sizes[:1]))
    path = tmp_path / "one.plan"
    write_bundle(path, manifest, {"expert_1": first.model()})
    succeeds(main, path, "--data", labeled, "--threads", 1, "--reject", 0.1)
    with Pipeline.open(path, threads=1) as pipeline:
        assert list(pipeline.calibrated.conformal.reject.thresholds) == ["mean_logits_1"]
        found = [pipeline.predict(image).rejected for image in labeled.glob("*/*")]
    assert 0 < np.mean(found) < 0.2
