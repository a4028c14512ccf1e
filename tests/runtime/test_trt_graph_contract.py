"""What runs an engine and is TensorRT-RTX's alone, or is reached by name: `test_trt_contract` holds all the rest.

An engine cannot even be deserialised without a driver, so nothing is called here.
"""

import ast
from pathlib import Path

import pytest

import mge_runtime.backends.trt_graph
from mge_runtime.backends.tensorrt import TensorRTBackend
from mge_runtime.backends.trt_graph import DTYPES
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError
from mge_runtime.manifest import DTYPES as CHAIN_DTYPES

RTX_ALONE = {
    "CudaGraphStrategy": "DISABLED",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "IExecutionContext": "is_stream_capturable",
    "IRuntimeConfig": "create_runtime_cache set_runtime_cache cuda_graph_strategy "
    "dynamic_shapes_kernel_specialization_strategy",
}


@pytest.mark.parametrize(("kind", "names"), RTX_ALONE.items())
def test_what_is_asked_of_tensorrt_rtx_alone(kind, names):
    rtx, full = pytest.importorskip("tensorrt_rtx"), pytest.importorskip("tensorrt_lean")
    for name in names.split():
        assert hasattr(getattr(rtx, kind), name)
        assert not hasattr(getattr(full, kind, None), name), "full TensorRT has it too now: use it there"


def test_a_runtime_configuration_has_what_is_set():
    rtx = pytest.importorskip("tensorrt_rtx")
    tree = ast.parse(Path(mge_runtime.backends.trt_graph.__file__).read_text())
    asked = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "config"}
    assert asked > set(RTX_ALONE["IRuntimeConfig"].split())
    assert asked <= set(dir(rtx.IRuntimeConfig))


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
        def plan(self, graph):
            pytest.fail(f"the engine of {graph} was read")

    backend = TensorRTBackend(load_vendor("tensorrt-rtx"), Unread(), 99)
    assert (backend.name, backend.device, backend.streams) == ("tensorrt-rtx", "cuda:99", 1)
    with Bundle.open(bundle_path) as bundle, pytest.raises(BackendError, match=r"^cuda:99 cannot be opened"):
        backend.open_chain(bundle)
