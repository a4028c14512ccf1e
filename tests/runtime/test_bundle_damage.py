"""Bundles that are damaged, foreign or made to mislead are refused in one line."""

import importlib.util
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import onnx
import pytest

from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.bundle.archive import ArchiveWriter
from mge_runtime.errors import BundleError

spec = importlib.util.spec_from_file_location("mge_tests_zip_entries", Path(__file__).with_name("zip_entries.py"))
zip_entries = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zip_entries)

TARGET = "tensorrt-10.3-sm87-linux-aarch64"


def open_and_read_all(path):
    with Bundle.open(path) as bundle:
        bundle.verify()


def error_of(path):
    with pytest.raises(BundleError) as caught:
        open_and_read_all(path)
    message = str(caught.value)
    assert "\n" not in message
    assert any(word in message for word in ("expected", "export it again", "check the name"))
    return message


def test_documents_of_any_size_are_not_read(copy):
    entries = zip_entries.read_entries(copy)
    padded = entries["manifest.json"] + b" " * 2**22
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
    for name in ("manifest.json", "calibration.json", f"engines/{TARGET}/engine.json"):
        zip_entries.write_entries(copy, {**entries, name: padded})
        with pytest.raises(BundleError, match=rf"entry {name} has \d+ bytes; expected at most"), Bundle.open(copy) as b:
            b.calibration() if name == "calibration.json" else b.engine(TARGET)
    zip_entries.write_entries(copy, entries)
    with pytest.raises(BundleError, match="expected at most"):
        add_engine(copy, TARGET, {}, {"notes": "n" * 2**22}, manifest_sha256=digest)
    assert zip_entries.read_entries(copy) == entries


# --- damage -------------------------------------------------------------------------------------------------------


def test_missing_folder_empty_and_special(tmp_path):
    assert "does not exist" in error_of(tmp_path / "none.plan")
    assert "folder" in error_of(tmp_path)
    (tmp_path / "empty.plan").touch()
    assert "empty (0 bytes)" in error_of(tmp_path / "empty.plan")
    if os.geteuid() != 0:
        (tmp_path / "secret.plan").touch(mode=0)
        assert "Permission denied" in error_of(tmp_path / "secret.plan")
    assert "no regular file" in error_of("/dev/null")
    assert "no regular file" in error_of("/dev/zero")
    os.mkfifo(tmp_path / "pipe.plan")
    assert "no regular file" in error_of(tmp_path / "pipe.plan")  # and nobody waits for a writer
    (tmp_path / "loop.plan").symlink_to("loop.plan")
    error_of(tmp_path / "loop.plan")


def test_cut_short_at_any_point(copy):
    whole = copy.read_bytes()
    with zipfile.ZipFile(copy) as archive:
        borders = [info.header_offset for info in archive.infolist()]
    points = {
        1,
        2,
        3,
        4,
        10,
        29,
        30,
        35,
        300,
        4095,
        4096,
        len(whole) - 1,
        len(whole) - 21,
        len(whole) - 22,
        len(whole) - 23,
    }
    points |= {border + d for border in borders for d in (-1, 0, 1, 30)} - {-1, 0}
    points |= set(range(5, len(whole), 997))
    for end in sorted(points):
        copy.write_bytes(whole[:end])
        assert "cut short or damaged" in error_of(copy), end


def test_a_flipped_byte_anywhere(copy, bundle_path):
    """Every header, all of the padding's fields, the manifest, every model entry, the directory and the end record."""
    whole = bytearray(bundle_path.read_bytes())
    with zipfile.ZipFile(bundle_path) as archive:
        headers = [range(i.header_offset, i.header_offset + 30 + len(i.filename) + 12) for i in archive.infolist()]
        directory = range(archive.start_dir, len(whole))
    points = {p for header in headers for p in header} | set(directory) | set(range(0, len(whole), 61))
    with Bundle.open(bundle_path) as bundle:
        for name in bundle.sizes:
            region = bundle.entry(name)
            points |= {region.offset, region.offset + region.size - 1}
    stream = copy.open("r+b")
    with stream:
        for point in sorted(points):
            stream.seek(point)
            stream.write(bytes([whole[point] ^ 0x20]))
            stream.flush()
            try:
                message = error_of(copy)
            except pytest.fail.Exception:
                pytest.fail(f"a flipped byte at {point} went unseen")
            assert message.count("mge.plan"), point
            stream.seek(point)
            stream.write(whole[point : point + 1])
    open_and_read_all(copy)


def spoil_weights(path):
    with Bundle.open(path) as bundle:
        offset = bundle.entry("onnx/expert_3.weights").offset
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\x7f")


def test_only_what_is_opened_is_hashed(copy):
    spoil_weights(copy)
    with Bundle.open(copy) as bundle:
        bundle.read("onnx/expert_1.onnx")
        bundle.verify(["onnx/expert_1.weights"])
        with pytest.raises(BundleError, match=r"onnx/expert_3\.weights do not match their hash"):
            bundle.verify(["onnx/expert_3.weights"])
        with pytest.raises(BundleError, match="do not match"):
            bundle.read("onnx/expert_3.weights")


