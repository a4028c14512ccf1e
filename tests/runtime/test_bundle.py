import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import onnx
import pytest

from mge_runtime.bundle import Bundle, StageModel, add_engine, untouched, write_bundle
from mge_runtime.bundle.archive import ArchiveError, ArchiveWriter, read_directory
from mge_runtime.errors import BundleError, OutputError

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


# --- the format ---------------------------------------------------------------------------------------------------


def test_any_unzip_reads_it_and_data_lies_on_pages(bundle_path):
    with zipfile.ZipFile(bundle_path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        data = {name: archive.read(name) for name in names}
    assert "manifest.json" in names
    assert "onnx/expert_1.onnx" in names
    assert "onnx/expert_1.weights" in names
    assert "onnx/ingest.weights" not in names
    with Bundle.open(bundle_path) as bundle:
        whole = bundle_path.read_bytes()
        for name in names:
            region = bundle.region(name)
            assert region.offset % 4096 == 0
            assert whole[region.offset : region.offset + region.size] == data[name]
            assert bytes(bundle.view(name)) == data[name]
            assert bundle.read(name) == data[name]


def test_unzip_and_its_test_agree(bundle_path):
    if shutil.which("unzip") is None:
        pytest.skip("the command unzip is not installed")
    assert subprocess.run(["unzip", "-tq", bundle_path], check=False, capture_output=True).returncode == 0


def test_the_same_model_gives_the_same_bytes(tiny, bundle_path, tmp_path):
    tiny.write_tiny_bundle(tmp_path / "again.plan")
    assert (tmp_path / "again.plan").read_bytes() == bundle_path.read_bytes()


def test_the_manifest_comes_back_with_hash_and_size_of_every_model_entry(tiny, tmp_path):
    written = tiny.write_tiny_bundle(tmp_path / "mge.plan")
    with Bundle.open(tmp_path / "mge.plan") as bundle:
        assert bundle.manifest == written
        assert set(written.entries) == set(bundle.sizes) - {"manifest.json"}
        assert all(bundle.sizes[name] == entry.size for name, entry in written.entries.items())


def test_parts_of_the_archive_that_would_need_zip64_are_refused():
    stream = io.BytesIO()
    archive = ArchiveWriter(stream)

    class Endless(bytes):
        def __len__(self):
            return 2**32

    with pytest.raises(OutputError, match="4 GiB"):
        archive.add("manifest.json", [Endless()])


def test_extracted_stages_are_ordinary_onnx_models(bundle_path, tmp_path):
    import onnxruntime

    with Bundle.open(bundle_path) as bundle:
        written = bundle.extract(tmp_path / "out")
        stages = bundle.manifest.stages
    assert tmp_path / "out" / "onnx" / "gate.weights" in written
    rng = np.random.default_rng(0)
    for stage in stages:
        path = tmp_path / "out" / "onnx" / f"{stage.name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feeds = {t.name: (rng.random((2, *t.shape[1:])) * 255).astype(t.dtype) for t in stage.inputs}
        values = session.run(None, feeds)
        assert [v.shape for v in values] == [(2, *t.shape[1:]) for t in stage.outputs]


def test_extracting_where_nothing_can_be_written(bundle_path, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with Bundle.open(bundle_path) as bundle, pytest.raises(OutputError, match="cannot write"):
        bundle.extract(tmp_path / "file")


# --- damage -------------------------------------------------------------------------------------------------------


def test_missing_folder_empty_and_special(tmp_path):
    assert "does not exist" in error_of(tmp_path / "none.plan")
    assert "folder" in error_of(tmp_path)
    (tmp_path / "empty.plan").touch()
    assert "empty (0 bytes)" in error_of(tmp_path / "empty.plan")
    if os.geteuid() != 0:
        (tmp_path / "secret.plan").touch(mode=0)
        assert "Permission denied" in error_of(tmp_path / "secret.plan")
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
            region = bundle.region(name)
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


def test_only_what_is_opened_is_hashed(copy):
    with Bundle.open(copy) as bundle:
        region = bundle.region("onnx/gate.weights")
    with copy.open("r+b") as stream:
        stream.seek(region.offset)
        stream.write(b"\x7f")
    with Bundle.open(copy) as bundle:
        bundle.read("onnx/expert_1.onnx")
        bundle.verify(["onnx/expert_1.weights"])
        with pytest.raises(BundleError, match=r"onnx/gate\.weights do not match their hash"):
            bundle.verify(["onnx/gate.weights"])
        with pytest.raises(BundleError, match="do not match"):
            bundle.read("onnx/gate.weights")


def test_a_damaged_entry_is_the_reason_even_where_the_opening_failed_first(copy):
    with Bundle.open(copy) as bundle:
        region = bundle.region("onnx/gate.weights")
    with copy.open("r+b") as stream:
        stream.seek(region.offset)
        stream.write(b"\x7f")
    with (
        Bundle.open(copy) as bundle,
        pytest.raises(BundleError, match="do not match"),
        bundle.verifying(["onnx/gate.weights"]),
    ):
        raise RuntimeError("a session that cannot open")


@pytest.fixture
def settled(copy, tmp_path, monkeypatch):
    """A bundle that was written a while ago, opened and hashed once."""
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(untouched, "_SETTLED", 0.0)
    check_weights(copy)
    return copy


def check_weights(path, again=False):
    with Bundle.open(path) as bundle, bundle.verifying(["onnx/gate.weights"], again=again):
        pass


def refuse(*_):
    raise AssertionError("it was hashed")


def test_what_was_hashed_is_not_hashed_at_the_next_start(settled, monkeypatch):
    monkeypatch.setattr(Bundle, "_verify", refuse)
    check_weights(settled)
    with pytest.raises(AssertionError, match="it was hashed"):
        check_weights(settled, again=True)
    with Bundle.open(settled) as bundle, pytest.raises(AssertionError), bundle.verifying(["onnx/expert_1.weights"]):
        pass  # other entries were not


def test_a_file_that_was_touched_is_hashed_anew(settled, monkeypatch):
    before = settled.stat()
    with settled.open("r+b") as stream:
        first = stream.read(1)
        stream.seek(0)
        stream.write(first)
    os.utime(settled, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been written
    monkeypatch.setattr(Bundle, "_verify", refuse)
    with pytest.raises(AssertionError, match="it was hashed"):
        check_weights(settled)


def test_bytes_that_rotted_are_found_without_a_hash(settled, monkeypatch):
    with Bundle.open(settled) as bundle:
        offset = bundle.region("onnx/gate.weights").offset
    with settled.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\x7f")
    monkeypatch.setattr(Bundle, "_verify", refuse)
    monkeypatch.setattr(untouched.Untouched, "hashed_before", lambda _: True)  # a disk changes bytes, not times
    with pytest.raises(BundleError, match="do not match"):
        check_weights(settled)


def test_a_file_written_just_now_is_not_remembered(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    check_weights(copy)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_no_error(copy, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(untouched, "_SETTLED", 0.0)
    check_weights(copy)
    check_weights(copy)


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
        "picture": [picture],
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
    add_engine(copy, TARGET, {"gate": b"good"}, {}, manifest_sha256=digest)
    _archive(tmp_path / "swapped.plan", {**_contents(copy), f"engines/{TARGET}/gate.plan": b"evil"})
    with Bundle.open(tmp_path / "swapped.plan") as bundle:
        with pytest.raises(BundleError, match="do not match"):
            bundle.read(f"engines/{TARGET}/gate.plan")
        with pytest.raises(BundleError, match="do not match"):
            bundle.extract(tmp_path / "out")
    assert not (tmp_path / "out" / "engines" / TARGET / "gate.plan").exists()


# --- malice -------------------------------------------------------------------------------------------------------


def _archive(path, entries):
    with path.open("w+b") as stream:
        archive = ArchiveWriter(stream)
        for name, data in entries.items():
            archive.add(name, [data])
        archive.finish()


def _contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    "name", ["onnx/../../etc/cron", "/etc/passwd", "onnx/a/b.onnx", "engines/../x.plan", "onnx/ä.onnx"]
)
def test_names_that_lead_elsewhere_are_refused(bundle_path, tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name"):
        ArchiveWriter(io.BytesIO()).add(name, [b""])
    # The same length, so that only the name differs from what a writer could have made.
    path = tmp_path / "evil.plan"
    stand_in = "onnx/" + "a" * (len(name.encode()) - 10) + ".onnx"
    _archive(path, {**_contents(bundle_path), stand_in: b"x"})
    path.write_bytes(path.read_bytes().replace(stand_in.encode(), name.encode()))
    assert "which no bundle has" in error_of(path)


def test_a_missing_and_a_surplus_model_entry_are_refused(bundle_path, tmp_path):
    contents = _contents(bundle_path)
    path = tmp_path / "mge.plan"
    _archive(path, {name: data for name, data in contents.items() if name != "onnx/gate.weights"})
    assert "onnx/gate.weights" in error_of(path)
    _archive(path, {**contents, "onnx/other.onnx": b"x"})
    assert "onnx/other.onnx" in error_of(path)
    _archive(path, {**contents, "onnx/gate.weights": b"longer than before"})
    assert "18 bytes" in error_of(path)
    _archive(path, {name: data for name, data in contents.items() if name != "manifest.json"})
    assert "holds no manifest.json" in error_of(path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b'"schema_version": 1', b'"schema_version": 2', "the bundle has schema version 2"),
        (b'"resize"', b'"resise"', "preprocess.resize"),
        (b'"answer": "', b'"answer": "no_', "no_"),
    ],
)
def test_what_is_wrong_with_the_manifest_is_said_with_the_file(bundle_path, tmp_path, before, after, message):
    contents = _contents(bundle_path)
    assert before in contents["manifest.json"]
    path = tmp_path / "mge.plan"
    _archive(path, {**contents, "manifest.json": contents["manifest.json"].replace(before, after)})
    assert error_of(path).startswith(f"{path}: ")
    assert message in error_of(path)


def test_sizes_beyond_the_file_are_refused(bundle_path):
    whole = bytearray(bundle_path.read_bytes())
    with zipfile.ZipFile(bundle_path) as archive:
        directory = archive.start_dir
    for field in (20, 24, 42):  # both sizes, header offset
        broken = whole.copy()
        broken[directory + field : directory + field + 4] = b"\xff\xff\xff\x7f"
        with pytest.raises(ArchiveError):
            read_directory(memoryview(broken))


# --- writing ------------------------------------------------------------------------------------------------------


def test_weights_may_come_from_files(tiny, bundle_path, tmp_path):
    graphs = tiny.make_stages()
    models = {}
    for graph in graphs:
        model = graph.model()
        (tmp_path / f"{graph.spec.name}.onnx").write_bytes(model.graph)
        weights = None
        if model.weights is not None:
            weights = tmp_path / f"{graph.spec.name}.weights"
            weights.write_bytes(model.weights)
        models[graph.spec.name] = StageModel(tmp_path / f"{graph.spec.name}.onnx", weights)
    write_bundle(tmp_path / "mge.plan", tiny.make_manifest(graphs), models)
    assert (tmp_path / "mge.plan").read_bytes() == bundle_path.read_bytes()


def test_a_failed_writing_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    path = tmp_path / "mge.plan"
    path.write_bytes(b"old")
    graphs = tiny.make_stages()
    models = {g.spec.name: g.model() for g in graphs}
    manifest = tiny.make_manifest(graphs)
    with pytest.raises(BundleError, match="expert_1"):
        write_bundle(path, manifest, {**models, "expert_1": replace(models["expert_1"], weights=b"short")})
    with pytest.raises(BundleError, match="models of the stages"):
        write_bundle(path, manifest, {k: v for k, v in models.items() if k != "gate"})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ArchiveWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(path, manifest, models)
    assert [p.name for p in tmp_path.iterdir()] == ["mge.plan"]
    assert path.read_bytes() == b"old"
    with pytest.raises(OutputError, match="cannot write"):
        write_bundle(tmp_path / "none" / "mge.plan", manifest, models)


# --- use ----------------------------------------------------------------------------------------------------------


def test_it_is_read_where_the_system_has_no_read_at_a_position(bundle_path, copy, monkeypatch):
    with Bundle.open(bundle_path) as bundle:
        expected = {name: bundle.read(name) for name in bundle.sizes}
    monkeypatch.delattr(os, "preadv")  # as on Windows
    with Bundle.open(copy) as bundle:
        assert {name: bundle.read(name) for name in bundle.sizes} == expected
        place = bundle.region("onnx/gate.weights").offset
    data = bytearray(copy.read_bytes())
    data[place] ^= 1
    copy.write_bytes(data)
    with Bundle.open(copy) as bundle, pytest.raises(BundleError, match=r"gate.weights do not match their hash"):
        bundle.verify()


def test_a_closed_bundle_says_so(bundle_path):
    bundle = Bundle.open(bundle_path)
    view = bundle.view("onnx/gate.weights")
    bundle.close()
    bundle.close()
    assert len(view) == 9
    for use in (lambda: bundle.read("manifest.json"), bundle.verify, lambda: bundle.region("manifest.json")):
        with pytest.raises(BundleError, match="is closed"):
            use()


def test_names_may_hold_spaces_and_letters_of_any_language(bundle_path, tmp_path):
    folder = tmp_path / "modèle 1"
    folder.mkdir()
    shutil.copy(bundle_path, folder / "мой план.plan")
    (tmp_path / "link.plan").symlink_to(folder / "мой план.plan")
    open_and_read_all(tmp_path / "link.plan")


def test_the_bundle_opens_without_onnxruntime_and_numpy(bundle_path):
    code = (
        "import sys, json\n"
        "sys.modules['numpy'] = sys.modules['onnxruntime'] = None\n"
        "from mge_runtime.bundle import Bundle\n"
        "print(json.dumps(dict(Bundle.open(sys.argv[1]).sizes)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, bundle_path], check=True, capture_output=True, text=True).stdout
    assert "manifest.json" in json.loads(found)
