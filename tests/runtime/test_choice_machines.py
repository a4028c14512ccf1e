"""What would run on machines that are not at hand, from their descriptions in `machines/`."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.cli.build import main as build
from mge_runtime.machine import describe_machine
from mge_runtime.trt.engines import find_engines, store_engines
from mge_runtime.trt.target import Target

place = Path(__file__).with_name("recorded_machines.py")
spec = importlib.util.spec_from_file_location("mge_tests_recorded_machines", place)
machines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(machines)
chosen, details, refusal, with_version = machines.chosen, machines.details, machines.refusal, machines.with_version


@pytest.fixture
def make(tiny, tmp_path, monkeypatch):
    """Make bundles, real ones, with bytes in place of engines; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    return partial(machines.write_with_engines, tiny, tmp_path / "mge.plan")


@pytest.mark.parametrize(
    ("machine", "backend", "target"),
    [
        (machines.ORIN, "tensorrt", machines.FOR_ORIN),
        (machines.THOR, "tensorrt", machines.FOR_THOR),
        (machines.RTX3060, "tensorrt-rtx", machines.FOR_RTX),
        (machines.RTX4090, "tensorrt-rtx", machines.FOR_WINDOWS),
        (machines.T4, "tensorrt", machines.FOR_T4),
        (machines.H100, "tensorrt", machines.FOR_H100),
    ],
)
def test_one_bundle_has_the_engine_for_each(make, machine, backend, target):
    choice = chosen(make(*machines.EVERYWHERE), machine)
    assert (choice.backend, choice.device, choice.command) == (backend, "cuda:0", None)
    assert choice.engines.description.target == target.target
    assert choice.gpu == machine.gpus[0]
    assert choice.reason == f"the engines {target.target} in the bundle are for {machine.gpus[0]}"


@pytest.mark.parametrize(
    ("machine", "expected", "not_tensorrt"),
    [
        (machines.CPU, "onnxruntime on cpu", "no NVIDIA driver is installed (libcuda.so.1 cannot be loaded)"),
        (
            machines.RTX5090,
            "onnxruntime on cpu",
            'an NVIDIA driver for CUDA 13.2 is here, and cuda-core is not installed: pip install "cuda-core[cu13]"',
        ),
        (
            machines.H100_ORT,
            "onnxruntime on cuda:0",
            'tensorrt is not installed: pip install "mge[tensorrt]" (on a Jetson it comes with JetPack)',
        ),
    ],
)
def test_the_same_bundle_runs_its_onnx_elsewhere(make, machine, expected, not_tensorrt):
    choice = chosen(make(*machines.EVERYWHERE), machine)
    assert (str(choice), choice.engines, choice.command) == (expected, None, None)
    assert choice.passed_over[0].backend == "tensorrt"
    assert choice.passed_over[0].reason == not_tensorrt


@pytest.mark.parametrize(
    ("machine", "backend", "command"),
    [
        (machines.ORIN, "tensorrt", "mge-build mge.plan (on this device)"),
        (machines.THOR, "tensorrt", "mge-build mge.plan (on this device)"),
        (
            machines.RTX3060,
            "tensorrt-rtx",
            "mge-build mge.plan --target rtx:sm86 --into-bundle (on any linux x86_64 machine)",
        ),
        (
            machines.RTX4090,
            "tensorrt-rtx",
            "mge-build mge.plan --target rtx:sm89 --into-bundle (on any windows x86_64 machine)",
        ),
        (
            machines.T4_RTX,
            "tensorrt-rtx",
            "mge-build mge.plan --target rtx:sm75 --into-bundle (on any linux x86_64 machine)",
        ),
        (machines.T4, "tensorrt", "mge-build mge.plan (on this device)"),
        (machines.H100, "tensorrt", "mge-build mge.plan (on this device)"),
    ],
)
def test_without_engines_the_rest_runs_and_one_line_names_the_command(make, machine, backend, command):
    path = make()
    choice = chosen(path, machine)
    assert (choice.backend, choice.engines, choice.command) == ("onnxruntime", None, command)
    reason = f"no engines are ready for {machine.gpus[0]} (the bundle has none); build them: {command}"
    assert [c.reason for c in choice.passed_over if c.backend == backend] == [reason]
    assert reason in choice.remark
    assert "\n" not in choice.remark
    assert refusal(path, machine, backend=backend) == (
        f"nothing can run device 'auto' and backend '{backend}' ({backend} on cuda:0: {reason}); the bundle has no "
        f"engines; this device is {machine.gpus[0]}, {machine.platform}"
    )


