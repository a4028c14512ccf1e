"""`mge-export --target`: engines in the bundle before it is published."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mge_export.cli import main
from mge_export.targets import EnginePlan
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError
from mge_runtime.interrupt import Interrupt
from mge_runtime.machine import Machine, describe_machine
from mge_runtime.pipeline import Pipeline
from mge_runtime.trt.builder import build_engine
from mge_runtime.trt.engines import bundle_engines
from mge_runtime.trt.target import turing_refusal
from mge_runtime.trt.vendor import load_vendor
from tests.helpers.commands import fails, succeeds

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")
pytestmark = pytest.mark.usefixtures("traced_once")

WITHOUT_GPU = pytest.mark.skipif(bool(describe_machine().gpus), reason="there is a GPU here: native engines are built")


def test_engines_travel_in_a_bundle_that_still_opens_on_a_bare_cpu(single, photographs, tmp_path):
    arguments = ("--fp16", "--target", "rtx:sm75,sm86,sm120", "--batch", "1,2,4", "--extract", tmp_path / "plain")
    result = succeeds(main, "--ckpt", single, *arguments, "--verify-data", photographs, "--allow-mismatch")
    assert "the linear heads are in FP16 for every target, because of sm75" in result.stderr
    assert "expert_1: fp16, attested: network" in result.stderr
    path = tmp_path / "mge.plan"
    with Bundle.open(path) as bundle:
        bundle.verify()
        turing, others = (bundle_engines(bundle, name) for name in bundle.targets)
        assert (turing.target.capabilities, others.target.capabilities) == (("sm75",), ("sm86", "sm120"))
        assert others.details.batch.sizes == (1, 2, 4)
        assert others.details.gpu is None
        assert set(turing.details.precision["expert_1"]["layers"]["MATRIX_MULTIPLY"]) == {"float16"}
        assert bundle.manifest.precision["expert_1"]["heads"] == "fp16"
        assert turing_refusal(bundle.manifest) is None
        for name in bundle.targets:
            assert name in result.stdout
            extracted = tmp_path / f"plain/engines/{name}/expert_1.plan"
            assert extracted.read_bytes() == bundle.read(f"engines/{name}/expert_1.plan")
    assert (tmp_path / "plain/onnx/labels.txt").is_file()
    with Pipeline.open(path, device="cpu") as pipeline:
        assert pipeline.predict(next(photographs.iterdir())).class_name in "abcde"
    assert {entry.name for entry in tmp_path.iterdir()} == {"best.pt", "mge.plan", "plain"}


@WITHOUT_GPU
def test_without_a_gpu_the_default_is_onnx_alone_and_says_so(single):
    result = succeeds(main, "--ckpt", single, "--verify-images", 2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("no engines, ONNX alone: ")]
    assert "there is no GPU cuda:0 here to build for" in line
    with Bundle.open(single.parent / "mge.plan") as bundle:
        assert bundle.targets == ()


def test_where_extracting_fails_the_bundle_is_there_and_that_is_said(single, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/onnx").write_text("in the way")
    out = tmp_path / "a bundle.plan"
    arguments = ["--verify-images", 2, "--target", "onnx", "-o", out, "--extract", tmp_path / "made"]
    assert fails(main, "--ckpt", single, *arguments).endswith(f"{out} was written before")
    with Bundle.open(out) as bundle:
        bundle.verify()


REFUSED = [
    (["--target", "rtx:sm75"], "the target sm75 (Turing) was asked for in FP32; TensorRT-RTX has no FP32 matrix"),
    (["--target", "rtx:sm86", "--batch", "9,8,1"], "the batch range is 9,8,1"),
    pytest.param(["--target", "native"], "there is no GPU cuda:0 here to build for", marks=WITHOUT_GPU),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_built_is_said_before_the_work(single, arguments, message):
    assert message in fails(main, "--ckpt", single, *arguments)
    assert [path.name for path in single.parent.iterdir()] == ["best.pt"]


def test_where_an_engine_fails_the_bundle_before_stays(single, monkeypatch):
    old = single.parent / "mge.plan"
    old.write_bytes(b"the bundle before")
    vendor = load_vendor("tensorrt-rtx")

    def stopped(*arguments, progress, **options):
        del progress
        return build_engine(*arguments, **options, progress=lambda share, _: share < 0.2)

    monkeypatch.setattr("mge_runtime.trt.build.build_engine", stopped)
    line = fails(main, "--ckpt", single, "--verify-images", 2, "--target", "rtx:sm86")
    assert f"error: tensorrt-rtx {vendor.version} cannot build graph expert_1" in line
    assert old.read_bytes() == b"the bundle before"
    assert {path.name for path in single.parent.iterdir()} == {"best.pt", "mge.plan"}


MACHINES = Path(__file__).parents[1] / "runtime" / "machines"


def described(name):
    """The description of another machine, with the version of TensorRT-RTX that is installed here."""
    machine = Machine.from_json((MACHINES / f"{name}.json").read_bytes(), name)
    version = load_vendor("tensorrt-rtx").version
    return replace(machine, libraries={**machine.libraries, "tensorrt-rtx": version})


def test_native_on_turing_means_half_heads_and_fp32_is_refused_only_where_it_was_asked_for():
    turing = described("t4-tensorrt-rtx-1.7")
    asked, default = (EnginePlan.parse(targets, "1", turing) for targets in (["native"], []))
    assert (asked.native, asked.turing, default.turing) == ("tensorrt-rtx", True, True)
    asked.check(fp16=True)
    default.check(fp16=False)
    with pytest.raises(BackendError, match=r"the target sm75 \(Turing\) was asked for in FP32"):
        asked.check(fp16=False)
    assert not EnginePlan.parse([], "1", described("rtx-3060-linux-tensorrt-rtx-1.7")).turing
    # Full TensorRT has products in FP32 for Turing.
    full = Machine.from_json((MACHINES / "t4-tensorrt-10.13.json").read_bytes(), "t4")
    assert (EnginePlan.parse([], "1", full).native, EnginePlan.parse([], "1", full).turing) == ("tensorrt", False)


@pytest.mark.parametrize("asked", [True, False])
@WITHOUT_GPU
def test_engines_that_nobody_asked_for_do_not_keep_a_bundle_from_being_published(exported, tmp_path, asked):
    """On a machine that names a GPU which is not there, the build ends at the device."""
    bundle_path = shutil.copy(exported.path, tmp_path / "mge.plan")
    said = []
    plan = EnginePlan.parse(["native"] if asked else [], "1", described("rtx-3060-linux-tensorrt-rtx-1.7"))
    plan.check(fp16=True)
    if asked:
        with pytest.raises(BackendError, match="cuda:0 cannot be opened"):
            plan.build(bundle_path, Interrupt(""), said.append)
    else:
        plan.build(bundle_path, Interrupt(""), said.append)
        assert said[-1].startswith("no engines, ONNX alone: cuda:0 cannot be opened: ")
