"""What runs a bundle, decided from descriptions: of devices and backends by name, of machines that are not at hand."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from click.testing import CliRunner

import mge_runtime.backends
from mge_runtime.backends import BACKENDS
from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.cli.build import main as build
from mge_runtime.errors import BackendError
from mge_runtime.machine import Gpu, Machine, describe_machine
from mge_runtime.trt.engines import find_engines, store_engines
from mge_runtime.trt.target import Target
from tests.helpers import recorded_machines as machines
from tests.helpers.recorded_machines import chosen, details, refusal, with_version

CUDA = {"cuda-core": "1.2.2"}
WITH_CUDA = {"libraries": {**CUDA, "onnxruntime": "1.31.1"}, "providers": ("CUDAExecutionProvider",)}


def machine(*gpus, **values):
    return Machine("linux", "x86_64", "3.12.3", gpus, **values)


def gpu(capability="sm86"):
    return Gpu("NVIDIA Test", capability, 8 << 30, 28)


@pytest.fixture
def choose(bundle):
    """Choose for a bundle without engines."""
    return partial(mge_runtime.backends.choose, bundle=bundle)


# --- by name ------------------------------------------------------------------------------------------------------

BARE = machine(gpu_problem="no NVIDIA driver is installed", libraries={"onnxruntime": "1.31.1"})


def test_auto_takes_the_cpu_and_says_why_not_the_others(choose):
    choice = choose(machine=BARE)
    assert (choice.backend, choice.device) == ("onnxruntime", "cpu")
    assert (choice.engines, choice.command, choice.gpu) == (None, None, None)
    assert [(c.backend, c.device) for c in choice.passed_over] == [(name, "cuda:0") for name in BACKENDS]
    assert all(c.reason == "no NVIDIA driver is installed" and not c.available for c in choice.passed_over)
    assert str(choice) == "onnxruntime on cpu"
    assert choose("cpu", "onnxruntime", machine=BARE).passed_over == ()


@pytest.mark.parametrize(
    ("device", "backend", "named"),
    [
        ("cuda:0", "auto", r"tensorrt, tensorrt-rtx, onnxruntime on cuda:0: no NVIDIA.*; leave"),
        ("cuda:3", "onnxruntime", r"onnxruntime on cuda:3: no NVIDIA driver"),
        ("auto", "tensorrt", r"tensorrt on cuda:0: no NVIDIA driver.*; leave device and backend at auto"),
        ("cpu", "tensorrt-rtx", r"tensorrt-rtx runs on NVIDIA GPUs alone\); leave"),
        ("gpu", "auto", r"the device is 'gpu'; expected"),
        ("cuda", "auto", r"tensorrt, tensorrt-rtx, onnxruntime on cuda:0: no NVIDIA.*; leave"),
        ("3", "onnxruntime", r"onnxruntime on cuda:3: no NVIDIA driver"),
        ("cuda:", "auto", r"the device is 'cuda:'; expected"),
        ("٣", "auto", r"the device is '٣'; expected"),
        ("cuda:99999999999", "auto", r"the device is 'cuda:99999999999'; expected"),
        ("auto", "openvino", r"the backend is 'openvino'; expected"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_the_reason(choose, device, backend, named):
    with pytest.raises(BackendError, match=named):
        choose(device, backend, machine=BARE)


def test_a_gpu_that_is_not_there_is_named(choose):
    two = machine(gpu(), gpu(), **WITH_CUDA)
    assert choose("cuda:1", machine=two).gpu == two.gpus[1]
    with pytest.raises(BackendError, match=r"no such GPU; expected cuda:0 to cuda:1"):
        choose("cuda:2", machine=two)


@pytest.mark.parametrize(
    ("backend", "values", "reason"),
    [
        ("onnxruntime", {"libraries": {}}, 'cuda-core is not installed: pip install "cuda-core[cu12]"'),
        (
            "onnxruntime",
            {"libraries": {}, "broken": {"cuda-core": "no bindings"}},
            "cuda-core cannot be imported (no bindings); install it again: pip",
        ),
        ("onnxruntime", {"libraries": CUDA}, "onnxruntime is not installed: install mge again, with its extra gpu"),
        (
            "onnxruntime",
            {"libraries": CUDA, "broken": {"onnxruntime": "bad ELF"}},
            "onnxruntime cannot be imported (bad ELF)",
        ),
        (
            "onnxruntime",
            {"libraries": {**CUDA, "onnxruntime": "1.31.1"}},
            "onnxruntime 1.31.1 here is the build for CPUs",
        ),
        ("tensorrt", {"libraries": {**CUDA, "tensorrt": "10.2.0"}}, "10.2.0 is not served; expected 10.3 or newer, be"),
        ("tensorrt", {"libraries": {**CUDA, "tensorrt": "12.0.0"}}, "12.0.0 is not served; expected 10.3 or newer, be"),
        ("tensorrt", {"libraries": {**CUDA, "tensorrt": "unknown"}}, "unknown has a version that cannot be read"),
        ("tensorrt", {"libraries": {**CUDA, "tensorrt": "10.3.0"}}, "no engines are ready for NVIDIA Test (sm86)"),
        ("tensorrt", {"libraries": {**CUDA, "tensorrt": "11.99.1"}}, "no engines are ready for NVIDIA Test (sm86)"),
    ],
)
def test_what_a_backend_lacks_on_a_gpu_is_said(choose, backend, values, reason):
    with pytest.raises(BackendError, match=re.escape(reason)):
        choose("cuda:0", backend, machine=machine(gpu(), driver_cuda="12.6", **values))


def test_a_broken_library_is_passed_over_with_its_error(choose):
    broken = {"tensorrt": "libnvinfer.so.10: cannot open shared object file"}
    choice = choose(machine=machine(gpu("sm90"), **WITH_CUDA, broken=broken))
    assert str(choice) == "onnxruntime on cuda:0"
    assert "tensorrt cannot be imported (libnvinfer.so.10: cannot open" in choice.passed_over[0].reason


def test_a_missing_onnxruntime_is_said_with_its_command(choose):
    with pytest.raises(BackendError, match=r"onnxruntime is not installed: install mge again, with its extra cpu\)$"):
        choose(machine=machine(gpu_problem="none"))


def test_choosing_for_the_cpu_asks_no_driver_and_imports_no_library():
    code = (
        "import sys, ctypes\n"
        "from mge_runtime.backends import choose\n"
        "ctypes.CDLL = None\n"
        "print(choose('cpu', bundle=None))\n"
        "print([name for name in ('onnxruntime', 'tensorrt_rtx', 'cuda.core', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["onnxruntime on cpu", "[]"]


# --- recorded machines --------------------------------------------------------------------------------------------


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
            "tensorrt is not installed: install mge again, with its extra tensorrt (on a Jetson it comes with JetPack)",
        ),
    ],
)
def test_the_same_bundle_runs_its_onnx_elsewhere(make, machine, expected, not_tensorrt):
    path = make(*machines.EVERYWHERE)
    choice = chosen(path, machine)
    assert (str(choice), choice.engines, choice.command) == (expected, None, None)
    assert choice.passed_over[0].backend == "tensorrt"
    assert choice.passed_over[0].reason == not_tensorrt
    if machine is machines.CPU:
        assert choice.note is None
    else:
        assert choice.note.startswith(f"running with {expected}; not with tensorrt")
        assert not_tensorrt in choice.note
        assert "\n" not in choice.note
    assert chosen(path, machine, "cpu").note is None, "the CPU was asked for"


AHEAD = "mge-build mge.plan --target rtx:{} --into-bundle (on any {} x86_64 machine)"
ON_DEVICE = "mge-build mge.plan (on this device)"


@pytest.mark.parametrize(
    ("machine", "backend", "engine", "command"),
    [
        (machines.ORIN, "tensorrt", machines.FOR_ORIN, ON_DEVICE),
        (machines.THOR, "tensorrt", machines.FOR_THOR, ON_DEVICE),
        (machines.RTX3060, "tensorrt-rtx", machines.FOR_RTX, AHEAD.format("sm86", "linux")),
        (machines.RTX4090, "tensorrt-rtx", machines.FOR_WINDOWS, AHEAD.format("sm89", "windows")),
        (machines.T4_RTX, "tensorrt-rtx", None, AHEAD.format("sm75", "linux")),
        (machines.T4, "tensorrt", machines.FOR_T4, ON_DEVICE),
        (machines.H100, "tensorrt", machines.FOR_H100, ON_DEVICE),
    ],
)
def test_one_bundle_has_the_engine_for_each_and_without_one_line_names_the_command(
    make, machine, backend, engine, command
):
    here = machine.gpus[0]
    if engine is not None:
        choice = chosen(make(*machines.EVERYWHERE), machine)
        assert (choice.backend, choice.device, choice.gpu) == (backend, "cuda:0", here)
        assert (choice.command, choice.note) == (None, None)
        assert choice.reason == f"the engines {engine.target} in the bundle are for {here}"
        assert choice.engines.description.target == engine.target
    path = make()
    choice = chosen(path, machine)
    assert (choice.backend, choice.engines, choice.command) == ("onnxruntime", None, command)
    reason = f"no engines are ready for {here} (the bundle has none); build them: {command}"
    assert [c.reason for c in choice.passed_over if c.backend == backend] == [reason]
    assert reason in choice.note
    assert "\n" not in choice.note
    assert refusal(path, machine, backend=backend) == (
        f"nothing can run device 'auto' and backend '{backend}' ({backend} on cuda:0: {reason}); the bundle has no "
        f"engines; this device is {here}, {machine.platform}"
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
    assert f"({choice.engines.description.target} in the bundle is for sm86 or sm120, this GPU is" in other.note


def test_engines_that_are_ready_serve_every_gpu_of_their_capabilities_and_go_before_engines_to_build(make):
    path = make(machines.FOR_RTX)
    assert chosen(path, machines.RTX3070).engines.description.target == machines.FOR_RTX.target
    choice = chosen(path, RTX3060_TENSORRT)
    assert choice.backend == "tensorrt-rtx"
    assert [(c.backend, c.command is not None) for c in choice.passed_over] == [("tensorrt", True)]
    assert choice.note.startswith("running with tensorrt-rtx on cuda:0; not with tensorrt on cuda:0: no engines ")
    assert choice.command in choice.note


@pytest.mark.parametrize(
    ("machine", "backend", "reason"),
    [
        (machines.ORIN, "tensorrt-rtx", "TensorRT-RTX does not serve sm87 (Jetson Orin); full TensorRT does"),
        (machines.THOR, "tensorrt-rtx", "TensorRT-RTX does not serve sm110 (Jetson Thor); full TensorRT does"),
        (machines.H100_ORT, "tensorrt-rtx", "TensorRT-RTX does not serve sm90 (Hopper); full TensorRT does"),
        (
            machines.RTX3060,
            "tensorrt",
            "tensorrt is not installed: install mge again, with its extra tensorrt (on a Jetson it comes with JetPack)",
        ),
        (
            replace(machines.RTX3060, libraries=CUDA),
            "tensorrt-rtx",
            "tensorrt-rtx is not installed: install mge again, with its extra rtx",
        ),
        (
            machines.NO_TENSORRT,
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


def test_a_jetson_is_not_told_to_install_what_has_no_wheel_for_it(make):
    choice = chosen(make(), with_version(machines.NO_TENSORRT, "onnxruntime", "1.23.2"))
    (reason,) = (other.reason for other in choice.passed_over if other.backend == "onnxruntime")
    assert (choice.device, reason) == ("cpu", "onnxruntime-gpu has no wheel for the GPU of a Jetson")


@pytest.mark.parametrize(
    ("operators", "refused"),
    [
        ({"Conv": {"float16": 9}, "Gemm": {"float32": 3}}, True),
        ({"Conv": {"float16": 9}, "MatMul": {"float32": 1, "float16": 2}}, True),
        ({"Conv": {"float16": 9}, "Gemm": {"float16": 3}, "Softmax": {"float32": 1}}, False),
    ],
)
def test_turing_takes_no_fp32_products(make, operators, refused):
    path = make(type="fp16", operators=operators)
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
    target, orin = Target.parse(machines.FOR_ORIN.target), machines.ORIN.gpus[0]
    with Bundle.open(path) as bundle:
        plans = {graph.name: tmp_path / "plan" for graph in bundle.manifest.graphs}
        store_engines(bundle.manifest_sha256, target, orin, plans, details(machines.FOR_ORIN))
        found = find_engines(bundle, machines.ORIN, orin, cache=True)
    assert [(f.in_bundle, f.problem is None) for f in found] == [(True, False), (False, True)]
    choice = chosen(path, machines.ORIN, cache=True)
    assert choice.engines.place.startswith("in the cache, ")
    assert chosen(path, machines.ORIN).engines is None
    assert "10.3.1 is installed" in chosen(path, with_version(machines.ORIN, "tensorrt", "10.3.1"), cache=True).note


def test_engines_nobody_here_can_read_are_passed_over(make):
    path = make(machines.FOR_RTX)
    with Bundle.open(path) as bundle:
        digest = bundle.manifest_sha256
    for target, facts in (("tensorrt-rtx-1.7-sm86-linux-x86_64", {"note": 1}), ("tensorrt-rtx-of-tomorrow", {})):
        add_engine(path, target, {"expert_3": machines.NO_PLAN}, facts, manifest_sha256=digest)
    assert chosen(path, machines.RTX3060).engines.description.target == machines.FOR_RTX.target
    choice = chosen(path, with_version(machines.RTX3060, "tensorrt-rtx", "1.8.0.1"))
    assert choice.engines is None
    assert "cannot be read: " in choice.note
    assert "which is no target" in choice.note
