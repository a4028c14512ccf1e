import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mge_export import export, runners
from mge_export.cli import main
from mge_runtime.bundle import Bundle, GraphModel, writer
from mge_runtime.errors import BundleError, OutputError
from mge_runtime.files import check_output
from tests.helpers.commands import fails, succeeds

pytestmark = pytest.mark.usefixtures("traced_once")


def leftovers(folder):
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_becomes_a_bundle_beside_it(single):
    labels = single.parent / "classes.txt"
    labels.write_text("wren\nrobin\ntit\nfinch\ndove\n")
    result = succeeds(main, "--ckpt", single, "--fp16", "--labels", labels, "--image-size", 64, "--verify-images", 2)
    bundle = single.parent / "mge.plan"
    assert leftovers(single.parent) == {"best.pt", "classes.txt", "mge.plan"}
    assert f"mge-run --engine {bundle}" in result.stdout
    assert "MB" in result.stdout
    assert "warning: verified on generated images only" in result.stderr
    assert "weights rounded only" in result.stderr
    assert "the finished bundle opens and predicts as verified" in result.stderr
    with Bundle.open(bundle) as opened:
        manifest = opened.manifest
    assert manifest.class_names == ("wren", "robin", "tit", "finch", "dove")
    assert manifest.preprocess.size == 64
    assert manifest.gate is None
    assert manifest.precision["expert_1"]["type"] == "fp16"
    assert manifest.checkpoint_sha256 == hashlib.sha256(single.read_bytes()).hexdigest()


def test_out_of_tolerance_there_is_no_bundle_unless_allowed(single, monkeypatch):
    run = runners.TypedRun.__call__
    wrong = lambda self, tensors: {name: value * 1.5 for name, value in run(self, tensors).items()}  # noqa: E731
    monkeypatch.setattr(runners.TypedRun, "__call__", wrong)
    line = fails(main, "--ckpt", single, "--verify-images", 2)
    assert "out of tolerance: torch expert_1: logits_1" in line
    assert "name photographs with --verify-data" in line
    assert "--allow-mismatch" in line
    assert leftovers(single.parent) == {"best.pt"}
    result = succeeds(main, "--ckpt", single, "--verify-images", 2, "--allow-mismatch")
    assert "out of tolerance; the bundle says so" in result.stderr
    with Bundle.open(single.parent / "mge.plan") as bundle:
        assert bundle.manifest.parity["allowed_mismatch"] is True
        assert bundle.manifest.parity["failures"]


def other_weights(model):
    data = np.frombuffer(model.weights.read_bytes(), np.float32)
    return GraphModel(model.graph, (data * 1.01).astype(np.float32).tobytes())


