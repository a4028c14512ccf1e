"""Scratch memory for units that run in turn on one stream: as much as the largest of them needs, for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mge_runtime.device.plan import aligned

if TYPE_CHECKING:
    from mge_runtime.device.base import Device
    from mge_runtime.device.memory import OwnedMemory

__all__ = ["Arena"]


class Arena:
    """One piece of device memory that several units use, one after the other.

    What a unit leaves in it is gone when the next one runs, so units must follow each other on one stream.

    Args:
        device: where it lies.
        sizes: bytes that each unit needs.
    """

    def __init__(self, device: Device, sizes: Sequence[int]) -> None:
        rounded = [aligned(size) for size in sizes]
        self.shared = max(rounded, default=0)  # bytes that are allocated
        self.unshared = sum(rounded)  # bytes it would take if each unit had its own
        self._memory: OwnedMemory | None = device.allocate(self.shared) if self.shared else None

    @property
    def address(self) -> int:
        """Of its first byte, a multiple of 256; 0 where no unit needs any.

        Raises:
            BackendError: it was released.
        """
        return 0 if self._memory is None else self._memory.address

    def close(self) -> None:
        """Release it; closing twice does nothing."""
        if self._memory is not None:
            self._memory.close()
