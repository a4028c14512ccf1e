import os
import subprocess

import onnx
import pytest

from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.extract import extract_bundle, trtexec_script
from mge_runtime.machine import Gpu
from mge_runtime.trt.build import build_targets
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.target import BatchRange, TargetRequest


@pytest.fixture
def with_engines(tiny, tmp_path):
    """A bundle with engines for two capabilities."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")
    from mge_runtime.trt.builder import BuildOptions

    path = tmp_path / "mge.plan"
    tiny.write_tiny_bundle(path)
    options = BuildOptions(BatchRange(1, 2, 5))
    build_targets(path, [TargetRequest.parse("rtx:sm86,sm89")], into_bundle=True, options=options)
    return path


def test_plain_files_come_out(with_engines, tmp_path):
    with Bundle.open(with_engines) as bundle:
        written = extract_bundle(bundle, tmp_path / "out")
        (target,) = bundle.targets
        assert (
            bundle.read(f"engines/{target}/expert_3.plan")
            == (tmp_path / f"out/engines/{target}/expert_3.plan").read_bytes()
        )
    assert all(path.is_file() for path in written)
    model = onnx.load(tmp_path / "out/onnx/expert_1.onnx")
    onnx.checker.check_model(model)


@pytest.fixture
def called(tmp_path):
    """Run a script with a trtexec that notes how it was called; the script itself is what is checked."""

    def called(script):
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        (tools / "trtexec").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
        (tools / "trtexec").chmod(0o755)
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        (tmp_path / "calls").unlink(missing_ok=True)
        subprocess.run([script], check=True, env=environment, cwd="/")
        calls = [call.split() for call in (tmp_path / "calls").read_text().splitlines()]
        for call in calls:
            (graph,) = (part.removeprefix("--onnx=") for part in call if part.startswith("--onnx="))
            assert (script.parent / graph).is_file()
        return {call[0].rsplit("/")[-1].removesuffix(".onnx"): call for call in calls}

    return called


def test_the_script_calls_trtexec_for_every_graph_with_its_shapes(bundle_path, tmp_path, called):
    with Bundle.open(bundle_path) as bundle:
        extract_bundle(bundle, tmp_path / "out")
        graphs = {graph.name for graph in bundle.manifest.graphs}
    calls = called(tmp_path / "out" / "trtexec.sh")
    assert set(calls) == graphs
    assert {"--minShapes=image_2:1x3x32x32,mean_logits_1:1x5", "--stronglyTyped", "--noTF32"} <= set(calls["expert_2"])
    assert {
        "--optShapes=image_2:1x3x32x32,mean_logits_1:1x5",
        "--maxShapes=image_2:8x3x32x32,mean_logits_1:8x5",
    } <= set(calls["expert_2"])
    assert "--saveEngine=built/expert_2.plan" in calls["expert_2"]
    assert not any("--fp16" in call or "--memPoolSize" in " ".join(call) for call in calls.values())


def test_engines_of_tensorrt_come_with_the_options_they_were_built_with(copy, tmp_path, called):
    target = "tensorrt-10.3-sm87-linux-aarch64"
    gpu = Gpu("Orin", "sm87", 1 << 33, 8, integrated=True)
    facts = {"optimization_level": 4, "workspace": 1 << 28, "seconds": {}, "scratch": {}}
    details = EngineDetails("10.3.0", gpu, BatchRange(1, 2, 5), {}, facts, "mge 0.1.0")
    with Bundle.open(copy) as bundle:
        plans = {graph.name: b"engine" for graph in bundle.manifest.graphs}
        digest = bundle.manifest_sha256
    add_engine(copy, target, plans, details.to_dict(), manifest_sha256=digest)
    with Bundle.open(copy) as bundle:
        extract_bundle(bundle, tmp_path / "out")
    call = called(tmp_path / "out/engines" / target / "trtexec.sh")["expert_3"]
    assert {"--builderOptimizationLevel=4", "--memPoolSize=workspace:268435456B"} <= set(call)
    assert "--maxShapes=image_3:5x3x32x32,frame:5x32x32x3,logits_1:5x5,logits_2:5x5" in call


def test_without_engines_the_script_takes_the_default_batches(bundle_path):
    with Bundle.open(bundle_path) as bundle:
        script = trtexec_script(bundle.manifest, BatchRange())
    assert "--maxShapes=frame:8x32x32x3" in script
