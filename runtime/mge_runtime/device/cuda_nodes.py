"""What a captured CUDA graph is made of: its nodes counted by kind, copies by direction.

A copy between graphs that went by way of the host would be a node of the graph, so this is how its absence is shown.

Experimental: ran on one GPU, once (docs/performance.md, ONNX Runtime on CUDA).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

__all__ = ["count_nodes"]

_HOST, _DEVICE, _ARRAY, _UNIFIED = 1, 2, 3, 4  # CUmemorytype
_MEMCPY, _CHILD = 1, 4  # CUgraphNodeType


def count_nodes(driver: Any, graph: Any) -> dict[str, int]:
    """Count a graph's nodes, those of child graphs included.

    Args:
        driver: the module `cuda.bindings.driver`.
        graph: a `CUgraph`.

    Returns:
        Number of nodes by kind: CUDA's name for it in lower case ("kernel", "memset", "host", "memcpy_batch"), and for
        copies "copy_<from>_to_<to>" with "host", "device" or "unknown" at either end.

    Raises:
        RuntimeError: the driver refuses a question.
    """
    counts: Counter[str] = Counter()
    (total,) = _values(driver.cuGraphGetNodes(graph))[1:]
    nodes: list[Any] = _values(driver.cuGraphGetNodes(graph, total))[0] if total else []
    for node in nodes[:total]:
        (kind,) = _values(driver.cuGraphNodeGetType(node))
        if int(kind) == _CHILD:
            (child,) = _values(driver.cuGraphChildGraphNodeGetGraph(node))
            counts.update(count_nodes(driver, child))
        elif int(kind) == _MEMCPY:
            (copy,) = _values(driver.cuGraphMemcpyNodeGetParams(node))
            source = _place(driver, _memory_type(copy, "srcMemoryType"), copy.srcDevice)
            target = _place(driver, _memory_type(copy, "dstMemoryType"), copy.dstDevice)
            counts[f"copy_{source}_to_{target}"] += 1
        else:
            counts[kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()] += 1
    return dict(sorted(counts.items()))


def _memory_type(copy: Any, name: str) -> int | None:
    """What a copy says of one end; None where it says nothing, which cuda-bindings refuses to read."""
    try:
        return int(getattr(copy, name))
    except (TypeError, ValueError):
        return None


def _place(driver: Any, kind: int | None, address: Any) -> str:
    """Where one end of a copy lies. With unified addresses the node may not know it, so the pointer is asked."""
    if kind in (_HOST, _ARRAY):
        return "host" if kind == _HOST else "device"
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    status, *found = driver.cuPointerGetAttribute(attribute, address)
    if int(status) == 0:
        return {_HOST: "host", _DEVICE: "device"}.get(int(found[0]), "unknown")
    # CUDA does not know the pointer: ordinary host memory, unless the node itself says that it is the device's.
    return {_UNIFIED: "host", _DEVICE: "device"}.get(kind or 0, "unknown")


def _values(result: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"cannot look into a CUDA graph: {status.name}")
    return tuple(values)
