"""Device memory as two types, owned and borrowed, and host buffers that a device can copy from and to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]

__all__ = ["BorrowedMemory", "HostBuffer", "Memory", "OwnedMemory"]


class OwnedMemory:
    """A piece of device memory that is freed by `close`, once.

    Args:
        address: of its first byte, on the device; a multiple of 256.
        size: bytes.
        free: gives it back.
    """

    def __init__(self, address: int, size: int, free: Callable[[], None]) -> None:
        self._address = address
        self.size = size
        self._free: Callable[[], None] | None = free

    @property
    def closed(self) -> bool:
        """Whether it was given back."""
        return self._free is None

    @property
    def address(self) -> int:
        """Of its first byte, on the device.

        Raises:
            BackendError: it was given back.
        """
        if self.closed:
            raise BackendError("device memory was used after it was released; open the pipeline again")
        return self._address

    def borrow(self, offset: int = 0, size: int | None = None) -> BorrowedMemory:
        """A part of it, which keeps this object alive but never frees it.

        Raises:
            BackendError: the part reaches beyond the end.
        """
        size = self.size - offset if size is None else size
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BackendError(f"asked for bytes {offset} to {offset + size} of {self.size} bytes of device memory")
        return BorrowedMemory(self, offset, size)

    def close(self) -> None:
        """Give it back; nothing that was started may still use it. Closing twice does nothing."""
        free, self._free = self._free, None
        if free is not None:
            free()


class BorrowedMemory:
    """A part of device memory that somebody else owns and frees.

    Args:
        owner: the memory it is part of; kept alive.
        offset: of its first byte in `owner`.
        size: bytes.
    """

    def __init__(self, owner: OwnedMemory, offset: int, size: int) -> None:
        self._owner = owner
        self._offset = offset
        self.size = size

    @property
    def address(self) -> int:
        """Of its first byte, on the device.

        Raises:
            BackendError: its owner gave it back.
        """
        return self._owner.address + self._offset


Memory: TypeAlias = OwnedMemory | BorrowedMemory


class HostBuffer:
    """Host memory that a device copies from and to without a detour: page-locked where the device asks for it.

    Args:
        array: its bytes, uint8 [size].
        free: gives it back.
    """

    def __init__(self, array: Bytes, free: Callable[[], None]) -> None:
        self._array: Bytes | None = array
        self._free: Callable[[], None] | None = free
        self.size = len(array)

    @property
    def array(self) -> Bytes:
        """Its bytes, uint8 [size]; whoever keeps them beyond the next run copies them.

        Raises:
            BackendError: it was given back.
        """
        if self._array is None:
            raise BackendError("a host buffer was used after it was released; open the pipeline again")
        return self._array

    def close(self) -> None:
        """Give it back; closing twice does nothing."""
        self._array = None
        free, self._free = self._free, None
        if free is not None:
            free()
