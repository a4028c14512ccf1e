"""A Triton repository: Triton's own message reads the configuration, and it names what the models have."""

import json
import shutil
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from examples.triton.client import main as client
from mge_export.cli import main
from mge_runtime import Bundle, Pipeline
from mge_runtime.backends.onnxruntime import load_onnxruntime
from tests.helpers.bundles import add_engines
from tests.helpers.commands import fails, succeeds
from tests.runtime.tiny_chain import write_tiny_bundle

config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
PHOTOGRAPHS = sorted((MODELS / "photographs").glob("*.jpg"))
DETAILS = {
    "version": "10.3.0", "gpu": None, "batch": [1, 1, 4], "precision": {}, "options": {}, "built_by": "mge 0.2.0"
}  # fmt: skip


def read_config(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), config_pb2.ModelConfig())


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "models"
    done = succeeds(main, "--engine", MODELS / "groceries.plan", "--triton", folder)
    assert f"wrote 6 files to {folder}" in done.output
    return folder


def test_the_configuration_names_what_the_graph_has_and_batches_run(repository):
    config = read_config(repository / "groceries")
    session = load_onnxruntime().InferenceSession(
        repository / "groceries/1/model.onnx", providers=["CPUExecutionProvider"]
    )
    for said, graph in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(tensor.name, list(tensor.dims)) for tensor in said] == [(node.name, node.shape[1:]) for node in graph]
        for tensor, node in zip(said, graph, strict=True):
            assert isinstance(node.shape[0], str)  # the batch
            kinds = {"TYPE_UINT8": "tensor(uint8)", "TYPE_FP32": "tensor(float)"}
            assert kinds[config_pb2.DataType.Name(tensor.data_type)] == node.type
    assert (config.name, config.backend) == ("groceries", "onnxruntime")
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    for warm_up in config.model_warmup:
        frame = warm_up.inputs["frame"]
        frames = np.zeros((warm_up.batch_size, *frame.dims), np.uint8)
        assert len(session.run(["probabilities"], {"frame": frames})[0]) == warm_up.batch_size
    assert {warm_up.batch_size for warm_up in config.model_warmup} == {1, config.max_batch_size}
    (labeled,) = (output for output in config.output if output.label_filename)
    assert labeled.name == "probabilities"
    with Bundle.open(MODELS / "groceries.plan") as bundle:
        names = bundle.manifest.class_names
    assert tuple((repository / "groceries" / labeled.label_filename).read_text().splitlines()) == names


