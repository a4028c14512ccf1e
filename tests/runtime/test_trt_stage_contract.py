"""The calls that run an engine, held against the real modules; pyright holds them against the stubs of 10.13.

An engine cannot even be deserialised without a driver, so nothing is called here. `tensorrt_rtx` has everything that is
used; full TensorRT's runtime classes are those of `tensorrt_lean`, less what only TensorRT-RTX has.
"""

import ast
from pathlib import Path

import pytest

import mge_runtime.backends.trt_stage
from mge_runtime.backends.tensorrt import TensorRTBackend
from mge_runtime.backends.trt_stage import DTYPES
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError
from mge_runtime.wiring import DTYPES as CHAIN_DTYPES

HOLDERS = {
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "self._context": "IExecutionContext",
    "runtime": "Runtime",
    "config": "IRuntimeConfig",
    "self.vendor.api": "",
    "api": "",
}
RTX_ALONE = {
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IExecutionContext", "is_stream_capturable"),
    ("", "CudaGraphStrategy"),
    ("CudaGraphStrategy", "DISABLED"),
    ("", "DynamicShapesKernelSpecializationStrategy"),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
}


def used():
    """(class, attribute) of everything that the module asks of TensorRT's objects."""
    tree = ast.parse(Path(mge_runtime.backends.trt_stage.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node.value)
            if text in HOLDERS:
                yield HOLDERS[text], node.attr
            elif text.rpartition(".")[0] in ("api", "self.vendor.api"):
                yield text.rpartition(".")[2], node.attr
    yield "IExecutionContext", "is_stream_capturable"  # asked for by name, since only TensorRT-RTX has it


USED = sorted(set(used()))


def test_every_class_is_used():
    assert {"ICudaEngine", "IExecutionContext", "Runtime", "IRuntimeConfig"} <= {kind for kind, _ in USED}
    assert set(USED) >= RTX_ALONE
    assert ("ExecutionContextAllocationStrategy", "USER_MANAGED") in USED


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_lean"])
@pytest.mark.parametrize(("kind", "attribute"), USED)
def test_every_attribute_that_is_used_exists(name, kind, attribute):
    module = pytest.importorskip(name)
    if name == "tensorrt_lean" and (kind, attribute) in RTX_ALONE:
        assert not hasattr(getattr(module, kind, None) if kind else module, attribute), "full TensorRT has it too now"
        return
    assert hasattr(getattr(module, kind) if kind else module, attribute)


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_lean"])
def test_names_of_types_places_and_directions(name):
    module = pytest.importorskip(name)
    assert set(DTYPES) == set(CHAIN_DTYPES)
    for expected in DTYPES.values():
        assert getattr(module.DataType, expected).name == expected
    assert module.TensorLocation.DEVICE.name == "DEVICE"
    assert {mode.name for mode in (module.TensorIOMode.INPUT, module.TensorIOMode.OUTPUT)} == {"INPUT", "OUTPUT"}
    assert len(module.Dims([1, 2, 3])) == 3
    assert module.Dims([1, 2, 3])[1] == 2


def test_without_a_gpu_opening_is_refused_before_an_engine_is_read(bundle_path):
    from mge_runtime.trt.vendor import load_vendor

    pytest.importorskip("tensorrt_rtx")

    class Unread:
        def plan(self, stage):
            pytest.fail(f"the engine of {stage} was read")

    backend = TensorRTBackend(load_vendor("tensorrt-rtx"), Unread(), 99)
    assert (backend.name, backend.device, backend.streams) == ("tensorrt-rtx", "cuda:99", 1)
    with Bundle.open(bundle_path) as bundle, pytest.raises(BackendError, match=r"^cuda:99 cannot be opened"):
        backend.open_chain(bundle)
