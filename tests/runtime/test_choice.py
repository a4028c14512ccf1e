"""Devices and backends by name, on this machine."""

import re
import subprocess
import sys
from functools import partial

import pytest

import mge_runtime.backends
from mge_runtime.backends import BACKENDS, Choice, open_backend
from mge_runtime.errors import BackendError
from mge_runtime.machine import Gpu, Machine

CUDA = {"cuda-core": "1.2.2"}


def machine(*gpus, **values):
    return Machine("linux", "x86_64", "3.12.3", gpus, **values)


def gpu(capability="sm86"):
    return Gpu("NVIDIA Test", capability, 8 << 30, 28)


@pytest.fixture
def choose(bundle):
    """Choose for a bundle without engines."""
    return partial(mge_runtime.backends.choose, bundle=bundle)


@pytest.fixture
def bare():
    return machine(gpu_problem="no NVIDIA driver is installed", libraries={"onnxruntime": "1.31.1"})


def test_auto_takes_the_cpu_and_says_why_not_the_others(choose, bare):
    choice = choose(machine=bare)
    assert (choice.backend, choice.device) == ("onnxruntime", "cpu")
    assert (choice.engines, choice.command, choice.gpu) == (None, None, None)
    assert [(c.backend, c.device) for c in choice.passed_over] == [(name, "cuda:0") for name in BACKENDS]
    assert all(c.reason == "no NVIDIA driver is installed" and not c.available for c in choice.passed_over)
    assert str(choice) == "onnxruntime on cpu"
    assert choose("cpu", "onnxruntime", machine=bare).passed_over == ()


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
def test_what_cannot_run_is_refused_with_the_reason(choose, bare, device, backend, named):
    with pytest.raises(BackendError, match=named):
        choose(device, backend, machine=bare)


def test_a_gpu_that_is_not_there_is_named(choose):
    two = machine(gpu(), gpu(), libraries={**CUDA, "onnxruntime": "1.31.1"}, providers=("CUDAExecutionProvider",))
    assert choose("cuda:1", machine=two).gpu == two.gpus[1]
    with pytest.raises(BackendError, match=r"no such GPU; expected cuda:0 to cuda:1"):
        choose("cuda:2", machine=two)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"libraries": {}}, 'cuda-core is not installed: pip install "cuda-core[cu12]"'),
        ({"libraries": {}, "broken": {"cuda-core": "no bindings"}}, "cuda-core cannot be imported (no bindings): pip"),
        ({"libraries": CUDA}, 'the module onnxruntime is not installed: pip install "mge[gpu]"'),
        ({"libraries": CUDA, "broken": {"onnxruntime": "bad ELF"}}, "onnxruntime cannot be imported (bad ELF)"),
        ({"libraries": {**CUDA, "onnxruntime": "1.31.1"}}, "onnxruntime 1.31.1 here is the build for CPUs"),
    ],
)
def test_what_onnxruntime_on_cuda_lacks_is_said(choose, values, reason):
    found = machine(gpu(), driver_cuda="12.6", **values)
    with pytest.raises(BackendError, match=re.escape(reason)):
        choose("cuda:0", "onnxruntime", machine=found)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("10.2.0", "tensorrt 10.2.0 is not served; expected 10.3 or newer, below 12"),
        ("12.0.0", "tensorrt 12.0.0 is not served; expected 10.3 or newer, below 12"),
        ("unknown", "tensorrt unknown has a version that cannot be read"),
        ("10.3.0", None),
        ("11.99.1", None),
    ],
)
def test_the_version_of_tensorrt_counts(choose, version, reason):
    found = machine(gpu("sm90"), libraries={**CUDA, "tensorrt": version})
    with pytest.raises(BackendError, match=re.escape(reason or "no engines are ready for NVIDIA Test (sm90)")):
        choose("cuda:0", "tensorrt", machine=found)


def test_a_broken_library_is_passed_over_with_its_error(choose):
    found = machine(
        gpu("sm90"),
        libraries={**CUDA, "onnxruntime": "1.31.1"},
        broken={"tensorrt": "libnvinfer.so.10: cannot open shared object file"},
        providers=("CUDAExecutionProvider",),
    )
    choice = choose(machine=found)
    assert str(choice) == "onnxruntime on cuda:0"
    assert "tensorrt cannot be imported (libnvinfer.so.10: cannot open" in choice.passed_over[0].reason


def test_a_missing_onnxruntime_is_said_with_its_command(choose):
    with pytest.raises(BackendError, match=r'onnxruntime is not installed: pip install "mge\[cpu\]"\)$'):
        choose(machine=machine(gpu_problem="none"))


def test_a_gpu_has_one_stream_and_tensorrt_needs_engines(bundle):
    for backend, options, message in (
        ("onnxruntime", {"streams": 2}, "asked for 2 streams on cuda:0; expected 1: open one pipeline per thread"),
        ("tensorrt", {}, "tensorrt on cuda:0 names no GPU or no engines"),
    ):
        with pytest.raises(BackendError, match=message):
            open_backend(Choice(backend, "cuda:0", "", (), machine=machine(gpu())), bundle, **options)


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
