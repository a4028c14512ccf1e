import os
import subprocess

import onnx
import pytest

from mge_runtime.bundle import Bundle
from mge_runtime.extract import extract_bundle, trtexec_script
from mge_runtime.trt.batch import BatchRange
from mge_runtime.trt.keep import build_targets
from mge_runtime.trt.request import TargetRequest


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
        assert bundle.read(f"engines/{target}/gate.plan") == (tmp_path / f"out/engines/{target}/gate.plan").read_bytes()
    assert all(path.is_file() for path in written)
    model = onnx.load(tmp_path / "out/onnx/expert_1.onnx")
    onnx.checker.check_model(model)


def test_the_script_calls_trtexec_for_every_stage_with_the_shapes_of_the_engines(with_engines, tmp_path):
    with Bundle.open(with_engines) as bundle:
        extract_bundle(bundle, tmp_path / "out")
    # A trtexec that notes how it was called: the script itself is what runs here.
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "trtexec").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tools / "trtexec").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run([tmp_path / "out" / "trtexec.sh"], check=True, env=environment, cwd="/")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 6
    second = next(call for call in calls if "onnx/expert_2.onnx" in call).split()
    assert "--minShapes=image_2:1x3x32x32,answer_1:1x5" in second
    assert "--optShapes=image_2:2x3x32x32,answer_1:2x5" in second
    assert "--maxShapes=image_2:5x3x32x32,answer_1:5x5" in second
    assert {"--stronglyTyped", "--noTF32", "--saveEngine=built/expert_2.plan"} <= set(second)
    assert not any("--fp16" in call for call in calls)
    for call in calls:
        (graph,) = (part.removeprefix("--onnx=") for part in call.split() if part.startswith("--onnx="))
        assert (tmp_path / "out" / graph).is_file()


def test_without_engines_the_script_takes_the_default_batches(bundle_path):
    with Bundle.open(bundle_path) as bundle:
        script = trtexec_script(bundle.manifest, BatchRange())
    assert "--maxShapes=frame:8x32x32x3" in script
