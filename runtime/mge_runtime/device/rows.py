"""Which image lies in which row of each tensor, where images that are done leave a batch.

Every tensor keeps its place; images that still run are moved to its first rows by copies on the device. A row that
is wanted at the end changes places with another and is never lost, so results wait where they were made and
visit the host once, when all images are done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.device.base import Device, Stream
    from mge_runtime.device.space import Space

__all__ = ["Rows"]


class Rows:
    """The rows of one run.

    Args:
        batch: images at its start.
        wanted: tensors whose rows are all kept, for the images that ran so far.
    """

    def __init__(self, batch: int, wanted: Collection[str]) -> None:
        self.running: NDArray[np.intp] = np.arange(batch)  # the images that still run, by row
        self._wanted = wanted
        self._images: dict[str, NDArray[np.intp]] = {}  # the image in each row, by tensor

    @property
    def made(self) -> list[str]:
        """The wanted tensors that exist, by name."""
        return sorted(self._images)

    def images(self, tensor: str) -> NDArray[np.intp]:
        """The image in each of a wanted tensor's rows."""
        return self._images[tensor]

    def add(self, tensors: Iterable[str]) -> None:
        """These tensors were made, with a row for each image that still runs."""
        for name in tensors:
            if name in self._wanted:
                self._images[name] = self.running.copy()

    def leave(
        self, stops: NDArray[np.bool_], needed: Iterable[str], device: Device, space: Space, stream: Stream
    ) -> None:
        """Let images leave: enqueue the copies that move those that go on to the first rows.

        Args:
            stops: for each image that still runs, whether it leaves, by row.
            needed: tensors that are read afterwards; the rows of others stay where they are.
            device: copies.
            space: where the tensors lie.
            stream: takes the copies.
        """
        stay = int(np.count_nonzero(~stops))
        free = np.flatnonzero(stops[:stay])  # rows that are left, each filled from behind
        behind = stay + np.flatnonzero(~stops[stay:])
        places = [space.plan.places[name] for name in needed]
        # Asked for once: what is enqueued uses it.
        kept = max((place.row_bytes for place in places if place.spec.name in self._images), default=0)
        spare = space.spare(kept) if kept else None
        for place in places:
            images, size = self._images.get(place.spec.name), place.row_bytes
            for front, back in zip(free.tolist(), behind.tolist(), strict=True):
                first, last = (space.slab.borrow(place.offset + row * size, size) for row in (front, back))
                if images is None or spare is None:
                    device.copy_device(first, last, size, stream)
                else:
                    device.copy_device(spare, first, size, stream)
                    device.copy_device(first, last, size, stream)
                    device.copy_device(last, spare, size, stream)
            if images is not None:
                images[free], images[behind] = images[behind], images[free]
        self.running[free] = self.running[behind]
        self.running = self.running[:stay]
