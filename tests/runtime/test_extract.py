import os
import subprocess

import numpy as np
import onnx

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bundle import Bundle
from mge_runtime.extract import extract_bundle
from tests.helpers.bundles import TARGET, add_engines


def test_what_comes_out_are_plain_files_and_ordinary_onnx_models(copy, tmp_path):
    add_engines(copy)
    with Bundle.open(copy) as bundle:
        written = extract_bundle(bundle, tmp_path / "out")
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


def test_the_script_calls_trtexec_for_every_graph_with_its_shapes(bundle, tmp_path):
    extract_bundle(bundle, tmp_path / "out")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "trtexec").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tools / "trtexec").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run([tmp_path / "out/trtexec.sh"], check=True, env=environment, cwd="/")
    calls = [set(call.split()) for call in (tmp_path / "calls").read_text().splitlines()]
    for graph, call in zip(bundle.manifest.graphs, calls, strict=True):
        assert {f"--onnx=onnx/{graph.name}.onnx", f"--saveEngine=built/{graph.name}.plan", "--stronglyTyped"} <= call
        assert (tmp_path / f"out/onnx/{graph.name}.onnx").is_file()
    assert "--maxShapes=frame:8x32x32x3" in calls[0]
    assert {
        "--noTF32",
        "--minShapes=image_2:1x3x32x32,mean_logits_1:1x5",
        "--optShapes=image_2:1x3x32x32,mean_logits_1:1x5",
        "--maxShapes=image_2:8x3x32x32,mean_logits_1:8x5",
    } <= calls[1]
