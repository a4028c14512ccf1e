"""The graph for DeepStream's nvinfer predicts what chain.onnx does, from planar pixels."""

import configparser
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bundle import Bundle
from tests.helpers.commands import fails, succeeds

onnxruntime = load_onnxruntime()
ROOT = Path(__file__).parents[2]
PREPARE = runpy.run_path(str(ROOT / "examples/deepstream/prepare.py"))["main"]


def probabilities(path, feeds):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], feeds)[0]


def test_the_planar_graph_predicts_what_the_chain_does(exported, tmp_path):
    succeeds(PREPARE, exported.folder / "chain.onnx", tmp_path)
    found = probabilities(
        tmp_path / "chain.onnx", {"image_1": exported.frames.transpose(0, 3, 1, 2).astype(np.float32)}
    )
    expected = probabilities(exported.folder / "chain.onnx", {"frame": exported.frames})
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert expected.std(0).max() > 1e-3  # the images are told apart
    graph = onnx.load(tmp_path / "chain.onnx").graph
    assert [tensor.name for tensor in (*graph.input, *graph.output)] == ["image_1", "probabilities"]
    with Bundle.open(exported.path) as bundle:
        assert (tmp_path / "labels.txt").read_text().strip().split(";") == list(bundle.manifest.class_names)
        size = bundle.manifest.preprocess.size
    text = (tmp_path / "config_infer.txt").read_text()
    assert text.replace(f"3;{size};{size}", "3;224;224") in (ROOT / "docs/guide/deepstream.md").read_text()
    config = configparser.ConfigParser()
    config.read_string(text)
    assert all((tmp_path / config["property"][key]).exists() for key in ("onnx-file", "labelfile-path"))


def test_bad_input_is_refused_in_one_line(exported, tmp_path):
    chain = shutil.copy(exported.folder / "chain.onnx", tmp_path)
    before = Path(chain).read_bytes()
    (tmp_path / "text.onnx").write_text("no graph")
    foreign = helper.make_model(helper.make_graph([], "g", [], []))
    onnx.save_model(foreign, tmp_path / "foreign.onnx")
    for name, folder, reason in (
        ("chain.onnx", tmp_path, "it is the chain that is read; name another folder"),
        ("text.onnx", tmp_path / "out", "expected one that mge-export --onnx wrote"),
        ("foreign.onnx", tmp_path / "out", "expected one that mge-export --onnx wrote"),
    ):
        assert reason in fails(PREPARE, tmp_path / name, folder)
    assert Path(chain).read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_labels_are_one_for_each_class(exported, tmp_path):
    model = onnx.load(exported.folder / "chain.onnx")
    names = next(entry for entry in model.metadata_props if entry.key == "class_names")
    classes = json.loads(names.value)
    names.value = json.dumps(["a;b\nc", *classes[1:]])
    onnx.save_model(model, tmp_path / "chain.onnx")
    succeeds(PREPARE, tmp_path / "chain.onnx", tmp_path / "out")
    assert (tmp_path / "out/labels.txt").read_text() == ";".join(["a b c", *classes[1:]]) + "\n"


def test_tensorrt_can_parse_it(exported, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    succeeds(PREPARE, exported.folder / "chain.onnx", tmp_path)
    log = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse((tmp_path / "chain.onnx").read_bytes()), parser.get_error(0)
    assert (list(network.get_input(0).shape), network.num_outputs) == ([-1, 3, 64, 64], 1)
