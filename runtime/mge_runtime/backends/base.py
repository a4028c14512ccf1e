"""The seam between the chain and whatever computes it.

A backend opens the stages of a bundle and runs them on buffers of its own; `mge_runtime.chain` wires the buffers by
tensor name and knows nothing of devices. On the CPU a buffer is a NumPy array and moving it costs nothing; a backend
with a device keeps buffers there, so that no tensor visits the host between two stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.bundle import Bundle

    Array: TypeAlias = NDArray[np.generic]

__all__ = ["Backend", "Buffer", "StageRunner", "Streams"]

Buffer: TypeAlias = Any  # what one backend keeps a tensor in; nobody else looks inside
Streams: TypeAlias = "int | Literal['auto']"  # runs in flight at once; "auto": as many as give the most images a second


class StageRunner(ABC):
    """One stage, ready to run. It is used from as many threads at a time as its backend has streams."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Buffer]) -> Mapping[str, Buffer]:
        """Run the stage.

        Args:
            inputs: a buffer for each of the stage's inputs, by tensor name; others are ignored. The first axis of all
                is the batch.

        Returns:
            A buffer for each of the stage's outputs, valid until it is dropped.

        Raises:
            BackendError: the stage failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what the stage holds; it is not run again."""


class Backend(ABC):
    """Opens stages and moves tensors between the host and its device."""

    name: str  # "onnxruntime", ...
    device: str  # "cpu" or "cuda:0"
    version: str  # of the library behind it
    streams: int  # how many runs of the chain may be in flight at once

    @abstractmethod
    def open_stages(self, bundle: Bundle) -> dict[str, StageRunner]:
        """Open every stage, by name; each entry that is used is checked against its hash before this returns.

        Raises:
            BundleError: an entry is damaged.
            BackendError: the backend cannot run a stage.
        """

    @abstractmethod
    def upload(self, array: Array) -> Buffer:
        """A buffer with the array's values."""

    @abstractmethod
    def download(self, buffer: Buffer) -> Array:
        """The buffer's values as an array, after everything that writes to it has run."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was started has run."""
