"""Opening and building on machines that are not at hand: what is refused, and that no engine is read before it fits."""

import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest

from mge_runtime.backends import choose, open_executor
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError, BuildError, BundleError
from mge_runtime.pipeline import Pipeline
from mge_runtime.trt.build import build_targets, native_library
from mge_runtime.trt.builder import BuildOptions
from mge_runtime.trt.target import parse_request
from mge_runtime.trt.vendor import Messages, Vendor
from tests.helpers import recorded_machines as machines
from tests.helpers.chain_runs import write_typed
from tests.helpers.recorded_machines import chosen, with_version


def test_a_gpu_has_one_stream_and_needs_the_library_that_was_described(bundle):
    choice = choose(bundle=bundle, machine=machines.H100_ORT)
    if "CUDAExecutionProvider" not in load_onnxruntime().get_available_providers():
        with pytest.raises(BackendError, match=r"was built without CUDA; expected onnxruntime-gpu: pip uninstall"):
            open_executor(choice, bundle)
    with pytest.raises(BackendError, match="asked for 2 streams on cuda:0; expected 1: open one pipeline per thread"):
        open_executor(choice, bundle, streams=2)


def test_opening_asks_the_library_for_its_version_and_the_driver_before_it_reads_an_engine(make, monkeypatch, no_gpu):
    """The real TensorRT-RTX is loaded; a description of the machine that lags behind it is found out."""
    pytest.importorskip("tensorrt_rtx")

    def refused(described):
        machine = with_version(machines.RTX3060, "tensorrt-rtx", described)
        path = make(replace(machines.FOR_RTX, version=described))
        with monkeypatch.context() as patch, Bundle.open(path) as bundle:
            machines.lock_engines(patch)
            choice = choose(bundle=bundle, machine=machine)
            with pytest.raises(BackendError) as caught:
                open_executor(choice, bundle)
        return str(caught.value)

    old = refused("1.7.0.99")
    assert old.startswith(f"{machines.FOR_RTX.target} in the bundle was built by tensorrt-rtx 1.7.0.99, 1.")
    assert old.endswith("build again: mge-build mge.plan --target rtx:sm86 --into-bundle (on any linux x86_64 machine)")
    if no_gpu:
        assert refused(version("tensorrt-rtx")).startswith("cuda:0 cannot be opened: ")


def test_a_damaged_engine_is_no_engine(make):
    path = make(machines.FOR_RTX)
    with Bundle.open(path) as bundle:
        offset = bundle.entry(f"engines/{machines.FOR_RTX.target}/expert_3.plan").offset
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"X")
    with Bundle.open(path) as bundle:
        engines = choose(bundle=bundle, machine=machines.RTX3060).engines
        assert bytes(engines.plan("expert_1")) == machines.NO_PLAN
        with pytest.raises(BundleError, match=r"expert_3\.plan do not match"):
            engines.plan("expert_3")


@pytest.mark.parametrize("machine", [machines.ORIN, machines.THOR, machines.RTX3060], ids=lambda m: m.gpus[0].name)
def test_opening_builds_nothing_and_says_once_what_would(make, machine, monkeypatch, caplog):
    """It runs what is ready; nothing of a builder is even imported."""
    for module in ("trt.build", "trt.builder"):
        monkeypatch.setitem(sys.modules, f"mge_runtime.{module}", None)
    path = make()
    monkeypatch.setattr("mge_runtime.pipeline.choose", partial(choose, machine=machine))
    with Pipeline.open(path, threads=1) as pipeline:
        assert str(pipeline.choice) == "onnxruntime on cpu"
        assert pipeline.run(np.zeros((1, 32, 32, 3), np.uint8))
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("mge_runtime", pipeline.choice.note)
    assert f"no engines are ready for {machine.gpus[0]} (the bundle has none); build them: mge-build mge.plan" in (
        record.getMessage()
    )


