"""The bundle's format, writing and use."""

import io
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
from tests.helpers.bundles import TARGET, add_engines, change_byte, read_entries


def test_any_unzip_reads_it_and_data_lies_on_pages(bundle_path):
    whole, entries = bundle_path.read_bytes(), read_entries(bundle_path)
    with zipfile.ZipFile(bundle_path) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        checksums = {info.filename: f"{info.CRC:08x}" for info in archive.infolist()}
    assert {"manifest.json", "onnx/expert_1.onnx", "onnx/expert_1.weights"} < set(entries)
    with Bundle.open(bundle_path) as bundle:
        for name, data in entries.items():
            region = bundle.entry(name)
            assert region.offset % 4096 == 0
            assert whole[region.offset : region.offset + region.size] == data
            assert bytes(bundle.view(name)) == bundle.read(name) == data
        listed = bundle.manifest.entries
    assert {name: (entry.size, entry.crc32) for name, entry in listed.items()} == {
        name: (len(data), checksums[name]) for name, data in entries.items() if name != "manifest.json"
    }


def test_the_same_model_gives_the_same_bytes_from_memory_and_from_files(tiny, bundle_path, tmp_path):
    written = tiny.write_tiny_bundle(tmp_path / "again.plan")
    with Bundle.open(tmp_path / "again.plan") as bundle:
        assert bundle.manifest == written
    models = {}
    for graph in tiny.make_graphs():
        model, path = graph.model(), tmp_path / graph.spec.name
        path.with_suffix(".onnx").write_bytes(model.graph)
        path.with_suffix(".weights").write_bytes(model.weights)
        models[path.name] = GraphModel(path.with_suffix(".onnx"), path.with_suffix(".weights"))
    write_bundle(tmp_path / "files.plan", tiny.make_manifest(tiny.make_graphs()), models)
    for path in ("again.plan", "files.plan"):
        assert (tmp_path / path).read_bytes() == bundle_path.read_bytes()


def test_archives_that_would_need_zip64_are_refused():
    class Endless(bytes):
        def __len__(self):
            return 2**32

    with pytest.raises(OutputError, match="4 GiB"):
        ArchiveWriter(io.BytesIO()).add("manifest.json", [Endless()])


def test_a_failed_writing_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    path, graphs = tmp_path / "mge.plan", tiny.make_graphs()
    path.write_bytes(b"old")
    models, manifest = {g.spec.name: g.model() for g in graphs}, tiny.make_manifest(graphs)
    with pytest.raises(BundleError, match="expert_1"):
        write_bundle(path, manifest, {**models, "expert_1": replace(models["expert_1"], weights=b"short")})
    with pytest.raises(BundleError, match="models of the graphs"):
        write_bundle(path, manifest, {k: v for k, v in models.items() if k != "expert_3"})
    with pytest.raises(OutputError, match="cannot write"):
        write_bundle(tmp_path / "none" / "mge.plan", manifest, models)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ArchiveWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(path, manifest, models)
    assert [p.name for p in tmp_path.iterdir()] == ["mge.plan"]
    assert path.read_bytes() == b"old"


def test_it_is_read_where_the_system_has_no_read_at_a_position(copy, monkeypatch):
    monkeypatch.delattr(os, "preadv")  # as on Windows
    entries = read_entries(copy)
    with Bundle.open(copy) as bundle:
        assert {name: bundle.read(name) for name in bundle.sizes} == entries
    change_byte(copy, "onnx/expert_3.weights")
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
    path = tmp_path / "modèle 1" / "мой план.plan"
    path.parent.mkdir()
    shutil.copy(bundle_path, path)
    (tmp_path / "link.plan").symlink_to(path)
    with Bundle.open(tmp_path / "link.plan") as bundle:
        bundle.verify()


def test_it_opens_without_onnxruntime_and_numpy(bundle_path):
    code = (
        "import sys\n"
        "sys.modules['numpy'] = sys.modules['onnxruntime'] = None\n"
        "from mge_runtime.bundle import Bundle\n"
        "Bundle.open(sys.argv[1]).verify()\n"
    )
    subprocess.run([sys.executable, "-c", code, bundle_path], check=True)


def test_what_comes_out_are_plain_files_and_ordinary_onnx_models(copy, tmp_path):
    add_engines(copy)
    with Bundle.open(copy) as bundle:
        written = bundle.extract(tmp_path / "out")
        graphs = bundle.manifest.graphs
    assert all(path.is_file() for path in written)
    assert (tmp_path / f"out/engines/{TARGET}/expert_3.plan").read_bytes() == b"engine"
    assert (tmp_path / "out/onnx/labels.txt").read_text().splitlines() == [f"bird {index}" for index in range(5)]
    onnxruntime, rng = load_onnxruntime(), np.random.default_rng(0)
    for graph in graphs:
        path = tmp_path / "out" / "onnx" / f"{graph.name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feeds = {t.name: (rng.random((2, *t.shape[1:])) * 255).astype(t.dtype) for t in graph.inputs}
        assert [v.shape for v in session.run(None, feeds)] == [(2, *t.shape[1:]) for t in graph.outputs]
