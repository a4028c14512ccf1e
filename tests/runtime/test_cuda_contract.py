"""The calls made on cuda-core and cuda-bindings, checked against the installed packages: none of them can run here."""

import ast
import sys
from pathlib import Path

import pytest

import mge_runtime.device.cuda
from mge_runtime.device.cuda import CudaDevice
from mge_runtime.errors import BackendError

core = pytest.importorskip("cuda.core")
driver = pytest.importorskip("cuda.bindings.driver")
graph = pytest.importorskip("cuda.core.graph")

# What holds which object in mge_runtime/device/cuda.py: (class, expression) -> type. "" is any class.
HOLDERS = {
    ("", "self._core"): core,
    ("", "self._driver"): driver,
    ("CudaDevice", "self._device"): core.Device,
    ("CudaDevice", "self._pinned"): core.LegacyPinnedMemoryResource,
    ("CudaDevice", "builder"): graph.GraphBuilder,
    ("CudaDevice", "buffer"): core.Buffer,
    ("CudaDevice", "_native(stream)"): core.Stream,
    ("_CudaStream", "self.native"): core.Stream,
    ("_CudaStream", "native"): core.Stream,
    ("_CudaGraph", "self.native"): graph.Graph,
}


def used():
    """(holder, attribute) of every attribute that the module asks of CUDA's objects."""
    tree = ast.parse(Path(mge_runtime.device.cuda.__file__).read_text())
    for defined in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for node in ast.walk(defined):
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node.value)
                for key in ((defined.name, text), ("", text)):
                    if key in HOLDERS:
                        yield key, node.attr


def test_every_attribute_that_is_used_exists():
    found = set(used())
    assert {key for key, _ in found} == set(HOLDERS), "the table above names what is not there any more"
    assert [(key, attribute) for key, attribute in found if not hasattr(HOLDERS[key], attribute)] == []
    assert hasattr(core.Event, "__sub__")
    assert all(hasattr(kind, "close") for kind in (core.Stream, core.Event, graph.Graph)), "see _Native"


def test_arguments_are_named_as_they_are_given():
    tree = ast.parse(Path(mge_runtime.device.cuda.__file__).read_text())
    named = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.keywords):
        if isinstance(call.func, ast.Attribute):
            holders = [kind for (_, text), kind in HOLDERS.items() if text == ast.unparse(call.func.value)]
            for keyword in call.keywords if holders else ():
                signature = getattr(holders[0], call.func.attr).__doc__.split("\n\n")[0]
                assert keyword.arg in signature
                named.add(keyword.arg)
    assert named == {"nonblocking", "options", "timing_enabled", "mode"}
    assert "thread_local" in graph.GraphBuilder.begin_building.__doc__
    for function, arguments in {
        "cuMemAlloc": "(size_t bytesize)",
        "cuMemFree": "(dptr)",
        "cuMemcpyHtoDAsync": "(dstDevice, srcHost, size_t ByteCount, hStream)",
        "cuThreadExchangeStreamCaptureMode": "(mode: CUstreamCaptureMode)",
        "cuMemcpyDtoHAsync": "(dstHost, srcDevice, size_t ByteCount, hStream)",
        "cuMemcpyDtoDAsync": "(dstDevice, srcDevice, size_t ByteCount, hStream)",
        "cuGetErrorString": "(error: CUresult)",
        "cuMemGetInfo": "()",
    }.items():
        assert getattr(driver, function).__doc__.startswith(function + arguments)


def test_a_status_is_one_line():
    device = object.__new__(CudaDevice)  # a real one needs a GPU; reading a status does not
    device.name, device._driver = "cuda:0", driver
    assert device._check((driver.CUresult.CUDA_SUCCESS,), "free") is None
    assert device._check((driver.CUresult.CUDA_SUCCESS, 7), "allocate") == 7


def test_without_a_driver_opening_is_refused_in_one_line():
    try:
        driver.cuInit(0)
    except RuntimeError:
        with pytest.raises(BackendError, match=r"^cuda:0 cannot be opened: [^\n]+driver[^\n]+$"):
            CudaDevice(0)
    else:
        pytest.skip("there is a driver here")


def test_without_cuda_core_the_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(BackendError, match=r"the module cuda\.core is not installed: pip install"):
        CudaDevice(0)


def test_an_old_cuda_core_is_refused(monkeypatch):
    monkeypatch.setattr(core, "__version__", "0.7.0")
    with pytest.raises(BackendError, match=r"cuda-core 0\.7\.0 is too old; expected 1\.0"):
        CudaDevice(0)
