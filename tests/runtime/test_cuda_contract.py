"""The calls made on cuda-core and cuda-bindings, checked against the installed packages: none of them can run here.

The nodes of a graph are counted on paper, with a driver that answers as CUDA's documentation says: it shows how they
are counted, and nothing about CUDA.
"""

import ast
import sys
from pathlib import Path

import pytest

import mge_runtime.device.cuda
from mge_runtime.device.cuda import CudaDevice, count_nodes
from mge_runtime.errors import BackendError

core = pytest.importorskip("cuda.core")
driver = pytest.importorskip("cuda.bindings.driver")
graph = pytest.importorskip("cuda.core.graph")

KIND, PLACE = driver.CUgraphNodeType, driver.CUmemorytype
OK, INVALID = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_VALUE
KERNEL, MEMSET = KIND.CU_GRAPH_NODE_TYPE_KERNEL, KIND.CU_GRAPH_NODE_TYPE_MEMSET
HOST, DEVICE, UNIFIED = PLACE.CU_MEMORYTYPE_HOST, PLACE.CU_MEMORYTYPE_DEVICE, PLACE.CU_MEMORYTYPE_UNIFIED

PINNED, GPU, ORDINARY = 16, 32, 48  # addresses: page-locked, of the device, unknown to CUDA

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
    ("_CudaStream", "stream"): core.Stream,
    ("_CudaEvent", "self.native"): core.Event,
    ("_CudaGraph", "self._graph"): graph.Graph,
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


USED = sorted(set(used()))


def test_every_holder_is_used():
    assert {key for key, _ in USED} == set(HOLDERS), "the table above names what is not there any more"


@pytest.mark.parametrize(("holder", "attribute"), USED)
def test_every_attribute_that_is_used_exists(holder, attribute):
    assert hasattr(HOLDERS[holder], attribute)


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
        "cuGraphGetNodes": "(hGraph, size_t numNodes=0)",
        "cuGraphNodeGetType": "(hNode)",
        "cuGraphMemcpyNodeGetParams": "(hNode)",
        "cuGraphChildGraphNodeGetGraph": "(hNode)",
        "cuPointerGetAttribute": "(attribute: CUpointer_attribute, ptr)",
        "cuMemGetInfo": "()",
    }.items():
        assert getattr(driver, function).__doc__.startswith(function + arguments)


def test_what_is_not_called_by_name_is_there():
    assert hasattr(core.Event, "__sub__")
    for name in ("srcMemoryType", "srcDevice", "dstMemoryType", "dstDevice"):
        assert hasattr(driver.CUDA_MEMCPY3D, name)
    assert [int(KIND.CU_GRAPH_NODE_TYPE_MEMCPY), int(KIND.CU_GRAPH_NODE_TYPE_GRAPH)] == [1, 4]
    assert [int(kind) for kind in PLACE] == [1, 2, 3, 4]
    assert hasattr(graph.GraphBuilder, "graph_definition")
    assert hasattr(graph.GraphDefinition, "handle")


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
    with pytest.raises(BackendError, match=r"cuda\.core cannot be imported: .*pip install"):
        CudaDevice(0)


def test_an_old_cuda_core_is_refused(monkeypatch):
    monkeypatch.setattr(core, "__version__", "0.7.0")
    with pytest.raises(BackendError, match=r"cuda-core 0\.7\.0 is too old; expected 1\.0"):
        CudaDevice(0)


class OnPaper:
    """A graph is a list of nodes; a node is its kind, a copy's two ends, or a list, which is a child graph."""

    CUpointer_attribute = driver.CUpointer_attribute

    def cuGraphGetNodes(self, graph, numNodes=0):
        return OK, graph[:numNodes], len(graph)

    def cuGraphNodeGetType(self, node):
        kinds = {list: KIND.CU_GRAPH_NODE_TYPE_GRAPH, tuple: KIND.CU_GRAPH_NODE_TYPE_MEMCPY}
        return OK, kinds.get(type(node), node)

    def cuGraphChildGraphNodeGetGraph(self, node):
        return OK, node

    def cuGraphMemcpyNodeGetParams(self, node):
        (source, source_at), (target, target_at) = node
        copy = driver.CUDA_MEMCPY3D()
        copy.srcDevice, copy.dstDevice = driver.CUdeviceptr(source_at), driver.CUdeviceptr(target_at)
        if source is not None:  # else it stays 0, which is no memory type
            copy.srcMemoryType = source
        copy.dstMemoryType = target
        return OK, copy

    def cuPointerGetAttribute(self, attribute, ptr):
        assert attribute is driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        known = {PINNED: HOST, GPU: DEVICE}
        return (OK, int(known[int(ptr)])) if int(ptr) in known else (INVALID, None)


def test_nodes_are_counted_by_kind_those_of_child_graphs_too():
    graph = [KERNEL, KERNEL, MEMSET, [KERNEL, [KIND.CU_GRAPH_NODE_TYPE_HOST]], KIND.CU_GRAPH_NODE_TYPE_MEMCPY_BATCH]
    assert count_nodes(OnPaper(), graph) == {"host": 1, "kernel": 3, "memcpy_batch": 1, "memset": 1}
    assert count_nodes(OnPaper(), []) == {}


@pytest.mark.parametrize(
    ("source", "target", "name"),
    [
        ((DEVICE, GPU), (DEVICE, GPU), "copy_device_to_device"),
        ((HOST, 0), (DEVICE, GPU), "copy_host_to_device"),
        ((DEVICE, GPU), (HOST, 0), "copy_device_to_host"),
        ((UNIFIED, GPU), (UNIFIED, PINNED), "copy_device_to_host"),
        ((UNIFIED, ORDINARY), (UNIFIED, GPU), "copy_host_to_device"),
        ((DEVICE, PINNED), (DEVICE, GPU), "copy_host_to_device"),
        ((DEVICE, ORDINARY), (PLACE.CU_MEMORYTYPE_ARRAY, 0), "copy_device_to_device"),
        ((None, 0), (DEVICE, GPU), "copy_unknown_to_device"),
    ],
)
def test_copies_are_counted_by_direction(source, target, name):
    assert count_nodes(OnPaper(), [(source, target)]) == {name: 1}


def test_a_question_that_the_driver_refuses_is_an_error():
    class Refusing(OnPaper):
        def cuGraphNodeGetType(self, _):
            return (INVALID,)

    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        count_nodes(Refusing(), [KERNEL])