SMALL_ORIN = replace(machines.ORIN.gpus[0], multiprocessors=14)
RTX3060_TENSORRT = with_version(machines.RTX3060, "tensorrt", "10.13.3.9")


@pytest.mark.parametrize(
    ("machine", "engine", "why"),
    [
        (
            machines.ORIN,
            replace(machines.FOR_ORIN, gpu=SMALL_ORIN),
            "was built on Orin (sm87) with 14 multiprocessors, this GPU is Orin (sm87) with 16 multiprocessors",
        ),
        (
            machines.ORIN,
            replace(machines.FOR_ORIN, version="10.7.0"),
            "was built by tensorrt 10.7.0, 10.3.0 is installed here",
        ),
        (machines.ORIN, machines.FOR_THOR, "is for sm110, this GPU is Orin (sm87)"),
        (machines.ORIN, replace(machines.FOR_ORIN, gpu=None), "does not say which GPU it was built on"),
        (machines.ORIN, replace(machines.FOR_ORIN, left_out=("expert_3",)), "has no engine for the graph expert_3"),
        (machines.RTX3060, machines.FOR_WINDOWS, "is for windows x86_64, this machine is linux x86_64"),
        (machines.RTX4090, machines.FOR_RTX, "is for linux x86_64, this machine is windows x86_64"),
        (
            machines.RTX3060,
            replace(machines.FOR_RTX, version="1.7.0.99"),
            "was built by tensorrt-rtx 1.7.0.99, 1.7.1.116 is installed here",
        ),
        (
            machines.RTX3060,
            replace(machines.FOR_RTX, target="tensorrt-rtx-1.7-sm120-sm121-linux-x86_64"),
            "is for sm120 or sm121, this GPU is NVIDIA GeForce RTX 3060 (sm86)",
        ),
        (
            RTX3060_TENSORRT,
            machines.Engine("tensorrt-10.13-sm86-linux-x86_64", "10.13.3.9", machines.RTX3070.gpus[0]),
            "was built on NVIDIA GeForce RTX 3070 (sm86) with 46 multiprocessors, "
            "this GPU is NVIDIA GeForce RTX 3060 (sm86) with 28 multiprocessors",
        ),
    ],
)
def test_an_engine_for_something_else_is_never_chosen_and_the_line_says_why(make, machine, engine, why):
    choice = chosen(make(engine), machine)
    assert (choice.backend, choice.engines) == ("onnxruntime", None)
    reason = next(c.reason for c in choice.passed_over if c.command is not None)
    assert reason.startswith(
        f"no engines are ready for {machine.gpus[0]} ({engine.target} in the bundle {why}); build them: mge-build "
    )


def test_engines_that_were_built_here_without_a_gpu_are_chosen_for_the_device(make):
    pytest.importorskip("tensorrt_rtx")
    path = make()
    built = CliRunner().invoke(build, [str(path), "--target", "rtx:sm86,sm120", "--into-bundle", "--batch", "1"])
    assert built.exit_code == 0, built.output
    machine = describe_machine(gpus=False)  # engines are for the platform they were built on
    here = replace(machines.RTX3060, system=machine.system, arch=machine.arch, libraries={**machine.libraries})
    choice = chosen(path, here)
    assert choice.backend == "tensorrt-rtx"
    assert choice.engines.description.plans["expert_1"].size > 10_000
    other = chosen(path, replace(here, gpus=machines.RTX4090.gpus))
    assert next(c.reason for c in other.passed_over if c.command is not None).startswith(
        f"no engines are ready for NVIDIA GeForce RTX 4090 (sm89) ({choice.engines.description.target} in the bundle "
        "is for sm86 or sm120, this GPU is NVIDIA GeForce RTX 4090 (sm89)); "
    )


def test_rtx_engines_serve_every_gpu_of_their_capabilities(make):
    path = make(machines.FOR_RTX)
    assert chosen(path, machines.RTX3070).engines.description.target == machines.FOR_RTX.target


def test_engines_that_are_ready_go_before_engines_to_build(make):
    both = replace(machines.RTX3060, libraries={**machines.RTX3060.libraries, "tensorrt": "10.13.3.9"})
    choice = chosen(make(machines.FOR_RTX), both)
    assert choice.backend == "tensorrt-rtx"
    assert [(c.backend, c.command is not None) for c in choice.passed_over] == [("tensorrt", True)]


