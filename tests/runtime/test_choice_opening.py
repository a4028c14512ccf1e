"""What choosing and opening do with engines on machines that are not at hand: none is read before it fits."""

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mge_runtime.backends import choose, open_backend
from mge_runtime.bundle import Bundle, write_bundle
from mge_runtime.errors import BackendError, BundleError
from mge_runtime.machine_probe import describe_machine
from mge_runtime.trt.keep import native_library

place = Path(__file__).with_name("recorded_machines.py")
spec = importlib.util.spec_from_file_location("mge_tests_recorded_machines", place)
machines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(machines)
chosen, with_version = machines.chosen, machines.with_version


@pytest.fixture
def make(tiny, tmp_path, monkeypatch):
    """Make bundles, real ones, with bytes in place of engines; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    return partial(machines.write_with_engines, tiny, tmp_path / "mge.plan")


@pytest.fixture
def locked(monkeypatch):
    """Fail when a byte of an engine is read, or anything that could deserialise one is loaded."""

    def view(_, name):
        raise AssertionError(f"{name} was read")

    def read(self, name):
        assert not name.endswith(".plan"), f"{name} was read"
        return original(self, name)

    original = Bundle.read
    monkeypatch.setattr(Bundle, "view", view)
    monkeypatch.setattr(Bundle, "read", read)
    monkeypatch.setitem(sys.modules, "mge_runtime.backends.tensorrt", None)


@pytest.mark.usefixtures("locked")
def test_choosing_reads_no_engine(make):
    path = make(*machines.EVERYWHERE)
    for machine in (
        machines.CPU,
        machines.ORIN,
        machines.THOR,
        machines.RTX3060,
        machines.RTX4090,
        machines.T4_RTX,
        machines.T4,
        machines.H100,
        machines.H100_ORT,
        machines.RTX5090,
    ):
        chosen(path, machine)


@pytest.mark.usefixtures("locked")
def test_opening_asks_the_library_for_its_version_before_it_reads_an_engine(make):
    """The real TensorRT-RTX is loaded; a description of the machine that lags behind it is found out."""
    pytest.importorskip("tensorrt_rtx")
    path = make(replace(machines.FOR_RTX, version="1.7.0.99"))
    with Bundle.open(path) as bundle:
        choice = choose(bundle=bundle, machine=with_version(machines.RTX3060, "tensorrt-rtx", "1.7.0.99"))
        assert choice.engines is not None
        with pytest.raises(BackendError) as caught:
            open_backend(choice, bundle)
    assert str(caught.value).startswith(
        f"{machines.FOR_RTX.target} in the bundle was built by tensorrt-rtx 1.7.0.99, 1."
    )
    assert str(caught.value).endswith(
        "build again: mge-build mge.plan --target rtx:sm86 --into-bundle (on any linux x86_64 machine)"
    )


def test_a_damaged_engine_is_no_engine(make):
    path = make(machines.FOR_RTX)
    with Bundle.open(path) as bundle:
        offset = bundle.region(f"engines/{machines.FOR_RTX.target}/gate.plan").offset
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"X")
    with Bundle.open(path) as bundle:
        engines = choose(bundle=bundle, machine=machines.RTX3060).engines
        assert bytes(engines.plan("ingest")) == machines.NO_PLAN
        with pytest.raises(BundleError, match=r"gate\.plan do not match"):
            engines.plan("gate")


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
    assert native_library(machine, 0) == library
    assert native_library(machine, 0, library) == library


@pytest.mark.parametrize(
    ("machine", "backend", "line"),
    [
        (machines.ORIN, "tensorrt-rtx", "TensorRT-RTX does not serve sm87 (Jetson Orin); full TensorRT does"),
        (
            replace(machines.ORIN, libraries={"cuda-core": "1.2.2"}),
            "auto",
            "tensorrt is not installed: TensorRT comes with JetPack: sudo apt install nvidia-jetpack",
        ),
        (
            replace(machines.H100, libraries=machines.H100.libraries | {"tensorrt": "12.0.1"}),
            "tensorrt",
            "tensorrt 12.0.1 is not served",
        ),
        (
            replace(machines.ORIN, libraries=machines.ORIN.libraries | {"tensorrt": "8.6.2"}),
            "auto",
            "tensorrt 8.6.2 is not served",
        ),
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
    assert ("mge[rtx]" in str(caught.value)) == (backend == "tensorrt-rtx" and machine.gpus[0].name != "Orin")


def test_a_jetson_is_not_told_to_install_what_has_no_wheel_for_it():
    choice = choose(machine=replace(machines.ORIN, libraries={"cuda-core": "1.2.2", "onnxruntime": "1.23.2"}))
    (reason,) = (other.reason for other in choice.passed_over if other.backend == "onnxruntime")
    assert (choice.device, reason) == ("cpu", "onnxruntime-gpu has no wheel for the GPU of a Jetson")


def test_engines_are_built_on_opening_and_what_fails_there_is_one_line(make):
    """Without a GPU the build ends where it would begin: at the device."""
    vendor = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")
    if describe_machine().gpus:
        pytest.skip("there is a GPU here")
    machine = replace(machines.RTX3060, libraries=machines.RTX3060.libraries | {"tensorrt-rtx": vendor.__version__})
    said = []
    with Bundle.open(make()) as bundle:
        choice = choose(bundle=bundle, machine=machine)
        assert (choice.backend, choice.build) == ("tensorrt-rtx", True)
        with pytest.raises(BackendError, match=r"^cuda:0 cannot be opened: .*") as caught:
            open_backend(choice, bundle, say=said.append)
    assert "\n" not in str(caught.value)
    assert "no engines are ready for NVIDIA GeForce RTX 3060 (sm86)" in said[0]


def test_a_gpu_that_is_not_used_is_remarked(make):
    with Bundle.open(make(machines.FOR_RTX)) as bundle:
        without = replace(machines.RTX3060, libraries={"cuda-core": "1.2.2", "onnxruntime": "1.31.1"})
        remark = choose(bundle=bundle, machine=without).remark
        assert remark.startswith(
            "running with onnxruntime on cpu; not with tensorrt on cuda:0: tensorrt is not installed"
        )
        assert 'tensorrt_rtx is not installed: pip install "mge[rtx]"' in remark
        assert "\n" not in remark
        assert "cuda-core is not installed" in choose(bundle=bundle, machine=machines.RTX5090).remark
        # What runs best, what was asked for, and a machine without a driver leave nothing to say.
        assert choose(bundle=bundle, machine=machines.RTX3060).remark is None
        assert choose("cpu", bundle=bundle, machine=without).remark is None
        assert choose(bundle=bundle, machine=machines.CPU).remark is None


def test_int8_is_not_left_to_a_library_that_nobody_has_seen_answer_it(make, tiny, tmp_path):
    with Bundle.open(make()) as bundle:
        assert str(choose(bundle=bundle, machine=machines.H100_ORT)) == "onnxruntime on cuda:0"
    graphs = tiny.make_stages()
    manifest = tiny.make_manifest(graphs)
    manifest = replace(manifest, precision={**manifest.precision, "expert_1": {"type": "int8"}})
    write_bundle(tmp_path / "int8.plan", manifest, {g.spec.name: g.model() for g in graphs})
    with Bundle.open(tmp_path / "int8.plan") as bundle:
        choice = choose(bundle=bundle, machine=machines.H100_ORT)
        assert str(choice) == "onnxruntime on cpu"
        assert "INT8 has not been checked with ONNX Runtime on CUDA" in choice.remark
