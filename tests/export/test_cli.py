import hashlib
import os
import resource
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from mge.checkpoint import save_checkpoint
from mge_export import export, runners
from mge_export.cli import main
from mge_runtime.bundle import Bundle, GraphModel, writer
from mge_runtime.errors import OutputError
from mge_runtime.files import check_output


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A single expert: the smallest chain there is."""
    path = tmp_path / "best.pt"
    save_checkpoint(path, tiny.make_model(1, size=32))
    return path


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result, *words):
    """One line, exit 1, with these words."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    return True


def leftovers(folder):
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_becomes_a_bundle_beside_it(checkpoint):
    labels = checkpoint.parent / "classes.txt"
    labels.write_text("wren\nrobin\ntit\nfinch\ndove\n")
    result = invoke("--ckpt", checkpoint, "--fp16", "--labels", labels, "--image-size", 64, "--verify-images", 2)
    assert result.exit_code == 0, result.stderr
    bundle = checkpoint.parent / "mge.plan"
    assert leftovers(checkpoint.parent) == {"best.pt", "classes.txt", "mge.plan"}
    assert f"mge-run --engine {bundle}" in result.stdout
    assert "MB" in result.stdout
    assert "warning: verified on generated images only" in result.stderr
    assert "weights rounded only" in result.stderr
    assert "the finished bundle opens and predicts as verified" in result.stderr
    with Bundle.open(bundle) as opened:
        manifest = opened.manifest
    assert manifest.class_names == ("wren", "robin", "tit", "finch", "dove")
    assert manifest.preprocess.size == 64
    assert manifest.answer == "logits"
    assert manifest.gate is None
    assert manifest.precision["expert_1"]["type"] == "fp16"
    assert manifest.checkpoint_sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_out_of_tolerance_there_is_no_bundle_unless_allowed(checkpoint, monkeypatch):
    run = runners.TypedRun.__call__
    wrong = lambda self, tensors: {name: value * 1.5 for name, value in run(self, tensors).items()}  # noqa: E731
    monkeypatch.setattr(runners.TypedRun, "__call__", wrong)
    arguments = ["--ckpt", checkpoint, "--verify-images", 2]
    result = invoke(*arguments)
    assert refused(result, "out of tolerance", "torch expert_1: logits_1", "--allow-mismatch")
    assert leftovers(checkpoint.parent) == {"best.pt"}
    result = invoke(*arguments, "--allow-mismatch")
    assert result.exit_code == 0
    assert "out of tolerance; the bundle says so" in result.stderr
    with Bundle.open(checkpoint.parent / "mge.plan") as bundle:
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
def test_a_bundle_that_is_not_what_was_verified_is_never_published(checkpoint, monkeypatch, change, words):
    original = export.write_bundle

    def changed(path, manifest, models, **options):
        return original(path, manifest, {name: change(model) for name, model in models.items()}, **options)

    monkeypatch.setattr(export, "write_bundle", changed)
    (checkpoint.parent / "mge.plan").write_bytes(b"the old one")
    result = invoke("--ckpt", checkpoint, "--verify-images", 5, "--allow-mismatch")
    assert refused(result, words, "no bundle was written")
    assert ".part" not in result.stderr
    assert leftovers(checkpoint.parent) == {"best.pt", "mge.plan"}
    assert (checkpoint.parent / "mge.plan").read_bytes() == b"the old one"