@pytest.mark.parametrize(
    ("machine", "backend", "reason"),
    [
        (machines.ORIN, "tensorrt-rtx", "TensorRT-RTX does not serve sm87 (Jetson Orin); full TensorRT does"),
        (machines.THOR, "tensorrt-rtx", "TensorRT-RTX does not serve sm110 (Jetson Thor); full TensorRT does"),
        (machines.H100_ORT, "tensorrt-rtx", "TensorRT-RTX does not serve sm90 (Hopper); full TensorRT does"),
        (
            machines.RTX3060,
            "tensorrt",
            'tensorrt is not installed: pip install "mge[tensorrt]" (on a Jetson it comes with JetPack)',
        ),
        (
            replace(machines.ORIN, libraries={"cuda-core": "1.2.2"}),
            "tensorrt",
            "tensorrt is not installed: TensorRT comes with JetPack: sudo apt install nvidia-jetpack, "
            "in an environment with --system-site-packages",
        ),
    ],
)
def test_who_insists_reads_what_was_found_what_is_here_and_what_to_do(make, machine, backend, reason):
    assert refusal(make(machines.FOR_RTX), machine, backend=backend) == (
        f"nothing can run device 'auto' and backend '{backend}' ({backend} on cuda:0: {reason}); "
        f"the bundle has engines for {machines.FOR_RTX.target}; this device is {machine.gpus[0]}, {machine.platform}; "
        "leave device and backend at auto, which takes what runs here"
    )


@pytest.mark.parametrize(
    ("operators", "refused"),
    [
        ({"Conv": {"float16": 9}, "Gemm": {"float32": 3}}, True),
        ({"Conv": {"float16": 9}, "MatMul": {"float32": 1, "float16": 2}}, True),
        ({"Conv": {"float16": 9}, "Gemm": {"float16": 3}, "Softmax": {"float32": 1}}, False),
    ],
)
def test_turing_takes_no_fp32_products(make, operators, refused):
    path = make(operators=operators)
    if not refused:
        assert chosen(path, machines.T4_RTX).command is not None
        return
    choice = chosen(path, machines.T4_RTX)
    assert str(choice) == "onnxruntime on cpu"
    rtx = next(c for c in choice.passed_over if c.backend == "tensorrt-rtx")
    assert "cannot run on sm75: its " in rtx.reason
    assert "mge-export --fp16 --target rtx:sm75" in rtx.reason
    assert "mge-build" not in refusal(path, machines.T4_RTX, backend="tensorrt-rtx")
    assert chosen(path, machines.T4).command, "full TensorRT has FP32 products on Turing"
    assert chosen(path, machines.RTX3060).command, "and TensorRT-RTX has them from Ampere on"


def test_the_cache_counts_on_this_machine_alone(make, monkeypatch, tmp_path):
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    path = make(replace(machines.FOR_ORIN, version="10.7.0"))
    (tmp_path / "plan").write_bytes(machines.NO_PLAN)
    with Bundle.open(path) as bundle:
        plans = {graph.name: tmp_path / "plan" for graph in bundle.manifest.graphs}
        store_engines(
            bundle.manifest_sha256,
            Target.parse(machines.FOR_ORIN.target),
            machines.ORIN.gpus[0],
            plans,
            details(machines.FOR_ORIN),
        )
        found = find_engines(bundle, machines.ORIN, machines.ORIN.gpus[0], cache=True)
    assert [(f.in_bundle, f.problem is None) for f in found] == [(True, False), (False, True)]
    choice = chosen(path, machines.ORIN, cache=True)
    assert choice.engines.place.startswith("in the cache, ")
    assert chosen(path, machines.ORIN).engines is None
    assert "10.3.1 is installed" in chosen(path, with_version(machines.ORIN, "tensorrt", "10.3.1"), cache=True).remark


def test_engines_nobody_here_can_read_are_passed_over(make):
    path = make(machines.FOR_RTX)
    with Bundle.open(path) as bundle:
        digest = bundle.manifest_sha256
    add_engine(
        path, "tensorrt-rtx-1.7-sm86-linux-x86_64", {"expert_3": machines.NO_PLAN}, {"note": 1}, manifest_sha256=digest
    )
    add_engine(path, "tensorrt-rtx-of-tomorrow", {"expert_3": machines.NO_PLAN}, {}, manifest_sha256=digest)
    assert chosen(path, machines.RTX3060).engines.description.target == machines.FOR_RTX.target
    choice = chosen(path, with_version(machines.RTX3060, "tensorrt-rtx", "1.8.0.1"))
    assert choice.engines is None
    assert "cannot be read: " in choice.remark
    assert "which is no target" in choice.remark