def test_engines_of_tensorrt_are_models_and_an_ensemble_chains_them(tmp_path):
    path = shutil.copy(MODELS / "groceries.plan", tmp_path / "my birds.plan")
    for target in ("tensorrt-10.3-sm87-linux-aarch64", "tensorrt-rtx-1.7-sm86-linux-x86_64"):
        add_engines(path, target, details=DETAILS)
    succeeds(main, "--engine", path, "--triton", tmp_path / "made")
    folders = {folder.name for folder in (tmp_path / "made").iterdir()}
    with Bundle.open(path) as bundle:
        manifest = bundle.manifest
    name, target = "my_birds", "tensorrt-10.3-sm87-linux-aarch64"
    experts = {f"{name}_{graph.name}_{target}": graph for graph in manifest.graphs}
    assert folders == {name, f"{name}_{target}", *experts}
    assert {file.name for file in (tmp_path / "made" / name).iterdir()} == {"1", "config.pbtxt", "labels.txt"}
    ensemble = read_config(tmp_path / "made" / f"{name}_{target}")
    assert (tmp_path / "made" / ensemble.name / "1").is_dir()
    assert (ensemble.platform, ensemble.max_batch_size, ensemble.output[0].name) == ("ensemble", 4, manifest.logits)
    there = {tensor.name for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        graph, model = experts[step.model_name], read_config(tmp_path / "made" / step.model_name)
        assert (tmp_path / "made" / step.model_name / "1/model.plan").read_bytes() == b"engine"
        assert (model.name, model.backend, model.max_batch_size) == (step.model_name, "tensorrt", 4)
        for said, specs in ((model.input, graph.inputs), (model.output, graph.outputs)):
            assert [(one.name, list(one.dims)) for one in said] == [(spec.name, list(spec.shape[1:])) for spec in specs]
        assert step.input_map.keys() == {spec.name for spec in graph.inputs}
        assert set(step.input_map.values()) <= there
        there |= set(step.output_map.values())
    assert manifest.logits in there


class Handler(BaseHTTPRequestHandler):
    """The part of KServe's protocol that the clients speak, over ONNX Runtime; not Triton."""

    def do_POST(self):
        assert self.path == "/v2/models/groceries/infer"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        length = int(self.headers["Inference-Header-Content-Length"])
        header = json.loads(body[:length])
        (sent,), (asked,) = header["inputs"], header["outputs"]
        assert sent["parameters"]["binary_data_size"] == len(body) - length
        frames = np.frombuffer(body[length:], np.uint8).reshape(sent["shape"])
        (found,) = self.server.session.run([asked["name"]], {sent["name"]: frames})
        count = asked["parameters"]["classification"]
        best = np.argsort(-found, axis=1)[:, :count]
        lines = [f"{found[i, k]}:{k}:{self.server.labels[k]}" for i, row in enumerate(best) for k in row]
        output = {"name": asked["name"], "datatype": "BYTES", "shape": [len(frames), count]}
        data = b""
        if asked["parameters"].get("binary_data"):
            data = b"".join(struct.pack("<I", len(line)) + line.encode() for line in lines)
            output["parameters"] = {"binary_data_size": len(data)}
        else:
            output["data"] = lines
        told = json.dumps({"model_name": "groceries", "model_version": "1", "outputs": [output]}).encode()
        self.send_response(200)
        self.send_header("Inference-Header-Content-Length", str(len(told)))
        self.send_header("Content-Length", str(len(told) + len(data)))
        self.end_headers()
        self.wfile.write(told + data)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def server(repository):
    """The address of a stand-in for Triton."""
    model = repository / "groceries"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.session = load_onnxruntime().InferenceSession(
            model / "1/model.onnx", providers=["CPUExecutionProvider"]
        )
        running.labels = (model / "labels.txt").read_text().splitlines()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_the_client_gets_the_classes_that_the_runtime_predicts(server, tmp_path):
    start = ["groceries", *PHOTOGRAPHS, "--engine", MODELS / "groceries.plan", "--top-k", 1, "--url"]
    lines = succeeds(client, *start, f"http://{server}").output.splitlines()
    with Pipeline.open(MODELS / "groceries.plan", device="cpu", threads=1) as pipeline:
        expected = [pipeline.predict(path) for path in PHOTOGRAPHS]
    for line, prediction in zip(lines, expected, strict=True):
        assert line.split()[2] == prediction.class_name
        assert float(line.split()[0]) == pytest.approx(100 * prediction.probability, abs=0.1)
    assert "did not predict" in fails(client, *start, "127.0.0.1:9")
    assert "No such file" in fails(client, *start, server, "--frame", tmp_path / "none/frame.bin")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_lines_of_the_guide_for_curl_get_the_class(server, tmp_path):
    page = (ROOT / "docs/guide/triton.md").read_text()
    (block,) = (part for part in page.split("```sh\n") if "curl" in part.partition("```")[0] and "header=" in part)
    lines = block.partition("```")[0].replace("localhost:8000", server).replace("python ", f"{sys.executable} ")
    for name in ("examples", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(["bash", "-euc", lines], cwd=tmp_path, capture_output=True, check=True)
    (output,) = json.loads(done.stdout)["outputs"]
    assert output["data"][0].endswith(":Granny-Smith")
    assert output["shape"] == [1, 3]


def test_what_is_there_stays_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "theirs/groceries").mkdir(parents=True)
    (tmp_path / "file").touch()
    start = ["--engine", MODELS / "groceries.plan", "--triton"]
    assert "is there and not empty" in fails(main, *start, tmp_path / "theirs")
    assert "cannot write" in fails(main, *start, tmp_path / "file")
    assert not [*(tmp_path / "theirs/groceries").iterdir()]
    write_tiny_bundle(tmp_path / "mge.plan")
    (tmp_path / "empty").mkdir()
    for option in ("--triton", "--openvino"):
        line = fails(main, "--engine", tmp_path / "mge.plan", option, tmp_path / "empty")
        assert "holds no entry onnx/chain.onnx" in line
        assert not [*(tmp_path / "empty").iterdir()]
    (tmp_path / "mge.plan").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mge_export.triton._ensemble_config", full)
        path = shutil.copy(MODELS / "groceries.plan", tmp_path / "mge.plan")
        add_engines(path, "tensorrt-10.3-sm87-linux-aarch64", details=DETAILS)
        assert "No space left" in fails(main, "--engine", path, "--triton", tmp_path / "empty")
        add_engines(path, "tensorrt-10.3-sm87-linux-aarch64", details=DETAILS | {"batch": [2, 2, 4]})
        assert "take 2 images at least" in fails(main, "--engine", path, "--triton", tmp_path / "empty")
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "file", "mge.plan", "empty"}
    assert not [*(tmp_path / "empty").iterdir()]
    succeeds(main, *start, tmp_path / "empty")
