"""The images that INT8 is calibrated on: drawn, refused, and recorded so that mge-calibrate keeps them from exits."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_calibration.images import int8_digests, list_labeled, short_digest
from mge_calibration.int8.graph import Int8Options
from mge_calibration.int8.images import MIN_IMAGES, read_calibration_images
from mge_export.cli import main
from mge_export.int8 import Int8Request
from mge_runtime.errors import ExportError, InputError
from mge_runtime.manifest import Preprocess


@pytest.mark.parametrize("hold_out", [0, 1])  # what an export is verified on is found again, too
def test_images_are_recorded_so_that_they_are_found_again(tmp_path, hold_out):
    random = np.random.default_rng(0)
    for number in range(6):
        place = tmp_path / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)).save(place / f"{number}.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    preprocess = Preprocess(size=32, resize=36, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    images = read_calibration_images(tmp_path, preprocess, limit=0, seed=0, few=True, hold_out=hold_out)
    assert len(images.held_out) == hold_out
    plan = {"type": "int8", "calibration": Int8Request(images, Int8Options()).to_dict()}
    found = int8_digests(SimpleNamespace(precision={"expert_2": {"type": "fp32"}, "expert_1": plan}))
    listed = list_labeled(tmp_path, ("a", "b"))[1]
    assert found == {short_digest(image.sha256) for image in listed if "broken" not in image.name}
    assert len(found) == 6


def save_pictures(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")


def test_calibration_images_are_drawn_by_seed_and_hashed(tiny, tmp_path):
    preprocess = tiny.make_model().config.preprocess
    save_pictures(tmp_path / "a", 12)
    read = lambda limit, seed: read_calibration_images(tmp_path, preprocess, limit=limit, seed=seed, few=True)  # noqa: E731
    assert np.array_equal(read(5, 0).frames, read(5, 0).frames)
    assert read(5, 0).sha256 == read(5, 0).sha256
    assert read(5, 0).sha256 != read(5, 1).sha256
    assert len(read(0, 0).frames) == 12
    # All of them are the same set in another order, and a smaller draw is the beginning of a larger one.
    assert read(0, 0).sha256 == read(0, 1).sha256
    assert not np.array_equal(read(0, 0).frames, read(0, 1).frames)
    assert {frame.tobytes() for frame in read(0, 0).frames} == {frame.tobytes() for frame in read(0, 1).frames}
    assert np.array_equal(read(0, 0).frames[:5], read(5, 0).frames)
    before = read(0, 0).sha256
    (tmp_path / "a/3.png").write_bytes((tmp_path / "a/4.png").read_bytes())
    assert read(0, 0).sha256 != before


def test_a_damaged_image_is_left_out_and_said(tiny, tmp_path):
    save_pictures(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(b"no picture")
    lines = []
    preprocess = tiny.make_model().config.preprocess
    found = read_calibration_images(tmp_path, preprocess, limit=0, seed=0, few=True, say=lines.append)
    assert len(found.frames) == 2
    assert len(lines) == 1
    assert "1.png" in lines[0]


def test_too_few_images_are_refused(tiny, tmp_path):
    save_pictures(tmp_path / "few", MIN_IMAGES - 1)
    preprocess = tiny.make_model().config.preprocess
    with pytest.raises(InputError, match=r"few gave 99 images to calibrate on; expected at least 100"):
        read_calibration_images(tmp_path / "few", preprocess, limit=0, seed=0)
    save_pictures(tmp_path / "few", MIN_IMAGES)
    assert len(read_calibration_images(tmp_path / "few", preprocess, limit=0, seed=0).frames) == MIN_IMAGES


@pytest.mark.parametrize(
    ("count", "damaged", "ranges", "held"), [(100, 0, 99, 1), (101, 0, 100, 1), (115, 0, 100, 15), (115, 5, 100, 10),
    (120, 0, 104, 16)],
)  # fmt: skip
def test_a_folder_just_large_enough_serves_ranges_and_verification(tiny, tmp_path, count, damaged, ranges, held):
    save_pictures(tmp_path, count)
    preprocess = tiny.make_model().config.preprocess
    read = lambda: read_calibration_images(tmp_path, preprocess, limit=256, seed=0, hold_out=16)  # noqa: E731
    held_before = set(read().held_out)
    others = [path for path in sorted(tmp_path.iterdir()) if path not in held_before]
    for path in others[:damaged]:
        path.write_bytes(b"no picture")
    found = read()
    assert (len(found.frames), len(found.held_out)) == (ranges, held)
    assert len(found.digests) == ranges + held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8"], "--int8 learns ranges from photographs and none were named: add --calib-data DIR"),
        (["--calib-data", "{few}"], "--calib-data is for --int8, which was not asked for"),
        (
            ["--int8", "--calib-data", "{nowhere}"],
            "nowhere; expected a folder of images to calibrate on: name one with --calib-data",
        ),
        (["--int8", "--calib-data", "{file}"], "1.png is a file; expected a folder of images"),
        (["--int8", "--calib-data", "{empty}"], "empty"),
        (
            ["--int8", "--calib-data", "{few}"],
            "images to calibrate on, beside those held out to verify on; expected at least 100",
        ),
        (["--int8", "--calib-data", "{damaged}", "--force-few-images"], "gave 0 images to calibrate on"),
        (["--int8", "--calib-data", "{few}", "--max-drop", "nan"], "'--max-drop': 'nan' is no number; expected one in"),
        (["--int8", "--calib-data", "{few}", "--min-box-iou", "nan"], "'--min-box-iou': 'nan' is no number; expected"),
        (["--int8", "--calib-data", "{few}", "--min-box-iou", "1"], "'--min-box-iou': 1.0 is not in the range 0<=x<1"),
    ],
    ids=["no-data", "data-alone", "missing", "file", "empty", "few", "damaged", "nan-drop", "nan-iou", "iou"],
)
def test_bad_input_is_one_line_and_nothing_is_written(checkpoint, tmp_path, arguments, message):
    save_pictures(tmp_path / "few", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/1.png").write_bytes(b"no picture")
    places = {name: str(tmp_path / name) for name in ("few", "empty", "damaged", "nowhere")}
    places["file"] = str(tmp_path / "few/1.png")
    out = tmp_path / "out"
    out.mkdir()
    arguments = [argument.format(**places) for argument in arguments]
    found = CliRunner().invoke(main, ["--ckpt", str(checkpoint), "-o", str(out / "mge.plan"), *arguments])
    assert found.exit_code == (2 if message.startswith(("--", "'--")) else 1)
    last = found.output.strip().splitlines()[-1]
    assert message in last
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("copied", "count"), [("2", 2), ("8", 3)])  # by the seed 1, 8 and 13 are held out
def test_int8_is_verified_on_images_that_set_no_ranges(checkpoint, tmp_path, monkeypatch, copied, count):
    save_pictures(tmp_path, 15)
    (tmp_path / "1.png").write_bytes((tmp_path / f"{copied}.png").read_bytes())
    seen = []

    def export(_model, _path, _precision, images, *, int8, **_):
        seen.append((images, int8.images))
        raise ExportError("far enough")

    monkeypatch.setattr("mge_export.export.export_bundle", export)
    options = ["--ckpt", checkpoint, "--int8", "--calib-data", tmp_path, "--force-few-images", "--target", "onnx"]
    found = CliRunner().invoke(main, [*map(str, options), "-o", str(tmp_path / "mge.plan")])
    assert found.stderr.splitlines()[-1] == "error: far enough"
    ((images, ranges),) = seen
    assert images.photographs
    assert images.source == f"{images.count} images in {tmp_path.name} that set no ranges"
    assert (len(ranges.frames), images.count) == (12, count)
    frames = np.concatenate(list(images.batches()))
    assert not any(np.array_equal(frame, other) for frame in frames for other in ranges.frames)


def test_a_folder_that_leaves_nothing_to_verify_on_is_refused(tiny, tmp_path):
    save_pictures(tmp_path, 3)
    preprocess = tiny.make_model().config.preprocess
    with pytest.raises(InputError, match=r"has no image left to verify on beside 3 .* --verify-data"):
        read_calibration_images(tmp_path, preprocess, limit=0, seed=0, few=True, hold_out=16)


def test_an_unreadable_image_to_verify_on_is_left_out(tiny, tmp_path, monkeypatch):
    save_pictures(tmp_path, 16)
    preprocess = tiny.make_model().config.preprocess
    options = {"limit": 0, "seed": 0, "few": True, "hold_out": 4}
    closed, *others = read_calibration_images(tmp_path, preprocess, **options).held_out
    read, said = Path.read_bytes, []

    def read_bytes(path):
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert list(read_calibration_images(tmp_path, preprocess, **options, say=said.append).held_out) == others
    assert said == [f"left out of the images to verify on: [Errno 13] Permission denied: '{closed}'"]
