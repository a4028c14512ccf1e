"""The chain stage by stage: each takes the buffers it needs and puts out new ones. This is how the CPU runs it."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING

from mge_runtime.backends.base import Backend, Buffer, Executor, ExecutorResult, StageRunner
from mge_runtime.manifest import FRAME

if TYPE_CHECKING:
    from mge_runtime.backends.base import Array
    from mge_runtime.bundle import Bundle

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

    def run(self, frames: Array, segments: int, outputs: Collection[str]) -> ExecutorResult:
        """As `Executor.run`; the steps that are timed are the stages.

        Raises:
            BackendError: a stage failed.
        """
        manifest, backend = self._manifest, self._backend
        stages = [manifest.stage(name) for segment in manifest.segments[:segments] for name in segment.stages]
        # After its last reader a tensor is dropped: a batch of pictures for every expert is most of the memory.
        last_use = {tensor.name: number for number, stage in enumerate(stages) for tensor in stage.inputs}
        buffers: dict[str, Buffer] = {FRAME: backend.upload(frames)}
        times_ms: dict[str, float] = {}
        for number, stage in enumerate(stages):
            start = time.perf_counter()
            buffers.update(self._runners[stage.name].run(buffers))
            backend.synchronize()
            times_ms[stage.name] = (time.perf_counter() - start) * 1e3
            for name in [n for n in buffers if n not in outputs and last_use.get(n, -1) <= number]:
                del buffers[name]
        tensors = {name: backend.download(buffer) for name, buffer in buffers.items() if name in outputs}
        return ExecutorResult(tensors, times_ms)

    def close(self) -> None:
        """Release every stage."""
        for runner in self._runners.values():
            runner.close()
        self._runners = {}
