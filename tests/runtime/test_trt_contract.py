"""Every name of TensorRT that the runtime uses exists in the modules that can be installed without a GPU."""

import importlib
import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("tensorrt_calls", Path(__file__).with_name("tensorrt_calls.py"))
calls = importlib.util.module_from_spec(spec)
spec.loader.exec_module(calls)


def exists(module, kind, name):
    return hasattr(getattr(module, kind, None), name)


def test_the_collection_sees_what_is_used():
    used = calls.used_calls(calls.BUILDING + calls.RUNNING)
    assert {
        ("Builder", "build_serialized_network"),
        ("BuilderFlag", "TF32"),
        ("IBuilderConfig", "progress_monitor"),
        ("IProgressMonitor", "step_complete"),
        ("OnnxParser", "parse"),
        ("Runtime", "deserialize_cuda_engine"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_device_memory"),
        ("ICudaEngine", "get_device_memory_size_for_profile_v2"),
    } <= set(used)
    assert len(used) > 50


@pytest.mark.parametrize("kind", calls.BUILDING + calls.RUNNING)
def test_tensorrt_rtx_has_it(kind):
    module = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")
    assert [name for k, name in calls.used_calls((kind,)) if not exists(module, k, name)] == []


@pytest.mark.parametrize("kind", calls.RUNNING)
def test_tensorrt_11_has_it(kind):
    # The lean runtime is full TensorRT's runtime without the builder, of the newest version.
    module = importlib.import_module("tensorrt_lean")
    assert int(module.__version__.split(".")[0]) >= 11
    assert [name for k, name in calls.used_calls((kind,)) if not exists(module, k, name)] == []


def test_what_is_named_by_text_exists_too():
    """Enumerations and RTX's own calls are reached by name; a type checker does not see those."""
    module = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")
    from mge_runtime.trt.target import RTX_CAPABILITIES

    members = set(module.ComputeCapability.__members__)
    assert {name.upper() for name in RTX_CAPABILITIES} == members - {"NONE", "CURRENT"}
    assert "REQUIRE_USER_ALLOCATION" in module.BuilderFlag.__members__
    for name in ("num_compute_capabilities", "set_compute_capability"):
        assert hasattr(module.IBuilderConfig, name)