def test_int8_is_not_left_to_a_library_that_nobody_has_seen_run_it(make, tiny, tmp_path):
    assert str(chosen(make(), machines.H100_ORT)) == "onnxruntime on cuda:0"
    choice = chosen(write_typed(tiny, tmp_path / "int8.plan", {"expert_1": "int8"}), machines.H100_ORT)
    assert str(choice) == "onnxruntime on cpu"
    assert "INT8 has not been checked with ONNX Runtime on CUDA" in choice.note


# --- building -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "library"),
    [
        (machines.ORIN, "tensorrt"),
        (machines.THOR, "tensorrt"),
        (machines.H100, "tensorrt"),
        (machines.T4, "tensorrt"),
        (machines.RTX3060, "tensorrt-rtx"),
        (machines.RTX4090, "tensorrt-rtx"),
    ],
)
def test_a_machine_builds_with_the_library_it_has(machine, library):
    assert native_library(machine, 0) == native_library(machine, 0, library) == library


@pytest.mark.parametrize(
    ("machine", "backend", "line"),
    [
        (machines.ORIN, "tensorrt-rtx", "TensorRT-RTX does not serve sm87 (Jetson Orin); full TensorRT does"),
        (machines.NO_TENSORRT, "auto", "tensorrt is not installed: TensorRT comes with JetPack: sudo apt install"),
        (with_version(machines.H100, "tensorrt", "12.0.1"), "tensorrt", "tensorrt 12.0.1 is not served"),
        (with_version(machines.ORIN, "tensorrt", "8.6.2"), "auto", "tensorrt 8.6.2 is not served"),
        (replace(machines.RTX3060, broken={"tensorrt-rtx": "libcuda"}), "tensorrt-rtx", "cannot be imported (libcuda)"),
        (machines.CPU, "auto", "there is no GPU cuda:0 here to build for (no NVIDIA driver is installed"),
        (machines.RTX5090, "auto", "cuda-core is not installed"),
    ],
)
def test_where_nothing_can_build_one_line_says_why(machine, backend, line):
    with pytest.raises(BackendError) as caught:
        native_library(machine, 0, backend)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("extra rtx" in str(caught.value)) == (backend == "tensorrt-rtx" and machine.gpus[0].name != "Orin")


@pytest.mark.parametrize(
    ("machine", "options", "expected"),
    [
        (machines.ORIN, BuildOptions(), 1_000_000 * 1024),
        (replace(machines.ORIN, board=None), BuildOptions(), 1_000_000 * 1024),
        (machines.ORIN, BuildOptions(workspace=5 << 20), 5 << 20),
        (machines.H100, BuildOptions(), None),
    ],
    ids=["jetson", "integrated", "named", "memory of its own"],
)
def test_scratch_memory_is_bounded_where_cpu_and_gpu_share_it(make, machine, options, expected, monkeypatch, tmp_path):
    """Up to the library's own builder, which stops here: full TensorRT cannot be installed."""
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable: 4000000 kB\n")
    monkeypatch.setattr("mge_runtime.trt.build._MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr("mge_runtime.trt.build.CudaDevice", lambda _: SimpleNamespace(activate=lambda: None))
    vendor = Vendor("tensorrt", machine.libraries["tensorrt"], None, None, Messages())
    monkeypatch.setattr("mge_runtime.trt.build.load_vendor", lambda _: vendor)
    given, said = [], []

    def stop(*_, options, **__):
        given.append(options.workspace)
        raise BuildError("far enough")

    monkeypatch.setattr("mge_runtime.trt.build.build_engine", stop)
    native = parse_request("native")
    with pytest.raises(BuildError, match="far enough"):
        build_targets(make(), [native], into_bundle=False, machine=machine, options=options, say=said.append)
    assert given == [expected]
    line = (
        "a layer may use 1,024 MB of scratch memory, a quarter of what is available to CPU and GPU together; "
        "--workspace names another limit"
    )
    assert (line in said) == (expected == 1_000_000 * 1024)
