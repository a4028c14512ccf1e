"""The seam between the chain and whatever computes it.

A backend opens the chain of a bundle as an `Executor`, which runs it on a batch: frames in, the wanted tensors out,
both on the host. What lies between is the executor's own: `mge_runtime.backends.staged` runs stage after stage on the
host, `mge_runtime.device` runs segments on a device, where no tensor visits the host on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mge_runtime.fields import JsonValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.bundle import Bundle

    Array: TypeAlias = NDArray[np.generic]

__all__ = ["Backend", "Buffer", "Executor", "ExecutorResult", "StageRunner", "Streams"]

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


@dataclass(frozen=True)
class ExecutorResult:
    """What one run put out."""

    tensors: Mapping[str, Array]  # by name, on the host; the first axis is the batch
    times_ms: Mapping[str, float]  # milliseconds for the whole batch, by step, in the order of the steps


class Executor(ABC):
    """The opened chain of one bundle. It is used from as many threads at a time as its backend has streams."""

    max_batch: int | None = None  # most frames in one run; None: no limit but memory

    @abstractmethod
    def run(self, frames: Array, segments: int, outputs: Collection[str]) -> ExecutorResult:
        """Run the chain on a batch.

        Args:
            frames: uint8 RGB [B, S, S, 3].
            segments: run this many, from the first on; at least 1.
            outputs: names of the tensors to return; those of stages that do not run are left out.

        Raises:
            BackendError: a stage failed, or the batch is too large.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything; closing twice does nothing."""

    def report(self) -> dict[str, JsonValue]:
        """What is worth knowing about memory and graphs, as plain values; empty where there is nothing to say."""
        return {}


class Backend(ABC):
    """Opens the chain of a bundle on one device."""

    name: str  # "onnxruntime", ...
    device: str  # "cpu" or "cuda:0"
    version: str  # of the library behind it
    streams: int  # how many runs of the chain may be in flight at once

    @abstractmethod
    def open_chain(self, bundle: Bundle) -> Executor:
        """Open every stage; each entry that is used is checked against its hash before this returns.

        Raises:
            BundleError: an entry is damaged.
            BackendError: the backend cannot run a stage.
        """
