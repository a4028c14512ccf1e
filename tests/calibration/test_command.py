"""`mge-calibrate` on the tiny chain: what it writes and reports."""

import hashlib
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mge_calibration.exits import stops
from mge_runtime.bundle import Bundle, write_bundle
from mge_runtime.calibrated import Calibrated, RunsOn, confidence
from mge_runtime.decode import decode_picture
from mge_runtime.pipeline import Pipeline
from mge_runtime.preprocess import to_frame

spec = importlib.util.spec_from_file_location("mge_tests_command", Path(__file__).with_name("command.py"))
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)
EPSILON, calibrate, values_of = command.EPSILON, command.calibrate, command.values_of


@pytest.fixture(scope="module")
def calibrated(tiny_path, labelled, tmp_path_factory):
    """A calibrated bundle, its report folder and what was printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    path = Path(shutil.copy(tiny_path, folder / "mge.plan"))
    done = calibrate(path, "--data", labelled, *EPSILON, "--report", folder / "report")
    assert done.exit_code == 0, done.output
    return path, folder / "report", done.output


def test_the_bundle_gets_what_the_runtime_reads(calibrated, tiny_path):
    values = values_of(calibrated[0])
    with Bundle.open(calibrated[0]) as bundle, Bundle.open(tiny_path) as before:
        assert bundle.manifest_sha256 == before.manifest_sha256
        read = Calibrated.from_values(values, bundle.manifest)
    assert set(read.temperatures) == {"mean_logits_1", "mean_logits_2", "logits"}
    assert read.exits
    assert (values["seed"], values["made_by"].split()[0]) == (0, "mge")
    assert (values["exits"]["epsilon"], values["exits"]["delta"]) == (0.2, 0.05)
    assert [values["data"][part]["images"] for part in ("temperatures", "exits")] == [80, 160]
    assert len({values["data"][part]["sha256"] for part in ("temperatures", "exits")}) == 2


def test_the_figures_are_those_of_the_rule(calibrated, labelled):
    """What the report says of the exits, once more from the bundle's own answers, and from the runtime's exits."""
    from mge_calibration.folder import list_labelled, split_by_content

    values = values_of(calibrated[0])
    report, thresholds = values["report"]["exits"], values["exits"]["thresholds"]
    with Pipeline.open(calibrated[0], threads=1) as pipeline:
        images = split_by_content(list_labelled(labelled, pipeline.manifest.class_names)[1], 1 / 3, 0)[1]
        frames = np.stack([to_frame(decode_picture(i.path), pipeline.manifest.preprocess)[0] for i in images])
        tensors = pipeline.run(frames, exit="never", outputs=["mean_logits_1", "mean_logits_2", "logits"])
        early = [pipeline.predict(image.path, exit="calibrated") for image in images]
    names = ["mean_logits_1", "mean_logits_2"]
    sure = np.column_stack([confidence(tensors[n], values["temperatures"][n]) for n in names])
    limits = [np.inf if thresholds[n] is None else thresholds[n] for n in names]
    stopped = stops(sure, limits)
    classes = np.column_stack([tensors[n].argmax(1) for n in (*names, "logits")])
    got = classes[np.arange(len(images)), stopped]
    assert list(report["stopped"].values()) == np.bincount(stopped, minlength=3).tolist()
    assert report["disagreements"] == (got != classes[:, 2]).sum()
    assert report["accuracy"] == pytest.approx(np.mean(got == [i.label for i in images]))
    assert [p.class_index for p in early] == got.tolist()
    assert [p.experts_used - 1 for p in early] == stopped.tolist()
    assert 0 < report["mean_cost_share"] < 1


def test_what_is_learned_from_one_part_knows_nothing_of_the_other(calibrated, labelled):
    """Temperatures and the path of thresholds, once more from the images of the temperatures alone."""
    from mge_calibration.exits import NEVER
    from mge_calibration.folder import list_labelled, split_by_content
    from mge_calibration.path import propose_path
    from mge_calibration.temperature import fit_temperature

    values = values_of(calibrated[0])
    with Pipeline.open(calibrated[0], threads=1) as pipeline:
        images = split_by_content(list_labelled(labelled, pipeline.manifest.class_names)[1], 1 / 3, 0)[0]
        frames = np.stack([to_frame(decode_picture(i.path), pipeline.manifest.preprocess)[0] for i in images])
        tensors = pipeline.run(frames, exit="never", outputs=["mean_logits_1", "mean_logits_2", "logits"])
    labels = np.array([image.label for image in images])
    for name, temperature in values["temperatures"].items():
        assert temperature == pytest.approx(fit_temperature(tensors[name], labels).temperature, rel=1e-6)
    names = ["mean_logits_1", "mean_logits_2"]
    sure = np.column_stack([confidence(tensors[n], values["temperatures"][n]) for n in names])
    differs = np.column_stack([tensors[n].argmax(1) != tensors["logits"].argmax(1) for n in names])
    path = propose_path(sure, differs, values["report"]["cost"]["stops"], 5)
    chosen = [NEVER if t is None else t for t in values["exits"]["thresholds"].values()]
    rows = np.isclose(path, chosen, rtol=1e-7, atol=0) | (np.isinf(path) & np.isinf(chosen))
    assert rows.all(1).any()


def test_the_report_folder_holds_two_pictures_and_the_values(calibrated):
    path, folder, _ = calibrated
    assert sorted(p.name for p in folder.iterdir()) == ["calibration.json", "exits.png", "reliability.png"]
    with Bundle.open(path) as bundle:
        assert (folder / "calibration.json").read_bytes() == bundle.read("calibration.json")
    for name in ("exits.png", "reliability.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50  # something was drawn


def test_people_are_told_what_was_learned(calibrated):
    output = calibrated[2]
    values = values_of(calibrated[0])
    assert f"{values['temperatures']['logits']:.3f}" in output
    assert "temperatures from 80 images" in output
    assert "early exits from 160 images" in output
    assert "with probability 95 % at most 20 % of new images" in output
    assert "mge.plan: calibrated" in output
    assert "are of the images that chose the thresholds, so a little better than on new ones" in output
    assert "64 of the images one by one on onnxruntime on cpu, with exits and without in turn" in output
    times = values["report"]["times_ms"]
    assert f"{times['exits']:>12.2f}\n" in output
    assert times["images"] == 64
    assert min(times["exits"], times["full"]) > 0


def test_the_same_twice_gives_the_same_and_replaces_it(calibrated, copy, labelled):
    for _ in range(2):
        done = calibrate(copy, "--data", labelled, *EPSILON, "--json")
        assert done.exit_code == 0
        printed = json.loads(done.stdout)
        assert printed == values_of(copy)
        expected = values_of(calibrated[0])
        for key in ("temperatures", "exits", "data"):
            assert printed[key] == expected[key]
        assert printed["report"]["probabilities"] == expected["report"]["probabilities"]
    other = json.loads(calibrate(copy, "--data", labelled, *EPSILON, "--json", "--seed", 1).stdout)
    assert other["data"] != expected["data"]


def test_what_answered_the_images_is_recorded(calibrated):
    values = values_of(calibrated[0])
    assert values["runs_on"] == {"backend": "onnxruntime", "device": "cpu"}
    with Bundle.open(calibrated[0]) as bundle:
        assert Calibrated.from_values(values, bundle.manifest).runs_on == RunsOn("onnxruntime", "cpu")


def test_each_image_can_be_told_from_the_record(calibrated, labelled):
    parts = [set(values_of(calibrated[0])["data"][part]["digests"]) for part in ("temperatures", "exits")]
    files = {hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in labelled.glob("*/*.png")}
    assert parts[0] | parts[1] == files
    assert not parts[0] & parts[1]
    assert [len(part) for part in parts] == [80, 160]


@pytest.mark.parametrize("name", ["--epsilon", "--delta"])
@pytest.mark.parametrize("value", ["0", "1", "1.5", "nan", "inf", "1e-320", "1e-17", "-0.1"])
def test_shares_outside_their_range_are_a_usage_error(copy, labelled, name, value):
    assert calibrate(copy, "--data", labelled, name, value).exit_code == 2


def test_an_image_may_have_as_many_pixels_as_were_named(copy, labelled):
    result = calibrate(copy, "--data", labelled, "--max-pixels", 10, "--no-mmap")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert "expected at most 1e-05 megapixels" in lines[0]
    assert "none of the 240 images could be read" in lines[-1]


def test_a_negative_seed_is_a_usage_error(copy, labelled):
    assert calibrate(copy, "--data", labelled, "--seed", "-1").exit_code == 2


def test_what_is_no_bundle_is_one_line(tmp_path, labelled):
    done = calibrate(tmp_path / "none.plan", "--data", labelled)
    assert done.exit_code == 1
    assert "no bundle at" in done.stderr


def test_a_report_that_cannot_be_written_leaves_the_bundle_as_it_was(copy, labelled):
    before = copy.read_bytes()
    (copy.parent / "report").write_text("a file")
    done = calibrate(copy, "--data", labelled, *EPSILON, "--report", copy.parent / "report")
    assert done.exit_code == 1
    assert "cannot make the folder" in done.stderr
    assert copy.read_bytes() == before


def test_a_report_that_fails_at_its_end_does_too(copy, labelled):
    before = copy.read_bytes()
    (copy.parent / "report" / "calibration.json").mkdir(parents=True)
    done = calibrate(copy, "--data", labelled, *EPSILON, "--report", copy.parent / "report")
    assert done.exit_code == 1
    assert "cannot write" in done.stderr
    assert copy.read_bytes() == before


@pytest.mark.parametrize("options", [EPSILON, ()], ids=["exits", "no exits"])
def test_a_folder_in_the_place_of_a_picture_is_one_line(copy, labelled, options):
    before = copy.read_bytes()
    (copy.parent / "report" / "exits.png" / "kept").mkdir(parents=True)
    done = calibrate(copy, "--data", labelled, *options, "--report", copy.parent / "report")
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot ")
    assert "exits.png" in done.stderr
    assert copy.read_bytes() == before
    assert (copy.parent / "report" / "exits.png" / "kept").is_dir()


def test_a_bundle_that_was_replaced_meanwhile_is_left_alone(tiny, copy, labelled, monkeypatch):
    import mge_calibration.report

    def replaced(learned):
        tiny.write_tiny_bundle(copy, seed=1)
        return original(learned)

    original = mge_calibration.report.as_values
    monkeypatch.setattr(mge_calibration.report, "as_values", replaced)
    done = calibrate(copy, "--data", labelled, *EPSILON)
    assert done.exit_code == 1
    assert "was replaced while it was calibrated" in done.stderr
    assert values_of(copy) is None


def test_a_chain_with_one_answer_gets_its_temperature(tiny, labelled, tmp_path):
    (first, *_) = tiny.make_graphs()
    whole = replace(tiny.make_manifest([first]), gate=None)
    whole = replace(whole, views=whole.views[:1])
    write_bundle(tmp_path / "one.plan", whole, {"expert_1": first.model()})
    done = calibrate(tmp_path / "one.plan", "--data", labelled, *EPSILON)
    assert done.exit_code == 0
    assert "no early exits: the chain has a single answer" in done.output
    assert list(values_of(tmp_path / "one.plan")["temperatures"]) == ["mean_logits_1"]
