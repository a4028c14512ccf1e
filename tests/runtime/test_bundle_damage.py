"""Bundles that are damaged, foreign or made to mislead are refused in one line."""

import io
import os
import pickle
import struct
import zipfile

import onnx
import pytest

from mge_runtime.bundle import Bundle
from mge_runtime.bundle.archive import ArchiveWriter
from mge_runtime.errors import BundleError
from tests.helpers.bundles import TARGET, add_engines, change_byte, read_entries, write_entries

PLAN = f"engines/{TARGET}/expert_3.plan"


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


# --- damage -------------------------------------------------------------------------------------------------------


def test_missing_folder_empty_and_special(tmp_path):
    assert "does not exist" in error_of(tmp_path / "none.plan")
    assert "folder" in error_of(tmp_path)
    (tmp_path / "empty.plan").touch()
    assert "empty (0 bytes)" in error_of(tmp_path / "empty.plan")
    if os.geteuid() != 0:
        (tmp_path / "secret.plan").touch(mode=0)
        assert "Permission denied" in error_of(tmp_path / "secret.plan")
    os.mkfifo(tmp_path / "pipe.plan")  # and nobody waits for a writer
    for path in ("/dev/null", "/dev/zero", tmp_path / "pipe.plan"):
        assert "no regular file" in error_of(path)
    (tmp_path / "loop.plan").symlink_to("loop.plan")
    assert "Too many levels" in error_of(tmp_path / "loop.plan")
    assert "null" in error_of("a\0b")


def test_cut_short_at_any_point(copy):
    whole = copy.read_bytes()
    with zipfile.ZipFile(copy) as archive:
        borders = [info.header_offset for info in archive.infolist()]
    points = {border + d for border in (*borders, 4096, len(whole)) for d in (-22, -21, -1, 0, 1, 30)}
    points |= {1, 2, 3, 4, 10, 29, *range(5, len(whole), 997)}
    for end in sorted(point for point in points if 0 < point < len(whole)):
        copy.write_bytes(whole[:end])
        assert "cut short or damaged" in error_of(copy), end


def test_a_flipped_byte_anywhere(copy):
    """Every header, all of the padding's fields, the manifest, every model entry, the directory and the end record."""
    whole = copy.read_bytes()
    with zipfile.ZipFile(copy) as archive:
        headers = [range(i.header_offset, i.header_offset + 30 + len(i.filename) + 12) for i in archive.infolist()]
        directory = range(archive.start_dir, len(whole))
    points = {p for header in headers for p in header} | {*directory, *range(0, len(whole), 61)}
    with Bundle.open(copy) as bundle:
        regions = map(bundle.entry, bundle.sizes)
        points |= {point for region in regions for point in (region.offset, region.offset + region.size - 1)}
    with copy.open("r+b", buffering=0) as stream:
        for point in sorted(points):
            stream.seek(point)
            stream.write(bytes([whole[point] ^ 0x20]))
            assert "mge.plan" in error_of(copy), point
            stream.seek(point)
            stream.write(whole[point : point + 1])
    open_and_read_all(copy)


def test_only_what_is_opened_is_hashed(copy):
    change_byte(copy, "onnx/expert_3.weights")
    with Bundle.open(copy) as bundle:
        bundle.read("onnx/expert_1.onnx")
        bundle.verify(["onnx/expert_1.weights"])
        for use in (lambda: bundle.verify(["onnx/expert_3.weights"]), lambda: bundle.read("onnx/expert_3.weights")):
            with pytest.raises(BundleError, match=r"onnx/expert_3\.weights do not match their hash"):
                use()


def test_a_damaged_entry_is_the_reason_even_where_the_opening_failed_first(copy):
    change_byte(copy, "onnx/expert_3.weights")
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


