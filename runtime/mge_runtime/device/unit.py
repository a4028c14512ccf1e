"""What a backend gives to the device layer: units of work over tensors whose addresses it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mge_runtime.device.base import Stream
    from mge_runtime.fields import JsonValue

__all__ = ["Addresses", "Launch", "Unit"]


@dataclass(frozen=True)
class Addresses:
    """Where a unit finds everything, for one batch size; fixed until its `Launch` is closed."""

    batch: int
    tensors: Mapping[str, int]  # device address by tensor name, of every tensor of the chain
    scratch: int  # device address of `scratch_bytes` bytes that others use before and after; 0 if none are needed
    scratch_bytes: int  # at least as many as the unit asked for


class Launch(ABC):
    """A unit ready for one batch size: the same shapes and addresses at every run."""

    @abstractmethod
    def enqueue(self, stream: Stream) -> None:
        """Put the work on the stream and return without waiting for it.

        Raises:
            BackendError: it cannot be started, or it failed.
        """

    @abstractmethod
    def why_not_captured(self, stream: Stream) -> str | None:
        """Why the chain cannot capture this in a graph of its own; None: it can. Asked after a first run."""

    @property
    def has_graph(self) -> bool:
        """Whether the library behind it launches a graph that it captured itself."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Release it; nothing of it runs any more. Closing twice does nothing."""


class Unit(ABC):
    """One graph of the chain: an engine of TensorRT, a session of ONNX Runtime."""

    name: str  # for people
    min_batch: int = 1
    max_batch: int | None = None  # None: no limit but memory
    scratch_bytes: int = 0  # memory it needs while it runs, for its largest batch
    opened: Mapping[str, JsonValue] = {}

    @abstractmethod
    def prepare(self, addresses: Addresses, stream: Stream) -> Launch:
        """Get ready for a batch size.

        Raises:
            BackendError: it cannot run this batch size.
        """

    @abstractmethod
    def close(self) -> None:
        """Release it, after its launches. Closing twice does nothing."""
