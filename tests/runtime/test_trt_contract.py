"""Every name of TensorRT that the runtime uses exists in the modules that can be installed without a GPU.

An engine cannot even be deserialized without a driver, so nothing that runs one is called here.
"""

import ast
from pathlib import Path

import pytest

import mge_runtime.backends.tensorrt
from mge_runtime.manifest import DTYPES
from mge_runtime.trt.target import RTX_CAPABILITIES
from mge_runtime.trt.vendor import dtype_name
from tests.helpers import tensorrt_calls as calls

# What is reached by name, so that a type checker does not see it, and full TensorRT has not.
RTX_ALONE = [
    ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
    ("CudaGraphStrategy", "DISABLED"),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("IExecutionContext", "is_stream_capturable"),
    *(("IRuntimeConfig", f"{verb}_runtime_cache") for verb in ("create", "set")),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
]


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")


@pytest.fixture(scope="module")
def lean():
    """Full TensorRT's runtime without the builder, of the newest version."""
    return pytest.importorskip("tensorrt_lean")


def has(module, kind, name):
    return hasattr(getattr(module, kind, None), name)


def test_the_collection_sees_what_is_used():
    used = calls.used_calls(calls.BUILDING + calls.RUNNING)
    called_back, called = ("IProgressMonitor", "step_complete"), ("IExecutionContext", "execute_async_v3")
    assert {called_back, called, ("BuilderFlag", "TF32"), ("IBuilderConfig", "progress_monitor")} <= set(used)
    assert len(used) > 50


def test_tensorrt_rtx_has_it(rtx):
    assert [call for call in calls.used_calls(calls.BUILDING + calls.RUNNING) if not has(rtx, *call)] == []


def test_tensorrt_11_has_it(lean):
    assert int(lean.__version__.split(".")[0]) >= 11
    assert [call for call in calls.used_calls(calls.RUNNING) if not has(lean, *call)] == []


@pytest.mark.parametrize(("kind", "name"), RTX_ALONE)
def test_what_is_asked_of_tensorrt_rtx_alone(rtx, lean, kind, name):
    assert has(rtx, kind, name)
    assert not has(lean, kind, name), "full TensorRT has it too now: use it there"


def test_tensorrt_rtx_serves_the_capabilities_that_we_name(rtx):
    members = set(rtx.ComputeCapability.__members__)
    assert {name.upper() for name in RTX_CAPABILITIES} == members - {"NONE", "CURRENT"}


def test_a_runtime_configuration_has_what_is_set(rtx):
    tree = ast.parse(Path(mge_runtime.backends.tensorrt.__file__).read_text())
    asked = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "config"}
    assert {name for kind, name in RTX_ALONE if kind == "IRuntimeConfig"} < asked <= set(dir(rtx.IRuntimeConfig))


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_lean"])
def test_names_of_types_places_and_directions(name):
    module = pytest.importorskip(name)
    assert {dtype_name(kind) for kind in module.DataType.__members__.values()} >= set(DTYPES)
    assert module.TensorLocation.DEVICE.name == "DEVICE"
    assert {mode.name for mode in (module.TensorIOMode.INPUT, module.TensorIOMode.OUTPUT)} == {"INPUT", "OUTPUT"}
    assert [len(module.Dims([1, 2, 3])), module.Dims([1, 2, 3])[1]] == [3, 2]
