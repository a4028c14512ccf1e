"""`mge-calibrate` and its images: which ones teach what, too few of them, and those that cannot be used."""

import hashlib
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mge_runtime.bundle import Bundle, write_bundle
from mge_runtime.calibrated import Calibrated

spec = importlib.util.spec_from_file_location("mge_tests_command", Path(__file__).with_name("command.py"))
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)
EPSILON, calibrate, values_of = command.EPSILON, command.calibrate, command.values_of


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


def test_too_few_images_for_the_promise_give_temperatures_alone(copy, labelled):
    done = calibrate(copy, "--data", labelled, "--report", copy.parent / "report")
    assert done.exit_code == 0
    assert "no early exits: too few images for the promise: 240" in done.output
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
    plan = {"type": "int8", "attested": "graph", "calibration": {"digests": digests}}
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
    """Of 240 images 15 cannot be read: 225 are enough for 75 and 150, the least that this promise allows."""
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
    assert "no early exits: too few images for the promise" in done.stdout
