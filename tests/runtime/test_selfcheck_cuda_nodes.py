"""Counting a graph's nodes: the calls held against the installed cuda-bindings, the counting against a graph on paper.

The driver below answers as CUDA's documentation says; it shows how nodes are counted, and nothing about CUDA.
"""

import pytest

from mge_runtime.device.cuda_nodes import count_nodes

driver = pytest.importorskip("cuda.bindings.driver")

KIND, PLACE = driver.CUgraphNodeType, driver.CUmemorytype
OK, INVALID = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_VALUE
KERNEL, MEMSET = KIND.CU_GRAPH_NODE_TYPE_KERNEL, KIND.CU_GRAPH_NODE_TYPE_MEMSET
HOST, DEVICE, UNIFIED = PLACE.CU_MEMORYTYPE_HOST, PLACE.CU_MEMORYTYPE_DEVICE, PLACE.CU_MEMORYTYPE_UNIFIED

PINNED, GPU, ORDINARY = 16, 32, 48  # addresses: page-locked, of the device, unknown to CUDA


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


def test_the_installed_package_has_what_is_called():
    for name, arguments in {
        "cuGraphGetNodes": "(hGraph, size_t numNodes=0)",
        "cuGraphNodeGetType": "(hNode)",
        "cuGraphMemcpyNodeGetParams": "(hNode)",
        "cuGraphChildGraphNodeGetGraph": "(hNode)",
        "cuPointerGetAttribute": "(attribute: CUpointer_attribute, ptr)",
        "cuMemGetInfo": "()",
    }.items():
        assert getattr(driver, name).__doc__.startswith(name + arguments)
    for name in ("srcMemoryType", "srcDevice", "dstMemoryType", "dstDevice"):
        assert hasattr(driver.CUDA_MEMCPY3D, name)
    assert [int(KIND.CU_GRAPH_NODE_TYPE_MEMCPY), int(KIND.CU_GRAPH_NODE_TYPE_GRAPH)] == [1, 4]
    assert [int(kind) for kind in PLACE] == [1, 2, 3, 4]
    graph = pytest.importorskip("cuda.core.graph")
    assert hasattr(graph.GraphBuilder, "graph_definition")
    assert hasattr(graph.GraphDefinition, "handle")
