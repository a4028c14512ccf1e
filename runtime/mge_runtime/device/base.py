"""The interface of a device: memory, streams, events, graphs, and copies, each of which is counted."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]


Direction: TypeAlias = Literal["host_to_device", "device_to_host", "on_device"]  # of a copy


# Held by one run of this process until its program is captured or known never to be. Until then libraries allocate,
# search for kernels and capture, some of it in threads of their own, and what one pipeline allocates or frees may end
# what another captures; so opening, closing and every allocation hold it too. Later runs allocate where they are asked
# for more outputs than before, and wait for that alone. Reentrant: a first run allocates, and closes its programs where
# it fails.
FIRST_RUNS = threading.RLock()


class CaptureRefusedError(BackendError):
    """Work cannot be captured as a graph; it runs without."""


class _Owned:
    """What is given back by `close`, once; `free` does it. Using it afterwards raises BackendError."""

    def __init__(self, size: int, free: Callable[[], None]) -> None:
        self.size = size  # bytes
        self._free: Callable[[], None] | None = free

    def close(self) -> None:
        """Give it back; nothing that was started may still use it. Closing twice does nothing."""
        free, self._free = self._free, None
        if free is not None:
            with FIRST_RUNS:
                free()

    def _check_open(self) -> None:
        if self._free is None:
            raise BackendError("memory was used after it was released; open the pipeline again")


class OwnedMemory(_Owned):
    """A piece of device memory."""

    def __init__(self, address: int, size: int, free: Callable[[], None]) -> None:
        super().__init__(size, free)
        self._address = address

    @property
    def address(self) -> int:
        """Of its first byte, on the device; a multiple of 256."""
        self._check_open()
        return self._address

    def borrow(self, offset: int, size: int) -> BorrowedMemory:
        """A part of it, which keeps this object alive but never frees it; BackendError where it is not within."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BackendError(f"asked for bytes {offset} to {offset + size} of {self.size} bytes of device memory")
        return BorrowedMemory(self, offset, size)


@dataclass(frozen=True)
class BorrowedMemory:
    """A part of device memory that somebody else owns and frees."""

    owner: OwnedMemory
    offset: int  # of its first byte in the owner's
    size: int  # bytes

    @property
    def address(self) -> int:
        """Of its first byte, on the device; BackendError where its owner gave it back."""
        return self.owner.address + self.offset


Memory: TypeAlias = OwnedMemory | BorrowedMemory


class HostBuffer(_Owned):
    """Host memory that a device copies from and to without a detour: page-locked where the device asks for it."""

    def __init__(self, array: Bytes, free: Callable[[], None]) -> None:
        super().__init__(len(array), free)
        self._array = array

    @property
    def array(self) -> Bytes:
        """Its bytes, uint8 [size]; whoever keeps them beyond the next run copies them."""
        self._check_open()
        return self._array


class _Resource(ABC):
    @abstractmethod
    def close(self) -> None:
        """Release it; closing twice does nothing."""


class Event(_Resource):
    """A moment on a stream, recorded with `Stream.record`."""

    @abstractmethod
    def ms_since(self, earlier: Event) -> float:
        """Milliseconds from an earlier event of the same device to this one; both have happened."""


class Stream(_Resource):
    """Work in the order in which it was enqueued. There is no default stream: each call that enqueues takes one."""

    handle: int  # what a library takes: a `cudaStream_t`; 0 on the host

    @abstractmethod
    def record(self, event: Event) -> None:
        """Let the event happen after what was enqueued so far."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was enqueued has run; what failed meanwhile is raised here."""


class Graph(_Resource):
    """Captured work that is launched as one."""

    @abstractmethod
    def launch(self, stream: Stream) -> None:
        """Enqueue it."""


class Device(ABC):
    """One device. It is used from one thread at a time, which calls `activate` first.

    What fails, here and in streams, events and graphs, raises BackendError with one line.
    """

    name: str  # "cuda:0", "host"
    kind: str  # as ONNX Runtime's I/O binding calls it: "cuda", "cpu"
    index: int  # of the device among its kind

    def __init__(self) -> None:
        # Number and bytes of the copies since it was opened; those inside a library do not pass here.
        directions: tuple[Direction, ...] = ("host_to_device", "device_to_host", "on_device")
        self.copies = {key: 0 for direction in directions for key in (direction, f"{direction}_bytes")}
        self.allocated = 0  # bytes of device memory that are owned now
        self.allocated_host = 0  # bytes of host buffers that are owned now

    @abstractmethod
    def activate(self) -> None:
        """Make it this thread's device; needed once in each thread before anything else, and cheap."""

    @abstractmethod
    def create_stream(self) -> Stream:
        """A stream of its own."""

    @abstractmethod
    def create_event(self) -> Event:
        """An event that keeps its time."""

    @abstractmethod
    def capture(self, stream: Stream, enqueue: Callable[[], None]) -> Graph:
        """Capture as a graph what `enqueue` puts on a stream; nothing of it runs meanwhile.

        Raises:
            CaptureRefusedError: it cannot be captured; the stream is as it was.
        """

    def allocate(self, size: int) -> OwnedMemory:
        """Device memory of `size` bytes, at least 1, aligned to 256 bytes or more."""
        with FIRST_RUNS:
            address, free = self._allocate(size)
        self.allocated += size

        def give_back() -> None:
            self.allocated -= size
            free()

        return OwnedMemory(address, size, give_back)

    def allocate_host(self, size: int) -> HostBuffer:
        """A buffer of `size` bytes, at least 1, for `upload` and `download`."""
        with FIRST_RUNS:
            buffer, free = self._allocate_host(size)
        self.allocated_host += size

        def give_back() -> None:
            self.allocated_host -= size
            free()

        return HostBuffer(buffer, give_back)

    def upload(self, target: Memory, source: HostBuffer, size: int, stream: Stream) -> None:
        """Enqueue a copy of a buffer's first `size` bytes to the device."""
        _check_size(size, target.size, source.size)
        self._counted("host_to_device", target.address, source.array.ctypes.data, size, stream)

    def download(self, target: HostBuffer, offset: int, source: Memory, size: int, stream: Stream) -> None:
        """Enqueue a copy of the memory's first `size` bytes to a buffer, from `offset` on."""
        _check_size(size, target.size - offset, source.size)
        self._counted("device_to_host", target.array.ctypes.data + offset, source.address, size, stream)

    def copy_device(self, target: Memory, source: Memory, size: int, stream: Stream) -> None:
        """Enqueue a copy of the memory's first `size` bytes to another place on the device; they do not overlap."""
        _check_size(size, target.size, source.size)
        self._counted("on_device", target.address, source.address, size, stream)

    def _counted(self, direction: Direction, target: int, source: int, size: int, stream: Stream) -> None:
        self.copies[direction] += 1
        self.copies[f"{direction}_bytes"] += size
        self._copy(direction, target, source, size, stream)

    @abstractmethod
    def _allocate(self, size: int) -> tuple[int, Callable[[], None]]:
        """The address, and what frees it."""

    @abstractmethod
    def _allocate_host(self, size: int) -> tuple[Bytes, Callable[[], None]]:
        """The bytes, and what frees them."""

    @abstractmethod
    def _copy(self, direction: Direction, target: int, source: int, size: int, stream: Stream) -> None:
        """Enqueue a copy between two addresses."""


def _check_size(size: int, *rooms: int) -> None:
    if size > min(rooms):
        raise BackendError(f"asked to copy {size} bytes between pieces of {' and '.join(map(str, rooms))} bytes")