def test_a_damaged_entry_is_the_reason_even_where_the_opening_failed_first(copy):
    spoil_weights(copy)
    with (
        Bundle.open(copy) as bundle,
        pytest.raises(BundleError, match="do not match"),
        bundle.verifying(["onnx/expert_3.weights"]),
    ):
        raise RuntimeError("a session that cannot open")


def _zip(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_foreign_files_are_named(tmp_path):
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), producer_name="pytorch")
    plain = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    picture = b"\x89PNG\r\n\x1a\n" + bytes(100)
    safetensors = struct.pack("<Q", 60) + b'{"__metadata__":{}}' + bytes(60)
    files = {
        "raw TensorRT engine": [b"ftrt" + bytes(200), b"ptrt" + bytes(200), b"vtrt\0\0\0\0\x02" + bytes(100)],
        "plain ONNX model": [model.SerializeToString(), plain.SerializeToString()],
        "PyTorch checkpoint": [_zip({"best/data.pkl": b"x", "best/version": b"3"}), pickle.dumps({"a": 1}, 2)],
        "some other ZIP": [_zip({"word/document.xml": b"x"})],
        "safetensors": [safetensors],
        "image": [picture],
        "JSON or text": [b'{"a": 1}', b"  [1]"],
        "no file that mge knows": [b"hello world" * 20, bytes(5000)],
    }
    path = tmp_path / "mge.plan"
    for kind, contents in files.items():
        for data in contents:
            path.write_bytes(data)
            assert kind in error_of(path)


def test_a_damaged_engine_is_refused(copy, tmp_path):
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
    add_engine(copy, TARGET, {"expert_3": b"good"}, {}, manifest_sha256=digest)
    zip_entries.write_entries(
        tmp_path / "swapped.plan", {**zip_entries.read_entries(copy), f"engines/{TARGET}/expert_3.plan": b"evil"}
    )
    with Bundle.open(tmp_path / "swapped.plan") as bundle:
        for use in (lambda: bundle.read(f"engines/{TARGET}/expert_3.plan"), lambda: bundle.extract(tmp_path / "out")):
            with pytest.raises(
                BundleError, match=r"expert_3\.plan has 4 bytes with the CRC-32 \w+, .*engine\.json says 4 and"
            ):
                use()
    assert not (tmp_path / "out" / "engines" / TARGET / "expert_3.plan").exists()


# --- malice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["onnx/../../etc/cron", "/etc/passwd", "onnx/a/b.onnx", "engines/../x.plan", "onnx/ä.onnx"]
)
def test_names_that_lead_elsewhere_are_refused(bundle_path, tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name"):
        ArchiveWriter(io.BytesIO()).add(name, [b""])
    # The same length, so that only the name differs from what a writer could have made.
    path = tmp_path / "evil.plan"
    stand_in = "onnx/" + "a" * (len(name.encode()) - 10) + ".onnx"
    zip_entries.write_entries(path, {**zip_entries.read_entries(bundle_path), stand_in: b"x"})
    path.write_bytes(path.read_bytes().replace(stand_in.encode(), name.encode()))
    assert "which no bundle has" in error_of(path)


def test_a_missing_and_a_surplus_model_entry_are_refused(bundle_path, tmp_path):
    contents = zip_entries.read_entries(bundle_path)
    path = tmp_path / "mge.plan"
    zip_entries.write_entries(path, {name: data for name, data in contents.items() if name != "onnx/expert_3.weights"})
    assert "onnx/expert_3.weights" in error_of(path)
    zip_entries.write_entries(path, {**contents, "onnx/other.onnx": b"x"})
    assert "onnx/other.onnx" in error_of(path)
    zip_entries.write_entries(path, {**contents, "onnx/expert_3.weights": b"longer than before"})
    assert "has 18 bytes with the CRC-32" in error_of(path)
    zip_entries.write_entries(path, {name: data for name, data in contents.items() if name != "manifest.json"})
    assert "holds no manifest.json" in error_of(path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b'"schema_version": 2', b'"schema_version": 3', "the bundle has schema version 3"),
        (b'"resize"', b'"resise"', "preprocess.resize"),
        (b'"logits": "mean', b'"logits": "no_mean', "no_mean"),
    ],
)
def test_what_is_wrong_with_the_manifest_is_said_with_the_file(bundle_path, tmp_path, before, after, message):
    contents = zip_entries.read_entries(bundle_path)
    assert before in contents["manifest.json"]
    path = tmp_path / "mge.plan"
    zip_entries.write_entries(path, {**contents, "manifest.json": contents["manifest.json"].replace(before, after)})
    assert error_of(path).startswith(f"{path}: ")
    assert message in error_of(path)


def test_sizes_beyond_the_file_are_refused(copy):
    whole = bytearray(copy.read_bytes())
    with zipfile.ZipFile(copy) as archive:
        directory = archive.start_dir
    # Both sizes, header offset; in the end record: size and start of the directory, length of a comment.
    for field in (directory + 20, directory + 24, directory + 42, len(whole) - 10, len(whole) - 6, len(whole) - 2):
        broken = whole.copy()
        broken[field : field + 2] = b"\xff\x7f"
        copy.write_bytes(broken)
        assert "cut short or damaged" in error_of(copy)
