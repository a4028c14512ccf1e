"""The CPU as a device: the layer above runs where there is no GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.device.base import CaptureRefusedError, Device, Direction, Event, Graph, Stream

if TYPE_CHECKING:
    from mge_runtime.device.base import Bytes

_ALIGNMENT = 256


class HostDevice(Device):
    """NumPy memory, streams that run at once what is enqueued, and no graphs: it pretends no CUDA."""

    name = "host"
    kind = "cpu"
    index = 0

    def activate(self) -> None:
        """Nothing to do."""

    def create_stream(self) -> Stream:
        """A stream; work on it is done when it is enqueued."""
        return _HostStream()

    def create_event(self) -> Event:
        """An event that reads the host's clock."""
        return _HostEvent()

    def capture(self, stream: Stream, enqueue: Callable[[], None]) -> Graph:  # noqa: ARG002
        """Refuse with CaptureRefusedError, always."""
        raise CaptureRefusedError("the host has no graphs")

    def _allocate(self, size: int) -> tuple[int, Callable[[], None]]:
        keep = [np.empty(size + _ALIGNMENT, np.uint8)]
        return -(-keep[0].ctypes.data // _ALIGNMENT) * _ALIGNMENT, keep.clear

    def _allocate_host(self, size: int) -> tuple[Bytes, Callable[[], None]]:
        return np.empty(size, np.uint8), lambda: None

    def _copy(self, direction: Direction, target: int, source: int, size: int, stream: Stream) -> None:  # noqa: ARG002
        ctypes.memmove(target, source, size)


class _HostStream(Stream):
    handle = 0

    def record(self, event: Event) -> None:
        assert isinstance(event, _HostEvent)
        event.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Everything has run."""

    def close(self) -> None:
        """Nothing to release."""


class _HostEvent(Event):
    seconds = 0.0

    def ms_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _HostEvent)
        return (self.seconds - earlier.seconds) * 1e3

    def close(self) -> None:
        """Nothing to release."""