GRAPH = onnx.helper.make_graph([], "g", [], [])


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("raw TensorRT engine", b"ftrt" + bytes(200)),
        ("raw TensorRT engine", b"vtrt\0\0\0\0\x02" + bytes(100)),
        ("plain ONNX model", onnx.helper.make_model(GRAPH, producer_name="pytorch").SerializeToString()),
        ("plain ONNX model", onnx.helper.make_model(GRAPH).SerializeToString()),
        ("PyTorch checkpoint", _zip({"best/data.pkl": b"x", "best/version": b"3"})),
        ("PyTorch checkpoint", pickle.dumps({"a": 1}, 2)),
        ("some other ZIP", _zip({"word/document.xml": b"x"})),
        ("safetensors", struct.pack("<Q", 60) + b'{"__metadata__":{}}' + bytes(60)),
        ("image", b"\x89PNG\r\n\x1a\n" + bytes(100)),
        ("JSON or text", b'{"a": 1}'),
        ("JSON or text", b"  [1]"),
        ("no file that mge knows", b"hello world" * 20),
        ("no file that mge knows", bytes(5000)),
    ],
)
def test_foreign_files_are_named(tmp_path, kind, data):
    (tmp_path / "mge.plan").write_bytes(data)
    assert kind in error_of(tmp_path / "mge.plan")


def test_a_damaged_engine_is_refused(copy, tmp_path):
    add_engines(copy, plans={"expert_3": b"good"})
    write_entries(copy, {**read_entries(copy), PLAN: b"evil"})
    with Bundle.open(copy) as bundle:
        for use in (lambda: bundle.read(PLAN), lambda: bundle.extract(tmp_path / "out")):
            with pytest.raises(BundleError, match=r"expert_3\.plan has 4 bytes with the CRC-32 \w+, .*json says 4 and"):
                use()
    assert not (tmp_path / "out" / PLAN).exists()


# --- malice -------------------------------------------------------------------------------------------------------


def test_documents_of_any_size_are_not_read(copy):
    entries = read_entries(copy)
    for name in ("manifest.json", "calibration.json", f"engines/{TARGET}/engine.json"):
        write_entries(copy, {**entries, name: entries["manifest.json"] + b" " * 2**22})
        with pytest.raises(BundleError, match=rf"entry {name} has \d+ bytes; expected at most"), Bundle.open(copy) as b:
            b.calibration() if name == "calibration.json" else b.engine(TARGET)
    write_entries(copy, entries)
    with pytest.raises(BundleError, match="expected at most"):
        add_engines(copy, details={"notes": "n" * 2**22})
    assert read_entries(copy) == entries


@pytest.mark.parametrize(
    "name", ["onnx/../../etc/cron", "/etc/passwd", "onnx/a/b.onnx", "engines/../x.plan", "onnx/ä.onnx"]
)
def test_names_that_lead_elsewhere_are_refused(copy, name):
    with pytest.raises(ValueError, match="cannot be the name"):
        ArchiveWriter(io.BytesIO()).add(name, [b""])
    # The same length, so that only the name differs from what a writer could have made.
    stand_in = "onnx/" + "a" * (len(name.encode()) - 10) + ".onnx"
    write_entries(copy, {**read_entries(copy), stand_in: b"x"})
    copy.write_bytes(copy.read_bytes().replace(stand_in.encode(), name.encode()))
    assert "which no bundle has" in error_of(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"onnx/expert_3.weights": None}, "onnx/expert_3.weights"),
        ({"onnx/other.onnx": b"x"}, "onnx/other.onnx"),
        ({"onnx/expert_3.weights": b"longer than before"}, "has 18 bytes with the CRC-32"),
        ({"onnx/expert_3.weights": bytes(500)}, "onnx/expert_3.weights has 500 bytes with the CRC-32"),
        ({"manifest.json": None}, "holds no manifest.json"),
    ],
)
def test_entries_that_are_not_the_manifests_are_refused_at_opening(copy, changes, message):
    entries = {**read_entries(copy), **changes}
    write_entries(copy, {name: data for name, data in entries.items() if data is not None})
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b'"schema_version": 3', b'"schema_version": 4', "the bundle has schema version 4"),
        (b'"resize"', b'"resise"', "preprocess.resize"),
        (b'"logits": "mean', b'"logits": "no_mean', "no_mean"),
    ],
)
def test_what_is_wrong_with_the_manifest_is_said_with_the_file(copy, before, after, message):
    entries = read_entries(copy)
    write_entries(copy, {**entries, "manifest.json": entries["manifest.json"].replace(before, after)})
    assert error_of(copy).startswith(f"{copy}: ")
    assert message in error_of(copy)
