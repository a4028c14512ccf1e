"""The chain as OpenVINO's files: tensors and values are those of ONNX Runtime; one line where it fails."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mge_export import openvino as product
from mge_export.cli import main
from mge_export.precision import Precision
from mge_runtime import Pipeline
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.errors import BackendError
from tests.helpers.commands import fails, run_without, succeeds

try:
    openvino = product.load_openvino()
except BackendError as error:
    pytest.skip(str(error), allow_module_level=True)
ROOT = Path(__file__).parents[2]
FILES = {"chain.xml", "chain.bin", "labels.txt"}
CLOSE = {Precision.FP32: 1e-5, Precision.FP16: 1e-3}  # of probabilities; FP16 is rounded in different places


def test_openvino_computes_what_onnx_runtime_computes(exported, tmp_path):
    succeeds(main, "--engine", exported.path, "--openvino", tmp_path / "made")
    assert {path.name for path in (tmp_path / "made").iterdir()} == FILES
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(tmp_path / "made/chain.xml", "CPU", settings)
    session = load_onnxruntime().InferenceSession(exported.folder / "chain.onnx", providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_outputs()]
    assert [output.any_name for output in model.outputs] == names
    expected = dict(zip(names, session.run(names, {"frame": exported.frames}), strict=True))
    found = model({"frame": exported.frames})
    same = (found["box_1"] == expected["box_1"]).all(1)
    assert (~same).sum() <= (exported.precision is Precision.FP16)  # one box lies on the threshold
    difference = np.abs(found["probabilities"] - expected["probabilities"])[same]
    assert difference.max() < CLOSE[exported.precision]
    chain = openvino.Core().read_model(tmp_path / "made/chain.xml")
    told = {key: chain.get_rt_info(["framework", key]).value for key in ("class_names", "resize", "size")}
    config = exported.model.config
    assert (json.loads(told["class_names"]), int(told["resize"])) == (list(config.classes), config.resize)
    assert (tmp_path / "made/labels.txt").read_text().splitlines() == list(config.classes)


def test_the_block_of_the_guide_predicts_what_the_pipeline_predicts(tmp_path, capsys):
    models, page = ROOT / "models", (ROOT / "docs/guide/openvino.md").read_text()
    succeeds(main, "--engine", models / "groceries.plan", "--openvino", tmp_path / "DIR")
    shutil.copy(models / "photographs/Granny-Smith.jpg", tmp_path / "image.jpg")
    with chdir(tmp_path):
        exec(page.partition("```python\n")[2].partition("```")[0], {})
    name, probability, _ = capsys.readouterr().out.split(maxsplit=2)
    with Pipeline.open(models / "groceries.plan", device="cpu") as pipeline:
        expected = pipeline.predict(tmp_path / "image.jpg")
    assert (name, float(probability)) == (expected.class_name, pytest.approx(expected.probability, abs=1e-3))


@pytest.mark.usefixtures("traced_once")
def test_an_export_writes_them_beside_the_bundle(single, tmp_path):
    succeeds(main, "--ckpt", single, "--verify-images", 1, "--openvino", tmp_path / "made")
    assert {path.name for path in (tmp_path / "made").iterdir()} == FILES


def test_what_cannot_be_written_is_told_in_one_line_and_changes_nothing(exported, tmp_path, monkeypatch):
    (tmp_path / "theirs/chain.xml").mkdir(parents=True)
    assert "it is a folder" in fails(main, "--engine", exported.path, "--openvino", tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["chain.xml"]
    (tmp_path / "file").touch()
    assert "cannot write" in fails(main, "--engine", exported.path, "--openvino", tmp_path / "file")

    def refuse(*_):
        raise RuntimeError("no operator NoSuchOperator")

    core = SimpleNamespace(read_model=refuse)
    monkeypatch.setattr(product, "load_openvino", lambda: SimpleNamespace(__version__="1", Core=lambda: core))
    line = fails(main, "--engine", exported.path, "--openvino", tmp_path / "made")
    assert "OpenVINO 1 cannot convert the chain: no operator NoSuchOperator" in line
    assert not list((tmp_path / "made").iterdir())


def test_without_openvino_the_extra_is_named_before_the_checkpoint_is_read(tmp_path):
    done = run_without(["openvino", "torch"], "mge_export.cli", "--ckpt", tmp_path / "none.pt", "--openvino", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("install mge again, with its extra openvino")


def test_importing_it_sends_and_writes_nothing(tmp_path):
    program = "from mge_export.openvino import load_openvino as load; print(load().__version__)"
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "TF_BUILD", "JENKINS_URL")}
    environment["HOME"] = str(tmp_path)  # where an identifier and a count would be, before anything is sent
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert not list(tmp_path.iterdir())