def other_types(model):
    """A graph that refers to nothing but its own weights and that ONNX Runtime does not open."""
    graph = onnx.load(model.graph, load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "Conv":
            node.op_type = "NoSuchOperator"
    return GraphModel(graph.SerializeToString(), model.weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [(other_weights, "computes otherwise than its graphs did: "), (other_types, "cannot be run: ONNX Runtime")],
)
def test_a_bundle_that_is_not_what_was_verified_is_never_published(single, monkeypatch, change, words):
    original = export.write_bundle

    def changed(path, manifest, models, **options):
        return original(path, manifest, {name: change(model) for name, model in models.items()}, **options)

    monkeypatch.setattr(export, "write_bundle", changed)
    (single.parent / "mge.plan").write_bytes(b"the old one")
    line = fails(main, "--ckpt", single, "--verify-images", 5, "--allow-mismatch")
    assert words in line
    assert "no bundle was written" in line
    assert ".part" not in line
    assert leftovers(single.parent) == {"best.pt", "mge.plan"}
    assert (single.parent / "mge.plan").read_bytes() == b"the old one"


def test_an_interrupted_export_leaves_the_old_bundle_and_nothing_else(single, monkeypatch, tmp_path):
    bundle, work = single.parent / "mge.plan", tmp_path / "work"
    bundle.write_bytes(b"the old one")
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    monkeypatch.setattr(writer.ArchiveWriter, "finish", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    line = fails(main, "--ckpt", single, "--verify-images", 1)
    assert f"the export was interrupted (SIGTERM): nothing was written to {bundle}; run it again" in line
    assert bundle.read_bytes() == b"the old one"
    assert leftovers(single.parent) == {"best.pt", "mge.plan", "work"}
    assert leftovers(work) == set()


def test_a_checkpoint_that_is_none(single):
    labels = single.parent / "classes.txt"
    labels.write_text("one\ntwo\n")
    line = fails(main, "--ckpt", single, "--labels", labels)
    assert "5 classes" in line
    assert "names 2" in line
    single.write_bytes(single.read_bytes()[:5000])
    assert "cut short or damaged" in fails(main, "--ckpt", single)
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, single)
    assert "best.pt holds 1 weights of another model" in fails(main, "--ckpt", single)
    assert leftovers(single.parent) == {"best.pt", "classes.txt"}


def test_a_place_that_cannot_be_written(single, tmp_path):
    for place, words in (
        (tmp_path, "it is a folder; name a file in it"),
        (tmp_path / "none" / "mge.plan", f"{tmp_path / 'none'} does not exist; make it or name another place"),
        (single / "mge.plan", f"{single} is a file"),
        (Path("/dev/null"), "a device or a pipe"),
        (tmp_path / ("x" * 300), "too long; expected a writable folder, name another place"),
    ):
        for option in ("-o", "--onnx"):
            assert words in fails(main, "--ckpt", single, option, place)
    assert leftovers(tmp_path) == {"best.pt"}


@pytest.mark.parametrize("option", ["--extract", "--openvino", "--triton", "--hf"])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(single, option):
    words = single.parent / "words.md"
    words.write_text("---\nlicense: mit\n---\n## Data\n## Limits\n")
    start = ["--ckpt", single, "--card", words, option]
    assert f"cannot write {words}: Not a directory" in fails(main, *start, words)
    if option == "--triton":
        assert "is there and not empty" in fails(main, *start, single.parent)
    assert leftovers(single.parent) == {"best.pt", "words.md"}


def test_what_others_read_is_written_with_the_export_or_later(single, tmp_path):
    folder = tmp_path / "onnx"
    folder.mkdir()
    succeeds(main, "--ckpt", single, "--verify-images", 1, "--onnx", folder / "1.onnx", "--extract", tmp_path / "1")
    bundle = single.parent / "mge.plan"
    succeeds(main, "--engine", bundle, "--onnx", folder / "2.onnx", "--extract", tmp_path / "2")
    assert (folder / "1.onnx").read_bytes() == (folder / "2.onnx").read_bytes()
    assert (tmp_path / "1/manifest.json").read_bytes() == (tmp_path / "2/manifest.json").read_bytes()


def damaged(*_):
    raise BundleError("an entry was damaged")


@pytest.mark.parametrize("extract", [damaged, lambda *_: signal.raise_signal(signal.SIGTERM)])
def test_what_comes_after_the_bundle_says_that_it_is_there(single, monkeypatch, tmp_path, extract):
    monkeypatch.setattr(Bundle, "extract", extract)
    bundle, beside = single.parent / "mge.plan", ["--extract", tmp_path / "x"]
    assert f"{bundle} was written before" in fails(main, "--ckpt", single, "--verify-images", 1, *beside)
    line = fails(main, "--engine", bundle, *beside)
    assert line.endswith(("the export was interrupted (SIGTERM): " + f"{bundle} is whole; run it again", "was damaged"))


def test_writing_is_tried_not_asked_for(monkeypatch, tmp_path):
    """Root may write anywhere, says the system; it cannot in /proc."""
    monkeypatch.setattr(os, "access", lambda *_: True)
    with pytest.raises(OutputError, match=r"cannot write /proc/mge\.plan: .*name another place"):
        check_output(Path("/proc/mge.plan"))
    (tmp_path / "mge.plan").write_bytes(b"the old one")
    check_output(tmp_path / "mge.plan")
    assert leftovers(tmp_path) == {"mge.plan"}
    assert (tmp_path / "mge.plan").read_bytes() == b"the old one"


def test_photographs_that_are_not_there(single, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    start = ["--ckpt", single, "--verify-data"]
    assert "no image in the folder" in fails(main, *start, folder)
    assert "no folder" in fails(main, *start, tmp_path / "no")
    (folder / "a.jpg").write_text("no image")
    assert "none of the 1 images (of 1 images in photographs) could be decoded" in fails(main, *start, folder)
    assert leftovers(tmp_path) == {"best.pt", "photographs"}


def test_a_missing_checkpoint_is_told_without_torch(tmp_path):
    code = "import sys; from mge_export.cli import main\n" + "try: main()\nfinally: print('torch' in sys.modules)"
    for given in (["--ckpt", str(tmp_path / "no.pt")], ["--ckpt", "/dev/zero"], ["--ckpt", str(tmp_path)]):
        result = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout) == (1, "False\n")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