def test_an_interrupted_export_leaves_the_old_bundle_and_nothing_else(checkpoint, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    bundle, work = checkpoint.parent / "mge.plan", tmp_path / "work"
    bundle.write_bytes(b"the old one")
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    monkeypatch.setattr(writer.ArchiveWriter, "finish", interrupt)
    result = invoke("--ckpt", checkpoint, "--verify-images", 1)
    assert refused(result, "interrupted (SIGTERM)", f"nothing was written to {bundle}", "run it again")
    assert bundle.read_bytes() == b"the old one"
    assert leftovers(checkpoint.parent) == {"best.pt", "mge.plan", "work"}
    assert leftovers(work) == set()


def test_a_missing_checkpoint(tmp_path):
    assert refused(invoke("--ckpt", tmp_path / "best.pt"), "best.pt", "does not exist", "mge-train")


def test_a_truncated_checkpoint(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    assert refused(invoke("--ckpt", checkpoint), "cut short or damaged")


def test_a_foreign_checkpoint(tmp_path):
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    assert refused(invoke("--ckpt", tmp_path / "other.pt"), "other.pt", "expected")
    assert leftovers(tmp_path) == {"other.pt"}


def test_classes_and_labels_that_disagree(checkpoint, tmp_path):
    labels = tmp_path / "classes.txt"
    labels.write_text("one\ntwo\n")
    assert refused(invoke("--ckpt", checkpoint, "--labels", labels), "5 classes", "names 2")


def test_a_place_that_cannot_be_written(checkpoint, tmp_path):
    assert refused(invoke("--ckpt", checkpoint, "-o", tmp_path), "is a folder", str(tmp_path / "mge.plan"))
    assert refused(invoke("--ckpt", checkpoint, "-o", tmp_path / "none" / "mge.plan"), "no folder", "-o")
    assert refused(invoke("--ckpt", checkpoint, "-o", checkpoint / "mge.plan"), f"{checkpoint} is a file", "-o")
    assert refused(invoke("--ckpt", checkpoint, "-o", "/dev/null"), "a device or a pipe")
    assert refused(invoke("--ckpt", checkpoint, "-o", tmp_path / ("x" * 300)), "too long", "name another place")
    assert leftovers(tmp_path) == {"best.pt"}


def test_writing_is_tried_not_asked_for(monkeypatch, tmp_path):
    """Root may write anywhere, says the system; it cannot in /proc."""
    monkeypatch.setattr(os, "access", lambda *_: True)
    with pytest.raises(OutputError, match=r"cannot write /proc/mge\.plan: .*name another place"):
        check_output(Path("/proc/mge.plan"))
    (tmp_path / "mge.plan").write_bytes(b"the old one")
    check_output(tmp_path / "mge.plan")
    assert leftovers(tmp_path) == {"mge.plan"}
    assert (tmp_path / "mge.plan").read_bytes() == b"the old one"


def test_a_full_disk_is_found_before_the_work(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            check_output(tmp_path / "mge.plan")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("option", "word"), [("-h", "Usage:"), ("--version", version("mge"))])
def test_help_and_version(option, word):
    result = invoke(option)
    assert result.exit_code == 0
    assert word in result.stdout


def test_photographs_that_are_not_there(checkpoint, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(invoke("--ckpt", checkpoint, "--verify-data", empty), "no image in the folder")
    assert refused(invoke("--ckpt", checkpoint, "--verify-data", tmp_path / "no"), "no folder", "--verify-data")


def test_a_folder_of_text_files_named_jpg(checkpoint, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "a.jpg").write_text("no picture")
    result = invoke("--ckpt", checkpoint, "--verify-data", folder)
    assert refused(result, "none of the 1 images", "could be decoded")
    assert "a.jpg" in result.stderr
    assert "mge.plan" not in leftovers(tmp_path)


def test_usage_errors_exit_with_2(checkpoint):
    assert invoke().exit_code == 2
    assert invoke("--ckpt", checkpoint, "--box-threshold", "1.5").exit_code == 2
    assert invoke("--ckpt", checkpoint, "--int8").exit_code == 2


def test_a_missing_checkpoint_is_told_without_torch(tmp_path):
    code = "import sys; from mge_export.cli import main\n" + "try: main()\nfinally: print('torch' in sys.modules)"
    for given in (["--ckpt", str(tmp_path / "no.pt")], ["--ckpt", "/dev/zero"], ["--ckpt", str(tmp_path)]):
        result = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout) == (1, "False\n")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
