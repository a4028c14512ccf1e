"""A stage's graph as a library reads it: with its weights where they lie inside the bundle's file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mge_runtime.bundle.layout import stage_graph, stage_weights
from mge_runtime.bundle.onnx_graph import relocate

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle

__all__ = ["located_graph"]


def located_graph(bundle: Bundle, stage: str) -> bytes:
    """A stage's graph, checked against its hash; its weights refer to their place in the bundle and are not checked.

    Raises:
        BundleError: the graph is damaged, or refers to anything but the stage's own weights.
    """
    graph = bundle.read(stage_graph(stage))
    location, start, size = "", 0, 0
    if stage_weights(stage) in bundle.sizes:
        region = bundle.region(stage_weights(stage))
        location, start, size = region.path.name, region.offset, region.size
    return relocate(graph, expected=f"{stage}.weights", size=size, location=location, start=start)
