"""`mge-calibrate` on the tiny chain: what it writes and reports."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import mge_calibration.report
from mge_calibration.cli import main
from mge_calibration.images import list_labeled, short_digest
from mge_runtime.bundle import Bundle, write_bundle
from mge_runtime.calibrated import Calibrated, RunsOn
from mge_runtime.manifest import Crops
from mge_runtime.pipeline import Pipeline

EPSILON = ("--epsilon", "0.2")  # 14 images without a disagreement are the least


def calibrate(*arguments):
    return CliRunner().invoke(main, [str(a) for a in (*arguments, "--threads", 1)])


def values_of(path):
    with Bundle.open(path) as bundle:
        calibration = bundle.calibration()
        return None if calibration is None else calibration.values


def images_of(values):
    return [0 if part is None else part["images"] for part in values["data"].values()]


@pytest.fixture(scope="module")
def calibrated(tiny_path, labeled, tmp_path_factory):
    """A calibrated bundle, its report folder and what was printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    path = Path(shutil.copy(tiny_path, folder / "mge.plan"))
    done = calibrate(path, "--data", labeled, *EPSILON, "--report", folder / "report")
    assert done.exit_code == 0, done.output
    return path, folder / "report", done.output


def test_the_bundle_gets_what_the_runtime_reads(calibrated, tiny_path):
    values = values_of(calibrated[0])
    with Bundle.open(calibrated[0]) as bundle, Bundle.open(tiny_path) as before:
        assert bundle.manifest_sha256 == before.manifest_sha256
        read = Calibrated.from_values(values, bundle.manifest)
    assert set(read.temperatures) == {"mean_logits_1", "mean_logits_2", "logits"}
    assert read.exits
    assert read.runs_on == RunsOn("onnxruntime", "cpu")
    assert (values["seed"], values["made_by"].split()[0]) == (0, "mge")
    assert (values["exits"]["epsilon"], values["exits"]["delta"]) == (0.2, 0.05)
    assert images_of(values) == [60, 120]


def test_the_figures_are_those_of_the_runtimes_exits(calibrated, labeled):
    """The images that set the exits are told from the record."""
    values = values_of(calibrated[0])
    report, digests = values["report"]["exits"], values["data"]["exits"]["digests"]
    with Pipeline.open(calibrated[0], threads=1) as pipeline:
        listed = list_labeled(labeled, pipeline.manifest.class_names)[1]
        images = [image for image in listed if short_digest(image.sha256) in digests]
        early = [pipeline.predict(image.path, exit="calibrated") for image in images]
        full = [pipeline.predict(image.path) for image in images]
    assert {short_digest(image.sha256) for image in listed} == {*digests, *values["data"]["temperatures"]["digests"]}
    used = [prediction.experts_used - 1 for prediction in early]
    assert list(report["stopped"].values()) == np.bincount(used, minlength=3).tolist()
    assert report["disagreements"] == sum(e.class_index != f.class_index for e, f in zip(early, full, strict=True))
    right = [e.class_index == image.label for e, image in zip(early, images, strict=True)]
    assert report["accuracy"] == pytest.approx(np.mean(right))
    assert 0 < report["mean_cost_share"] < 1


def test_the_report_folder_holds_a_diagram_and_the_values(calibrated):
    path, folder, _ = calibrated
    assert sorted(p.name for p in folder.iterdir()) == ["calibration.json", "reliability.png"]
    with Bundle.open(path) as bundle:
        assert (folder / "calibration.json").read_bytes() == bundle.read("calibration.json")
    with Image.open(folder / "reliability.png") as diagram:
        assert len(diagram.convert("RGB").getcolors(1 << 24)) > 50  # something was drawn


def test_people_are_told_what_was_learned(calibrated):
    values, output = values_of(calibrated[0]), calibrated[2]
    for words in (
        f"{values['temperatures']['logits']:.3f}",
        "temperatures from 60 images",
        "early exits from 120 images",
        "guarantee: with probability 95 % at most 20 % of new images",
        "predicted by onnxruntime on cpu",
        "are of the images that chose the thresholds, so a little better than on new ones",
        "mge.plan: calibrated",
    ):
        assert words in output


def test_the_same_gives_the_same_and_another_seed_replaces_it(calibrated, copy, labeled):
    done = calibrate(copy, "--data", labeled, *EPSILON, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == values_of(copy) == values_of(calibrated[0])
    other = json.loads(calibrate(copy, "--data", labeled, *EPSILON, "--json", "--seed", 1).stdout)
    assert other == values_of(copy)
    assert other["data"] != json.loads(done.stdout)["data"]


@pytest.mark.parametrize(
    ("name", "value"), [*(("--epsilon", v) for v in ("0", "1", "nan", "1e-17")), ("--delta", "-0.1"), ("--seed", "-1")]
)
def test_numbers_outside_their_range_are_a_usage_error(copy, labeled, name, value):
    assert calibrate(copy, "--data", labeled, name, value).exit_code == 2


def test_an_image_may_have_as_many_pixels_as_were_named(copy, labeled):
    done = calibrate(copy, "--data", labeled, "--max-pixels", 10, "--no-mmap")
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert "expected at most 1e-05 megapixels" in lines[0]
    assert "none of the 180 images could be read" in lines[-1]


def test_what_is_no_bundle_is_one_line(tmp_path, labeled):
    done = calibrate(tmp_path / "none.plan", "--data", labeled)
    assert done.exit_code == 1
    assert "no bundle at" in done.stderr


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("report", "error: cannot make the folder"),
        ("report/calibration.json/kept", "error: cannot write"),
        ("report/reliability.png/kept", "error: cannot write"),
    ],
)
def test_a_report_that_cannot_be_written_leaves_the_bundle_as_it_was(copy, labeled, place, message):
    before, place = copy.read_bytes(), copy.parent / place
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file")
    done = calibrate(copy, "--data", labeled, *EPSILON, "--report", copy.parent / "report")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(message)
    assert place.read_text() == "a file"
    assert copy.read_bytes() == before


