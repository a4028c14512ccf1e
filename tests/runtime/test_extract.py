import os
import subprocess

import onnx

from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.extract import extract_bundle


def test_plain_files_come_out(copy, tmp_path):
    target = "tensorrt-10.3-sm87-linux-aarch64"
    with Bundle.open(copy) as bundle:
        plans, digest = {graph.name: b"engine" for graph in bundle.manifest.graphs}, bundle.manifest_sha256
    add_engine(copy, target, plans, {}, manifest_sha256=digest)
    with Bundle.open(copy) as bundle:
        written = extract_bundle(bundle, tmp_path / "out")
    assert all(path.is_file() for path in written)
    assert (tmp_path / f"out/engines/{target}/expert_3.plan").read_bytes() == b"engine"
    onnx.checker.check_model(onnx.load(tmp_path / "out/onnx/expert_1.onnx"))
    assert (tmp_path / "out/onnx/labels.txt").read_text().splitlines() == [f"bird {index}" for index in range(5)]


def test_the_script_calls_trtexec_for_every_graph_with_its_shapes(bundle, tmp_path):
    """Run with a trtexec that notes how it was called; the script itself is what is checked."""
    extract_bundle(bundle, tmp_path / "out")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "trtexec").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tools / "trtexec").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run([tmp_path / "out/trtexec.sh"], check=True, env=environment, cwd="/")
    calls = [set(call.split()) for call in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == len(bundle.manifest.graphs)
    for graph, call in zip(bundle.manifest.graphs, calls, strict=True):
        assert {f"--onnx=onnx/{graph.name}.onnx", f"--saveEngine=built/{graph.name}.plan", "--stronglyTyped"} <= call
        assert (tmp_path / f"out/onnx/{graph.name}.onnx").is_file()
    assert {
        "--noTF32",
        "--minShapes=image_2:1x3x32x32,mean_logits_1:1x5",
        "--optShapes=image_2:1x3x32x32,mean_logits_1:1x5",
        "--maxShapes=image_2:8x3x32x32,mean_logits_1:8x5",
    } <= calls[1]
    assert "--maxShapes=frame:8x32x32x3" in calls[0]
