"""Run the stages of a bundle in turn: segments, tensor wiring, and which tensors live how long. Knows no device."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mge_runtime.backends import Backend, Buffer, StageRunner
from mge_runtime.errors import BackendError
from mge_runtime.manifest import FRAME, Manifest
from mge_runtime.spec import SegmentSpec

if TYPE_CHECKING:
    from mge_runtime.backends.base import Array
    from mge_runtime.bundle import Bundle

__all__ = ["Chain", "ChainResult"]


@dataclass(frozen=True)
class ChainResult:
    """What one run of the chain put out."""

    tensors: Mapping[str, Array]  # by name, on the host; the first axis is the batch
    answer: str  # the tensor [B, C] that answers
    stage_ms: Mapping[str, float]  # milliseconds for the whole batch, by stage that ran


class Chain:
    """The opened stages of one bundle, in the order they run. Used from as many threads at a time as it has streams.

    Raises:
        BundleError: an entry is damaged.
        BackendError: the backend cannot run a stage.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._manifest = bundle.manifest
        self._backend = backend
        self._runners: dict[str, StageRunner] = backend.open_stages(bundle)
        self.streams = backend.streams  # how many runs may be in flight at once

    def run(self, frames: Array, *, segments: int | None = None, outputs: Collection[str] | None = None) -> ChainResult:
        """Run the chain on a batch.

        Args:
            frames: uint8 RGB [B, S, S, 3].
            segments: stop after this many; None: run all of them.
            outputs: names of the tensors to return beside the answer; default: those of the views and the gate.
                Tensors of stages that did not run are left out.

        Raises:
            BackendError: a stage failed, or `segments` or an output does not exist.
        """
        manifest, backend = self._manifest, self._backend
        run = _first(manifest, segments)
        stages = [manifest.stage(name) for segment in run for name in segment.stages]
        answer = run[-1].answer
        wanted = {answer, *(_reported(manifest) if outputs is None else self._checked(outputs))}
        # After its last reader a tensor is dropped: a batch of pictures for every expert is most of the memory.
        last_use = {tensor.name: number for number, stage in enumerate(stages) for tensor in stage.inputs}
        buffers: dict[str, Buffer] = {FRAME: backend.upload(frames)}
        stage_ms: dict[str, float] = {}
        for number, stage in enumerate(stages):
            start = time.perf_counter()
            buffers.update(self._runners[stage.name].run(buffers))
            backend.synchronize()
            stage_ms[stage.name] = (time.perf_counter() - start) * 1e3
            for name in [n for n in buffers if n not in wanted and last_use.get(n, -1) <= number]:
                del buffers[name]
        tensors = {name: backend.download(buffer) for name, buffer in buffers.items() if name in wanted}
        return ChainResult(tensors, answer, stage_ms)

    def close(self) -> None:
        """Release every stage."""
        for runner in self._runners.values():
            runner.close()
        self._runners = {}

    def _checked(self, outputs: Collection[str]) -> Collection[str]:
        known = {tensor.name for stage in self._manifest.stages for tensor in stage.outputs}
        if unknown := sorted(set(outputs) - known):
            raise BackendError(f"no stage puts out a tensor {unknown[0]!r}; the chain has {', '.join(sorted(known))}")
        return outputs


def _first(manifest: Manifest, count: int | None) -> tuple[SegmentSpec, ...]:
    if count is None:
        return manifest.segments
    if not 1 <= count <= len(manifest.segments):
        raise BackendError(
            f"asked to stop after segment {count}; this chain has {len(manifest.segments)}: "
            f'give a number from 1 to {len(manifest.segments)}, or "never"'
        )
    return manifest.segments[:count]


def _reported(manifest: Manifest) -> set[str]:
    """Tensors that a prediction reports."""
    names = {name for view in manifest.views for name in (view.logits, view.heatmap, view.box) if name is not None}
    return names | ({manifest.gate} if manifest.gate is not None else set())