def test_a_bundle_that_was_replaced_meanwhile_is_left_alone(tiny, copy, labeled, monkeypatch):
    original = mge_calibration.report.as_values

    def replaced(learned):
        tiny.write_tiny_bundle(copy, seed=1)
        return original(learned)

    monkeypatch.setattr(mge_calibration.report, "as_values", replaced)
    done = calibrate(copy, "--data", labeled, *EPSILON)
    assert done.exit_code == 1
    assert "was replaced while it was calibrated" in done.stderr
    assert values_of(copy) is None


def test_a_chain_of_one_graph_gets_its_temperature(tiny, labeled, tmp_path):
    (first, *_) = tiny.make_graphs()
    whole = replace(tiny.make_manifest([first]), gate=None)
    whole = replace(whole, views=whole.views[:1], crops=Crops(whole.crops.sizes[:1]))
    write_bundle(tmp_path / "one.plan", whole, {"expert_1": first.model()})
    done = calibrate(tmp_path / "one.plan", "--data", labeled, *EPSILON)
    assert done.exit_code == 0
    assert "no early exits: the chain has a single graph" in done.output
    assert list(values_of(tmp_path / "one.plan")["temperatures"]) == ["mean_logits_1"]


def test_exits_may_have_a_folder_of_their_own(copy, data, tmp_path):
    apart = tmp_path / "apart"
    for path in sorted(data.glob("*/*"))[::2]:
        (apart / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(apart / path.parent.name / path.name)
    some = next(apart.glob("*/*"))
    shutil.copy(some, data / some.parent.name / "copy.png")
    done = calibrate(copy, "--data", data, "--exit-data", apart, *EPSILON, "--json")
    assert done.exit_code == 0
    assert images_of(json.loads(done.stdout)) == [91, 89]
    assert f"1 of 90 images in {apart} are also in {data}: they set no exits" in done.stderr


def test_too_few_images_for_the_guarantee_give_temperatures_alone(copy, labeled):
    done = calibrate(copy, "--data", labeled)
    assert done.exit_code == 0
    assert "no early exits: too few images for the guarantee: 180" in done.output
    assert "need 299 beside those that set the temperatures, 449 in all" in done.output
    values = values_of(copy)
    assert values["exits"] is None
    assert images_of(values) == [180, 0]
    with Bundle.open(copy) as bundle:
        read = Calibrated.from_values(values, bundle.manifest)
    assert read.exits is None
    assert read.why_no_exits.startswith("too few images for the guarantee: 180")


def test_images_that_taught_int8_set_no_exits(tiny, labeled, tmp_path):
    path, graphs = tmp_path / "mge.plan", tiny.make_graphs()
    manifest = tiny.make_manifest(graphs)
    taught = [short_digest(image.sha256) for image in list_labeled(labeled, manifest.class_names)[1][::4]]
    plan = {"type": "fp16", "attested": "graph", "calibration": {"digests": taught}}
    write_bundle(path, replace(manifest, precision={"expert_1": plan}), {g.spec.name: g.model() for g in graphs})
    done = calibrate(path, "--data", labeled, *EPSILON)
    assert done.exit_code == 0, done.output
    assert f"45 of 180 images in {labeled} taught INT8: they set no exits" in done.stderr
    data = values_of(path)["data"]
    assert images_of(values_of(path)) == [60, 120]
    assert set(taught) <= set(data["temperatures"]["digests"])
    assert not set(taught) & set(data["exits"]["digests"])


def test_images_are_counted_after_decoding(copy, data):
    """Of 180 images 12 cannot be read: 168 are enough for 56 and 112, the least that this guarantee allows."""
    for path in sorted(data.glob("*/*"))[::15]:
        path.write_bytes(path.name.encode())
    done = calibrate(copy, "--data", data, "--epsilon", "0.0265")
    assert done.exit_code == 1
    assert "12 images could not be read" in done.stderr
    assert images_of(values_of(copy)) == [56, 112]


@pytest.mark.parametrize(
    ("readable", "message"), [(0, "none of the 180 images could be read"), (49, "49 images could be read in")]
)
def test_too_few_images_are_one_line_and_leave_the_bundle_as_it_was(copy, data, readable, message):
    for path in sorted(data.glob("*/*"))[readable:]:
        path.write_bytes(path.name.encode())
    before = copy.read_bytes()
    done = calibrate(copy, "--data", data, *EPSILON, "--report", copy.parent / "report")
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert copy.read_bytes() == before
    assert list((copy.parent / "report").iterdir()) == []
