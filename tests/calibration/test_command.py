"""`mge-calibrate` on the tiny chain: what it writes and reports."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_calibration.cli import main
from mge_calibration.exits import stops
from mge_runtime.bundle import Bundle, write_bundle
from mge_runtime.calibrated import Calibrated, RunsOn, confidence
from mge_runtime.decode import decode_picture
from mge_runtime.pipeline import Pipeline
from mge_runtime.preprocess import to_frame

EPSILON = ("--epsilon", "0.2")  # 14 images without a disagreement are the least


def calibrate(*arguments):
    return CliRunner().invoke(main, [str(a) for a in (*arguments, "--threads", 1)])


def values_of(path):
    with Bundle.open(path) as bundle:
        calibration = bundle.calibration()
        return None if calibration is None else calibration.values


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
    assert read.runs_on == RunsOn("onnxruntime", "cpu")


def test_the_figures_are_those_of_the_rule(calibrated, labelled):
    """What the report says of the exits, once more from the bundle's own answers, and from the runtime's exits."""
    from mge_calibration.images import list_labeled, split_by_content

    values = values_of(calibrated[0])
    report, thresholds = values["report"]["exits"], values["exits"]["thresholds"]
    with Pipeline.open(calibrated[0], threads=1) as pipeline:
        images = split_by_content(list_labeled(labelled, pipeline.manifest.class_names)[1], 1 / 3, 0)[1]
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
    assert "no early exits: the chain has a single graph" in done.output
    assert list(values_of(tmp_path / "one.plan")["temperatures"]) == ["mean_logits_1"]


def move_half(data, apart):
    for number, path in enumerate(sorted(data.glob("*/*"))):
        if number % 2:
            (apart / path.parent.name).mkdir(parents=True, exist_ok=True)
            path.rename(apart / path.parent.name / path.name)
    return apart


def test_exits_may_have_a_folder_of_their_own(copy, data, tmp_path):
    apart = move_half(data, tmp_path / "apart")
    some = next(apart.glob("*/*"))
    shutil.copy(some, data / some.parent.name / "copy.png")
    done = calibrate(copy, "--data", data, "--exit-data", apart, *EPSILON, "--json")
    assert done.exit_code == 0
    assert [part["images"] for part in json.loads(done.stdout)["data"].values()] == [121, 119]
    assert "1 of 120 images" in done.stderr


def test_too_few_images_for_the_guarantee_give_temperatures_alone(copy, labelled):
    done = calibrate(copy, "--data", labelled, "--report", copy.parent / "report")
    assert done.exit_code == 0
    assert "no early exits: too few images for the guarantee: 240" in done.output
    assert sorted(p.name for p in (copy.parent / "report").iterdir()) == ["calibration.json", "reliability.png"]
    assert "need 299 beside those" in done.output
    assert "449 in all" in done.output
    values = values_of(copy)
    assert values["exits"] is None
    assert values["data"]["temperatures"]["images"] == 240
    assert values["data"]["exits"] is None
    with Bundle.open(copy) as bundle:
        assert Calibrated.from_values(values, bundle.manifest).exits is None


def test_a_separate_folder_may_be_too_small_too(copy, data, tmp_path):
    for path in sorted(data.glob("*/*.png"))[::4]:
        (tmp_path / "few" / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / "few" / path.parent.name / path.name)
    done = calibrate(copy, "--data", data, "--exit-data", tmp_path / "few")
    assert done.exit_code == 0
    assert "at least 299 are needed" in done.output
    assert values_of(copy)["exits"] is None


def with_int8(tiny, path, files):
    """A bundle whose manifest says that INT8 was learned from these files."""
    graphs = tiny.make_graphs()
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    plan = {"type": "fp16", "attested": "graph", "calibration": {"digests": digests}}
    manifest = replace(tiny.make_manifest(graphs), precision={"expert_1": plan})
    write_bundle(path, manifest, {g.spec.name: g.model() for g in graphs})
    return digests


def test_images_that_taught_int8_set_no_exits(tiny, labelled, tmp_path):
    path, files = tmp_path / "mge.plan", sorted(labelled.glob("*/*.png"))[::4]
    taught = with_int8(tiny, path, files)
    done = calibrate(path, "--data", labelled, *EPSILON)
    assert done.exit_code == 0, done.output
    assert f"60 of 240 images in {labelled} taught INT8: they set no exits" in done.stderr
    data = values_of(path)["data"]
    assert [data[part]["images"] for part in ("temperatures", "exits")] == [80, 160]
    assert set(taught) <= set(data["temperatures"]["digests"])
    assert not set(taught) & set(data["exits"]["digests"])


def test_images_of_a_folder_for_exits_that_taught_int8_are_left_out(tiny, data, tmp_path):
    apart = move_half(data, tmp_path / "apart")
    path = tmp_path / "mge.plan"
    with_int8(tiny, path, sorted(apart.glob("*/*.png"))[:20])
    done = calibrate(path, "--data", data, "--exit-data", apart, *EPSILON, "--json")
    assert done.exit_code == 0, done.output
    assert f"20 of 120 images in {apart} taught INT8: they set no exits" in done.stderr
    assert json.loads(done.stdout)["data"]["exits"]["images"] == 100
    with_int8(tiny, path, apart.glob("*/*.png"))
    done = calibrate(path, "--data", data, "--exit-data", apart, *EPSILON)
    assert done.exit_code == 1
    assert "or taught INT8; exits need images other than" in done.stderr


def test_validation_images_set_temperatures_but_exits_with_a_warning_alone(copy, data, tmp_path):
    apart = move_half(data, tmp_path / "apart")
    (tmp_path / "birds").mkdir()
    data.rename(tmp_path / "birds" / "val")
    done = calibrate(copy, "--data", tmp_path / "birds", "--exit-data", apart, *EPSILON)
    assert (done.exit_code, done.stderr) == (0, "")
    done = calibrate(copy, "--data", tmp_path / "birds", *EPSILON)
    assert done.exit_code == 0
    assert "exits are set by" in done.stderr
    assert "name images that no choice has seen with --exit-data" in done.stderr


def test_classes_without_images_are_named(copy, data):
    shutil.rmtree(data / "bird 1")
    done = calibrate(copy, "--data", data, *EPSILON)
    assert done.exit_code == 0
    assert f"{data} has images of 4 of the bundle's 5 classes, none of bird 1: what is learned" in done.stderr


def test_most_classes_must_have_images(copy, data):
    before = copy.read_bytes()
    for number in (0, 1, 3):
        shutil.rmtree(data / f"bird {number}")
    done = calibrate(copy, "--data", data, *EPSILON)
    assert done.exit_code == 1
    assert (
        "has images of 2 of the bundle's 5 classes, none of bird 0, bird 1, bird 3; expected at least half"
        in done.stderr
    )
    assert copy.read_bytes() == before


def test_images_are_counted_after_decoding(copy, data):
    """Of 240 images 15 cannot be read: 225 are enough for 75 and 150, the least that this guarantee allows."""
    for path in sorted(data.glob("*/*"))[::16]:
        path.write_bytes(path.name.encode())
    done = calibrate(copy, "--data", data, "--epsilon", "0.0198", "--delta", "0.05")
    assert done.exit_code == 1  # images could not be read
    parts = values_of(copy)["data"]
    assert [parts[part]["images"] for part in ("temperatures", "exits")] == [75, 150]


def test_an_image_that_cannot_be_read_is_passed_over(copy, data):
    (data / "bird 1" / "broken.jpg").write_bytes(b"no picture")
    done = calibrate(copy, "--data", data, *EPSILON)
    assert done.exit_code == 1
    assert "broken.jpg" in done.stderr
    assert "1 images could not be read" in done.stderr
    assert sum(part["images"] for part in values_of(copy)["data"].values()) == 240


def keep(data, count):
    for path in sorted(data.glob("*/*"))[count:]:
        path.unlink()


def loosen(data):
    next(data.glob("*/*.png")).rename(data / "1.png")


def spoil_all(data):
    for path in data.glob("*/*"):
        path.write_bytes(path.name.encode())


def spoil_most(data):
    for path in sorted(data.glob("*/*"))[20:]:
        path.write_bytes(path.name.encode())


BAD = {
    "missing": (shutil.rmtree, "no folder "),
    "empty": (lambda data: keep(data, 0), "no image in the class folders"),
    "no picture": (spoil_all, "none of the "),
    "few pictures": (spoil_most, "images could be read in"),
    "few": (lambda data: keep(data, 49), "49 images are in"),
    "no class folders": (loosen, "lies in no class folder"),
    "another class": (
        lambda data: (data / "bird 1").rename(data / "fish"),
        "'fish', which is not among",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_one_line_and_leave_the_bundle_as_it_was(copy, data, case):
    spoil, words = BAD[case]
    spoil(data)
    before = copy.read_bytes()
    done = calibrate(copy, "--data", data, *EPSILON, "--report", copy.parent / "report")
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert copy.read_bytes() == before
    assert list((copy.parent / "report").iterdir()) == []


def test_the_same_images_cannot_serve_both(copy, labelled):
    before = copy.read_bytes()
    done = calibrate(copy, "--data", labelled, "--exit-data", labelled, *EPSILON)
    assert done.exit_code == 1
    assert "exits need images other than those" in done.stderr
    assert copy.read_bytes() == before


@pytest.mark.parametrize("name", ["--epsilon", "--delta"])
def test_the_least_share_asks_for_more_images_than_there_are(copy, labelled, name):
    done = calibrate(copy, "--data", labelled, name, "1e-6")
    assert done.exit_code == 0
    assert "no early exits: too few images for the guarantee" in done.stdout
