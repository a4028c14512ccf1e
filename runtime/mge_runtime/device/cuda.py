"""An NVIDIA GPU as a device: cuda-core for device, streams, events, graphs and page-locked memory, cuda-bindings below.

Their status is checked here alone: cuda-core raises, which `reported` turns into one line; cuda-bindings returns a
status, which `_check` reads.

Experimental: commit 686f0c1 ran on one GPU, once (docs/lab/cuda.md); what changed since
has not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.device.base import CaptureRefusedError, Device, Direction, Event, Graph, Stream
from mge_runtime.errors import BackendError, MGEError, brief
from mge_runtime.machine import import_library

if TYPE_CHECKING:
    from mge_runtime.device.base import Bytes


_OLDEST = 1  # major version of cuda-core; before it, events and graphs had other names
_INSTALL = (
    'pip install "cuda-core>=1.0.1" cuda-bindings (for drivers of CUDA 12, as on JetPack 6: "cuda-bindings==12.*")'
)


class CudaDevice(Device):
    """One NVIDIA GPU, through its primary context.

    Args:
        index: as CUDA numbers devices, from 0.

    Raises:
        BackendError: cuda-core, the driver or the device is missing or too old.
    """

    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index
        self.name = f"cuda:{index}"
        self._core, self._driver = (import_library(name, _INSTALL) for name in ("cuda.core", "cuda.bindings.driver"))
        found: str = self._core.__version__
        if int(found.split(".")[0]) < _OLDEST:
            raise BackendError(f"cuda-core {found} is too old; expected {_OLDEST}.0 or newer: {_INSTALL}")
        with self.reported("be opened"):
            self._device: Any = self._core.Device(index)
            self._device.set_current()
            # `PinnedMemoryResource` needs pools of host memory, which AGX Orin lacks (NVIDIA/cuda-python #2486, #2795).
            self._pinned: Any = self._core.LegacyPinnedMemoryResource()

    def activate(self) -> None:
        """Make the primary context this thread's, and let it allocate while other threads capture.

        ONNX Runtime captures in CUDA's global mode, which forbids other threads to allocate unless they say that
        captures elsewhere are none of theirs (CUDA driver API, `cuThreadExchangeStreamCaptureMode`).
        """
        with self.reported("be made current"):
            self._device.set_current()
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._check(self._driver.cuThreadExchangeStreamCaptureMode(mode), "let threads capture side by side")

    def create_stream(self) -> Stream:
        """A stream that does not wait for the default stream."""
        with self.reported("create a stream"):
            options = self._core.StreamOptions(nonblocking=True)
            return _CudaStream(self, self._device.create_stream(options=options))

    def create_event(self) -> Event:
        """An event with timing."""
        with self.reported("create an event"):
            return _CudaEvent(self, self._device.create_event(self._core.EventOptions(timing_enabled=True)))

    def capture(self, stream: Stream, enqueue: Callable[[], None]) -> Graph:
        """Capture as a CUDA graph what `enqueue` puts on a stream.

        Raises:
            CaptureRefusedError: CUDA or a library cannot capture it; the stream is as it was.
        """
        with self.reported("create a graph"):
            builder: Any = _native(stream).create_graph_builder()
        try:
            # Other threads may have pipelines of their own, which allocate and synchronize as they like.
            builder.begin_building(mode="thread_local")
            enqueue()
            builder.end_building()
            return _CudaGraph(self, builder.complete())
        except Exception as error:
            raise CaptureRefusedError(f"{self.name} cannot capture a graph: {brief(error)}") from error
        finally:
            # Ends a capture that went wrong, too, which `end_building` refuses to; then it raises.
            with suppress(Exception):
                builder.close()

    def _allocate(self, size: int) -> tuple[int, Callable[[], None]]:
        # Not from a pool: it is allocated once, at opening, and what is freed is free for other libraries at once.
        address = int(self._check(self._driver.cuMemAlloc(size), f"allocate {size} bytes"))

        def free() -> None:
            self._check(self._driver.cuMemFree(address), f"free {size} bytes")

        return address, free

    def _allocate_host(self, size: int) -> tuple[Bytes, Callable[[], None]]:
        with self.reported(f"allocate {size} bytes of page-locked memory"):
            buffer: Any = self._pinned.allocate(size)

        def free() -> None:
            with self.reported("free page-locked memory"):
                buffer.close()

        memory = (ctypes.c_uint8 * size).from_address(int(buffer.handle))
        return np.frombuffer(memoryview(memory), np.uint8), free

    def _copy(self, direction: Direction, target: int, source: int, size: int, stream: Stream) -> None:
        copy: Any = {
            "host_to_device": self._driver.cuMemcpyHtoDAsync,
            "device_to_host": self._driver.cuMemcpyDtoHAsync,
            "on_device": self._driver.cuMemcpyDtoDAsync,
        }[direction]
        self._check(copy(target, source, size, _native(stream).handle), f"copy {size} bytes ({direction})")

    def _check(self, result: tuple[Any, ...], what: str) -> Any:
        """The value that a call of cuda-bindings returned beside its status, if any.

        Raises:
            BackendError: the status is an error.
        """
        status, *values = result
        if int(status) == 0:
            return values[0] if values else None
        _, text = self._driver.cuGetErrorString(status)
        reason = text.decode() if isinstance(text, bytes) else "unknown status"
        raise BackendError(f"{self.name} cannot {what}: {status.name}: {reason}")

    @contextmanager
    def reported(self, what: str) -> Generator[None]:
        """Turn what cuda-core raises into a BackendError."""
        try:
            yield
        except MGEError:
            raise
        except Exception as error:  # CUDAError has no public home; a missing driver is a RuntimeError
            raise BackendError(f"{self.name} cannot {what}: {brief(error)}") from error


class _Native:
    """What cuda-core made, and the device that reports its errors."""

    def __init__(self, device: CudaDevice, native: Any) -> None:
        self.device = device
        self.native: Any = native

    def close(self) -> None:
        self.native.close()


class _CudaStream(_Native, Stream):
    def __init__(self, device: CudaDevice, native: Any) -> None:
        super().__init__(device, native)
        self.handle = int(native.handle)

    def record(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)  # noqa: S101 - events of another device are a defect
        with self.device.reported("record an event"):
            self.native.record(event.native)

    def synchronize(self) -> None:
        with self.device.reported("run the chain"):
            self.native.sync()


class _CudaEvent(_Native, Event):
    def ms_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _CudaEvent)  # noqa: S101 - as above
        with self.device.reported("read an event's time"):
            return float(self.native - earlier.native)


class _CudaGraph(_Native, Graph):
    def launch(self, stream: Stream) -> None:
        with self.device.reported("launch a graph"):
            self.native.launch(_native(stream))


def _native(stream: Stream) -> Any:
    assert isinstance(stream, _CudaStream)  # noqa: S101 - streams of another device are a defect
    return stream.native
