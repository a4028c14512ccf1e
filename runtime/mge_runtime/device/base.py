"""What a device can do: memory, streams, copies, graphs. Every copy is counted."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mge_runtime.device.memory import HostBuffer, Memory, OwnedMemory
from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    from mge_runtime.device.memory import Bytes

__all__ = ["FIRST_RUNS", "CaptureRefusedError", "CopyCounters", "Device", "Event", "Graph", "Stream"]

# Held by one run of this process until its program is captured or known never to be. Until then libraries allocate,
# search for kernels and capture, some of it in threads of their own, and what one pipeline allocates or frees may end
# what another captures; so opening, closing and every allocation hold it too. Later runs allocate where they are asked
# for more outputs than before, and wait for that alone. Reentrant: a first run allocates, and closes its programs where
# it fails.
FIRST_RUNS = threading.RLock()


class CaptureRefusedError(BackendError):
    """Work cannot be captured as a graph; it runs without."""


@dataclass
class CopyCounters:
    """Copies since the device was opened. Copies inside a library do not pass here."""

    host_to_device: int = 0
    host_to_device_bytes: int = 0
    device_to_host: int = 0
    device_to_host_bytes: int = 0
    on_device: int = 0
    on_device_bytes: int = 0


class Event(ABC):
    """A moment on a stream, recorded with `Stream.record`."""

    @abstractmethod
    def ms_since(self, earlier: Event) -> float:
        """Milliseconds from an earlier event of the same device to this one; both have happened."""

    @abstractmethod
    def close(self) -> None:
        """Release it; closing twice does nothing."""


class Stream(ABC):
    """Work in the order in which it was enqueued. There is no default stream: each call that enqueues takes one."""

    handle: int  # what a library takes: a `cudaStream_t`; 0 on the host

    @abstractmethod
    def record(self, event: Event) -> None:
        """Let the event happen after what was enqueued so far."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was enqueued has run.

        Raises:
            BackendError: something failed meanwhile.
        """

    @abstractmethod
    def close(self) -> None:
        """Release it; closing twice does nothing."""


class Graph(ABC):
    """Captured work that is launched as one."""

    nodes: Mapping[str, int] | None = None  # how many it has by kind, copies by direction; None: not known

    @abstractmethod
    def launch(self, stream: Stream) -> None:
        """Enqueue it.

        Raises:
            BackendError: it cannot be launched.
        """

    @abstractmethod
    def close(self) -> None:
        """Release it; closing twice does nothing."""


class Device(ABC):
    """One device. It is used from one thread at a time, which calls `activate` first.

    Every method that fails raises BackendError with one line.
    """

    name: str  # "cuda:0", "host"
    kind: str  # as ONNX Runtime's I/O binding calls it: "cuda", "cpu"
    index: int  # of the device among its kind

    def __init__(self) -> None:
        self.counters = CopyCounters()
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
        """Device memory, aligned to 256 bytes or more.

        Args:
            size: bytes, at least 1.
        """
        with FIRST_RUNS:
            address, free = self._allocate(size)
        self.allocated += size

        def give_back() -> None:
            self.allocated -= size
            with FIRST_RUNS:
                free()

        return OwnedMemory(address, size, give_back)

    def allocate_host(self, size: int) -> HostBuffer:
        """A host buffer for `upload` and `download`.

        Args:
            size: bytes, at least 1.
        """
        with FIRST_RUNS:
            buffer, free = self._allocate_host(size)
        self.allocated_host += size

        def give_back() -> None:
            self.allocated_host -= size
            with FIRST_RUNS:
                free()

        return HostBuffer(buffer, give_back)

    def upload(self, target: Memory, source: HostBuffer, size: int, stream: Stream) -> None:
        """Enqueue a copy of a buffer's first `size` bytes to the device."""
        _check_size(size, target.size, source.size)
        self.counters.host_to_device += 1
        self.counters.host_to_device_bytes += size
        self._upload(target.address, source.array.ctypes.data, size, stream)

    def download(self, target: HostBuffer, offset: int, source: Memory, size: int, stream: Stream) -> None:
        """Enqueue a copy of the memory's first `size` bytes to a buffer, from `offset` on."""
        _check_size(size, target.size - offset, source.size)
        self.counters.device_to_host += 1
        self.counters.device_to_host_bytes += size
        self._download(target.array.ctypes.data + offset, source.address, size, stream)

    def copy_device(self, target: Memory, source: Memory, size: int, stream: Stream) -> None:
        """Enqueue a copy of the memory's first `size` bytes to another place on the device; they do not overlap."""
        _check_size(size, target.size, source.size)
        self.counters.on_device += 1
        self.counters.on_device_bytes += size
        self._copy_device(target.address, source.address, size, stream)

    @abstractmethod
    def _allocate(self, size: int) -> tuple[int, Callable[[], None]]:
        """The address, and what frees it."""

    @abstractmethod
    def _allocate_host(self, size: int) -> tuple[Bytes, Callable[[], None]]:
        """The bytes, and what frees them."""

    @abstractmethod
    def _upload(self, target: int, source: int, size: int, stream: Stream) -> None: ...

    @abstractmethod
    def _download(self, target: int, source: int, size: int, stream: Stream) -> None: ...

    @abstractmethod
    def _copy_device(self, target: int, source: int, size: int, stream: Stream) -> None: ...


def _check_size(size: int, *rooms: int) -> None:
    if size > min(rooms):
        raise BackendError(f"asked to copy {size} bytes between pieces of {' and '.join(map(str, rooms))} bytes")
