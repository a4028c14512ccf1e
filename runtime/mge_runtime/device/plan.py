"""Where each tensor of a chain lies in one slab of device memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.manifest import FRAME, Manifest, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ALIGNMENT", "Place", "TensorPlan", "aligned", "made_in", "read_after"]

ALIGNMENT = 256  # bytes: what TensorRT asks of device memory


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of 256."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Place:
    """One tensor's place."""

    spec: TensorSpec
    offset: int  # bytes from the slab's start, a multiple of 256
    row_bytes: int  # of one image's part; rows follow each other without a gap

    def shape(self, batch: int) -> tuple[int, ...]:
        """Its shape for a batch."""
        return (batch, *(int(axis) for axis in self.spec.shape[1:]))

    def size(self, batch: int) -> int:
        """Its bytes for a batch."""
        return batch * self.row_bytes


class TensorPlan:
    """A place of its own for every tensor between graphs, so that any of them can be asked for after a run.

    Args:
        manifest: of the chain.
        max_batch: images there is room for, at least 1.
    """

    def __init__(self, manifest: Manifest, max_batch: int) -> None:
        specs = {tensor.name: tensor for graph in manifest.graphs for tensor in (*graph.inputs, *graph.outputs)}
        places: dict[str, Place] = {}
        offset = 0
        for name in (FRAME, *sorted(specs.keys() - {FRAME})):
            spec = specs[name]
            row_bytes = prod(int(axis) for axis in spec.shape[1:]) * np.dtype(spec.dtype).itemsize
            places[name] = Place(spec, offset, row_bytes)
            offset += aligned(max_batch * row_bytes)
        self.max_batch = max_batch
        self.places: Mapping[str, Place] = places
        self.size = offset  # bytes of the whole slab


def made_in(manifest: Manifest, first: int, last: int) -> set[str]:
    """The outputs of graphs `first` to `last` - 1, counted from 0."""
    return {tensor.name for graph in manifest.graphs[first:last] for tensor in graph.outputs}


def read_after(manifest: Manifest, first: int, last: int) -> list[str]:
    """Tensors from before graph `first` that it and those up to `last` - 1 read, by name."""
    read = {tensor.name for graph in manifest.graphs[first:last] for tensor in graph.inputs}
    return sorted(read - made_in(manifest, first, last))
