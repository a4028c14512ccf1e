"""The images that INT8 is calibrated on: drawn, refused, and recorded so that mge-calibrate keeps them from exits."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mge_calibration.images import int8_digests, list_labeled, short_digest
from mge_calibration.int8.images import MIN_IMAGES, read_calibration_images
from mge_calibration.int8.quantize import Int8Options
from mge_export.cli import main
from mge_export.images import find_verify_images
from mge_export.int8 import Int8Request
from mge_runtime.decode import decode_image
from mge_runtime.errors import ExportError, InputError
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import to_frame
from tests.helpers.commands import fails
from tests.helpers.layouts import save_csv, table_rows
from tests.helpers.tiny_models import save_noise

PREPROCESS = Preprocess(size=32, resize=36, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def save_small(folder, count):
    return save_noise(folder.parent, {folder.name: count}, (8, 8)) / folder.name


def read(folder, limit=0, seed=0, few=True, **options):
    return read_calibration_images(folder, PREPROCESS, limit=limit, seed=seed, few=few, **options)


@pytest.mark.parametrize("hold_out", [0, 1])  # what an export is verified on is found again, too
def test_images_are_recorded_so_that_they_are_found_again(tmp_path, hold_out):
    save_noise(tmp_path, {"a": 3, "b": 3}, (40, 40))
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    images = read(tmp_path, hold_out=hold_out)
    assert len(images.held_out) == hold_out
    plan = {"type": "int8", "calibration": Int8Request(images, Int8Options()).to_dict()}
    found = int8_digests(SimpleNamespace(precision={"expert_2": {"type": "fp32"}, "expert_1": plan}))
    listed = list_labeled(tmp_path, ("a", "b"))[1]
    assert found == {short_digest(image.sha256) for image in listed if "broken" not in image.name}
    assert len(found) == 6


def test_calibration_images_are_drawn_by_seed_and_hashed(tmp_path):
    save_small(tmp_path / "a", 12)
    some, every, other = read(tmp_path, 5), read(tmp_path), read(tmp_path, seed=1)
    assert np.array_equal(some.frames, read(tmp_path, 5).frames)
    assert some.sha256 == read(tmp_path, 5).sha256 != read(tmp_path, 5, 1).sha256
    assert len(every.frames) == 12
    # All of them are the same set in another order, and a smaller draw is the beginning of a larger one.
    assert every.sha256 == other.sha256
    assert not np.array_equal(every.frames, other.frames)
    assert {frame.tobytes() for frame in every.frames} == {frame.tobytes() for frame in other.frames}
    assert np.array_equal(every.frames[:5], some.frames)
    (tmp_path / "a/3.png").write_bytes((tmp_path / "a/4.png").read_bytes())
    assert read(tmp_path).sha256 != every.sha256


def test_a_damaged_image_is_left_out_and_said(tmp_path):
    folder, lines = save_small(tmp_path / "a", 3), []
    (folder / "1.png").write_bytes(b"no image")
    assert len(read(folder, say=lines.append).frames) == 2
    (line,) = lines
    assert "1.png" in line


def test_too_few_images_are_refused(tmp_path):
    folder = save_small(tmp_path / "few", MIN_IMAGES - 1)
    with pytest.raises(InputError, match=r"few gave 99 images to calibrate on; expected at least 100"):
        read(folder, few=False)
    save_small(folder, MIN_IMAGES)
    assert len(read(folder, few=False).frames) == MIN_IMAGES
    with pytest.raises(InputError, match=r"has no image left to verify on beside 3 .* --verify-data"):
        read(save_small(tmp_path / "three", 3), hold_out=16)


@pytest.mark.parametrize(
    ("count", "damaged", "ranges", "held"), [(100, 0, 99, 1), (101, 0, 100, 1), (115, 0, 100, 15), (115, 5, 100, 10),
    (120, 0, 104, 16)],
)  # fmt: skip
def test_a_folder_just_large_enough_serves_ranges_and_verification(tmp_path, count, damaged, ranges, held):
    folder = save_small(tmp_path / "a", count)
    draw = lambda: read(folder, 256, few=False, hold_out=16)  # noqa: E731
    held_before = set(draw().held_out)
    others = [path for path in sorted(folder.iterdir()) if path not in held_before]
    for path in others[:damaged]:
        path.write_bytes(b"no image")
    found = draw()
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
        (["--int8", "--calib-data", "{few}", "--max-drop", "nan"], "'--max-drop': 'nan' is no finite number; expected"),
        (
            ["--int8", "--calib-data", "{few}", "--min-box-iou", "nan"],
            "'--min-box-iou': 'nan' is no finite number; expected",
        ),
        (["--int8", "--calib-data", "{few}", "--min-box-iou", "1"], "'--min-box-iou': 1.0 is not in the range 0<=x<1"),
    ],
    ids=["no-data", "data-alone", "missing", "file", "empty", "few", "damaged", "nan-drop", "nan-iou", "iou"],
)
def test_bad_input_is_one_line_and_nothing_is_written(checkpoint, tmp_path, arguments, message):
    save_small(tmp_path / "few", 3)
    (save_small(tmp_path / "damaged", 1) / "0.png").write_bytes(b"no image")
    for name in ("empty", "out"):
        (tmp_path / name).mkdir()
    places = {name: str(tmp_path / name) for name in ("few", "empty", "damaged", "nowhere")}
    places["file"] = str(tmp_path / "few/1.png")
    arguments = [argument.format(**places) for argument in arguments]
    code = 2 if message.startswith(("--", "'--")) else 1
    assert message in fails(main, "--ckpt", checkpoint, "-o", tmp_path / "out/mge.plan", *arguments, code=code)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("copied", "count"), [("2", 2), ("8", 3)])  # by the seed 1, 8 and 13 are held out
def test_int8_is_verified_on_images_that_set_no_ranges(checkpoint, tmp_path, monkeypatch, copied, count):
    folder, seen = save_small(tmp_path / "a", 15), []
    (folder / "1.png").write_bytes((folder / f"{copied}.png").read_bytes())

    def export(_model, _path, _precision, images, *, int8, **_):
        seen.append((images, int8.images))
        raise ExportError("far enough")

    monkeypatch.setattr("mge_export.export.export_bundle", export)
    options = ["--ckpt", checkpoint, "--int8", "--calib-data", folder, "--force-few-images", "--target", "onnx"]
    assert fails(main, *options, "-o", tmp_path / "mge.plan") == "error: far enough"
    ((images, ranges),) = seen
    assert images.photographs
    assert images.source == f"{images.count} images in a that set no ranges"
    assert (len(ranges.frames), images.count) == (12, count)
    frames = np.concatenate(list(images.batches()))
    assert not any(np.array_equal(frame, other) for frame in frames for other in ranges.frames)


def test_an_unreadable_image_to_verify_on_is_left_out(tmp_path, monkeypatch):
    folder = save_small(tmp_path / "a", 16)
    closed, *others = read(folder, hold_out=4).held_out
    original, said = Path.read_bytes, []

    def read_bytes(path):
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert list(read(folder, hold_out=4, say=said.append).held_out) == others
    assert said == [f"left out of the images to verify on: [Errno 13] Permission denied: '{closed}'"]


def test_a_list_gives_training_images_to_calibrate_and_validation_images_to_verify(tmp_path):
    save_csv(tmp_path / "images.csv", table_rows(tmp_path))

    def frames(numbers):
        return [to_frame(decode_image(tmp_path / f"photos/{n}.png"), PREPROCESS)[0].tobytes() for n in numbers]

    images = read(tmp_path / "images.csv")
    assert images.source == "6 of 6 images in images.csv"
    assert {frame.tobytes() for frame in images.frames} == set(frames(range(6)))
    verified = find_verify_images(tmp_path / "images.csv", PREPROCESS, 0)
    assert [verified.load(n).tobytes() for n in range(verified.count)] == frames((6, 7, 8))
    with pytest.raises(InputError, match=r"no file .*absent\.csv; expected a table"):
        read(tmp_path / "absent.csv")
