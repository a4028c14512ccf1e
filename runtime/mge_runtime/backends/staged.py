"""The chain stage by stage: each takes the buffers it needs and puts out new ones. This is how the CPU runs it."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.backends.base import Backend, Buffer, Executor, ExecutorResult, StageRunner, split
from mge_runtime.manifest import FRAME

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.backends.base import Array
    from mge_runtime.bundle import Bundle
    from mge_runtime.calibrated import ExitPoint

__all__ = ["StagedBackend", "StagedExecutor"]


class StagedBackend(Backend):
    """A backend that runs one stage after the other, each in buffers that last as long as somebody reads them."""

    def open_chain(self, bundle: Bundle) -> Executor:
        """Open every stage.

        Raises:
            BundleError: an entry is damaged.
            BackendError: the backend cannot run a stage.
        """
        return StagedExecutor(bundle, self)

    @abstractmethod
    def open_stages(self, bundle: Bundle) -> dict[str, StageRunner]:
        """Open every stage, by name; each entry that is used is checked before this returns.

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

    def select(self, buffer: Buffer, rows: NDArray[np.intp]) -> Buffer:
        """A buffer with some of the rows alone, in this order; here by way of the host.

        Args:
            buffer: its first axis is the batch.
            rows: their numbers.
        """
        return self.upload(self.download(buffer)[rows])

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was started has run."""


class StagedExecutor(Executor):
    """Wires the stages of one bundle by tensor name; a tensor is dropped after its last reader.

    Raises:
        BundleError: an entry is damaged.
        BackendError: the backend cannot run a stage.
    """

    def __init__(self, bundle: Bundle, backend: StagedBackend) -> None:
        self._manifest = bundle.manifest
        self._backend = backend
        self._runners: dict[str, StageRunner] = backend.open_stages(bundle)

    def run(
        self, frames: Array, segments: int, outputs: Collection[str], exits: Sequence[ExitPoint] = ()
    ) -> ExecutorResult:
        """As `Executor.run`; the steps that are timed are the stages.

        Raises:
            BackendError: a stage failed.
        """
        manifest, backend = self._manifest, self._backend
        order = [name for segment in manifest.segments[:segments] for name in segment.stages]
        # After its last reader a tensor is dropped: a batch of pictures for every expert is most of the memory.
        last_use = {t.name: number for number, name in enumerate(order) for t in manifest.stage(name).inputs}
        asked = {point.answer for point in exits}
        buffers: dict[str, Buffer] = {FRAME: backend.upload(frames)}
        tensors: dict[str, Array] = {}
        times_ms: dict[str, float] = {}
        step_segments: dict[str, int] = {}
        running = np.arange(len(frames))  # images that have not stopped, by row
        segments_run = np.full(len(frames), segments)
        for span in split(segments, exits):
            for number, segment in enumerate(manifest.segments[span.first : span.last], span.first):
                for name in segment.stages:
                    times_ms[name] = self._run_stage(name, buffers, tensors, outputs)
                    step_segments[name] = number
                    for n in [n for n in buffers if n not in asked and last_use.get(n, -1) < len(times_ms)]:
                        del buffers[n]
            if span.point is None:
                break
            stops = span.point.stops(backend.download(buffers[span.point.answer]))
            segments_run[running[stops]] = span.last
            running = running[~stops]
            if not len(running):
                break
            if stops.any():
                for n in buffers:
                    buffers[n] = backend.select(buffers[n], np.flatnonzero(~stops))
        return ExecutorResult(tensors, times_ms, segments_run, step_segments)

    def _run_stage(
        self, name: str, buffers: dict[str, Buffer], tensors: dict[str, Array], outputs: Collection[str]
    ) -> float:
        """Add what a stage puts out to the buffers, and of it what is wanted to the tensors; the milliseconds."""
        start = time.perf_counter()
        made = self._runners[name].run(buffers)
        self._backend.synchronize()
        took = (time.perf_counter() - start) * 1e3
        buffers.update(made)
        # Rows leave the buffers of later stages; what is wanted keeps the rows that it was made with.
        tensors.update({n: self._backend.download(buffer) for n, buffer in made.items() if n in outputs})
        return took

    def close(self) -> None:
        """Release every stage."""
        for runner in self._runners.values():
            runner.close()
        self._runners = {}
