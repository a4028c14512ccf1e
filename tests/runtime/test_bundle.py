"""The bundle's format, writing and use."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import onnx
import pytest

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bundle import Bundle, GraphModel, write_bundle
from mge_runtime.bundle.archive import ArchiveWriter
from mge_runtime.errors import BundleError, OutputError

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
    with Bundle.open(bundle_path) as bundle:
        whole = bundle_path.read_bytes()
        for name in names:
            region = bundle.entry(name)
            assert region.offset % 4096 == 0
            assert whole[region.offset : region.offset + region.size] == data[name]
            assert bytes(bundle.view(name)) == data[name]
            assert bundle.read(name) == data[name]


def test_the_same_model_gives_the_same_bytes(tiny, bundle_path, tmp_path):
    tiny.write_tiny_bundle(tmp_path / "again.plan")
    assert (tmp_path / "again.plan").read_bytes() == bundle_path.read_bytes()


def test_the_manifest_comes_back_with_hash_and_size_of_every_model_entry(tiny, tmp_path):
    written = tiny.write_tiny_bundle(tmp_path / "mge.plan")
    with Bundle.open(tmp_path / "mge.plan") as bundle:
        assert bundle.manifest == written
        assert set(written.entries) == set(bundle.sizes) - {"manifest.json"}
        assert all(bundle.sizes[name] == entry.size for name, entry in written.entries.items())
    with zipfile.ZipFile(tmp_path / "mge.plan") as archive:
        assert all(f"{archive.getinfo(name).CRC:08x}" == entry.crc32 for name, entry in written.entries.items())


def test_parts_of_the_archive_that_would_need_zip64_are_refused():
    stream = io.BytesIO()
    archive = ArchiveWriter(stream)

    class Endless(bytes):
        def __len__(self):
            return 2**32

    with pytest.raises(OutputError, match="4 GiB"):
        archive.add("manifest.json", [Endless()])


def test_extracted_graphs_are_ordinary_onnx_models(bundle_path, tmp_path):
    onnxruntime = load_onnxruntime()
    with Bundle.open(bundle_path) as bundle:
        written = bundle.extract(tmp_path / "out")
        graphs = bundle.manifest.graphs
    assert tmp_path / "out" / "onnx" / "expert_3.weights" in written
    rng = np.random.default_rng(0)
    for graph in graphs:
        path = tmp_path / "out" / "onnx" / f"{graph.name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feeds = {t.name: (rng.random((2, *t.shape[1:])) * 255).astype(t.dtype) for t in graph.inputs}
        values = session.run(None, feeds)
        assert [v.shape for v in values] == [(2, *t.shape[1:]) for t in graph.outputs]


def test_extracting_where_nothing_can_be_written(bundle_path, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with Bundle.open(bundle_path) as bundle, pytest.raises(OutputError, match="cannot write"):
        bundle.extract(tmp_path / "file")


# --- writing ------------------------------------------------------------------------------------------------------


def test_weights_may_come_from_files(tiny, bundle_path, tmp_path):
    graphs = tiny.make_graphs()
    models = {}
    for graph in graphs:
        model = graph.model()
        (tmp_path / f"{graph.spec.name}.onnx").write_bytes(model.graph)
        weights = None
        if model.weights is not None:
            weights = tmp_path / f"{graph.spec.name}.weights"
            weights.write_bytes(model.weights)
        models[graph.spec.name] = GraphModel(tmp_path / f"{graph.spec.name}.onnx", weights)
    write_bundle(tmp_path / "mge.plan", tiny.make_manifest(graphs), models)
    assert (tmp_path / "mge.plan").read_bytes() == bundle_path.read_bytes()


def test_a_failed_writing_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    path = tmp_path / "mge.plan"
    path.write_bytes(b"old")
    graphs = tiny.make_graphs()
    models = {g.spec.name: g.model() for g in graphs}
    manifest = tiny.make_manifest(graphs)
    with pytest.raises(BundleError, match="expert_1"):
        write_bundle(path, manifest, {**models, "expert_1": replace(models["expert_1"], weights=b"short")})
    with pytest.raises(BundleError, match="models of the graphs"):
        write_bundle(path, manifest, {k: v for k, v in models.items() if k != "expert_3"})

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
        place = bundle.entry("onnx/expert_3.weights").offset
    data = bytearray(copy.read_bytes())
    data[place] ^= 1
    copy.write_bytes(data)
    with Bundle.open(copy) as bundle, pytest.raises(BundleError, match=r"expert_3.weights do not match their hash"):
        bundle.verify()


def test_a_closed_bundle_says_so(bundle_path):
    bundle = Bundle.open(bundle_path)
    view = bundle.view("onnx/expert_3.weights")
    bundle.close()
    bundle.close()
    assert len(view) == 500
    for use in (lambda: bundle.read("manifest.json"), bundle.verify, lambda: bundle.entry("manifest.json")):
        with pytest.raises(BundleError, match="is closed"):
            use()


def test_names_may_hold_spaces_and_letters_of_any_language(bundle_path, tmp_path):
    folder = tmp_path / "modèle 1"
    folder.mkdir()
    shutil.copy(bundle_path, folder / "мой план.plan")
    (tmp_path / "link.plan").symlink_to(folder / "мой план.plan")
    with Bundle.open(tmp_path / "link.plan") as bundle:
        bundle.verify()


def test_the_bundle_opens_without_onnxruntime_and_numpy(bundle_path):
    code = (
        "import sys, json\n"
        "sys.modules['numpy'] = sys.modules['onnxruntime'] = None\n"
        "from mge_runtime.bundle import Bundle\n"
        "print(json.dumps(dict(Bundle.open(sys.argv[1]).sizes)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, bundle_path], check=True, capture_output=True, text=True).stdout
    assert "manifest.json" in json.loads(found)
