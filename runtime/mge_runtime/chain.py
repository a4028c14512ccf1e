"""Run the chain of a bundle: which segments, which tensors are returned. Knows no device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mge_runtime.backends.base import Backend, Executor
from mge_runtime.errors import BackendError
from mge_runtime.fields import JsonValue
from mge_runtime.manifest import Manifest
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
    stage_ms: Mapping[str, float]  # milliseconds for the whole batch, by step: the stages, or what a device can tell


class Chain:
    """The opened chain of one bundle. Used from as many threads at a time as it has streams.

    Raises:
        BundleError: an entry is damaged.
        BackendError: the backend cannot run a stage.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._manifest = bundle.manifest
        self._executor: Executor = backend.open_chain(bundle)
        self.streams = backend.streams  # how many runs may be in flight at once
        self.max_batch = self._executor.max_batch  # most frames in one run; None: no limit but memory

    def run(self, frames: Array, *, segments: int | None = None, outputs: Collection[str] | None = None) -> ChainResult:
        """Run the chain on a batch.

        Args:
            frames: uint8 RGB [B, S, S, 3].
            segments: stop after this many; None: run all of them.
            outputs: names of the tensors to return beside the answer; default: those of the views and the gate.
                Tensors of stages that did not run are left out.

        Raises:
            BackendError: a stage failed, the batch is larger than `max_batch`, or `segments` or an output does not
                exist.
        """
        manifest = self._manifest
        run = _first(manifest, segments)
        answer = run[-1].answer
        wanted = {answer, *(_reported(manifest) if outputs is None else self._checked(outputs))}
        if self.max_batch is not None and len(frames) > self.max_batch:
            raise BackendError(
                f"asked to run {len(frames)} frames at once; the engines were built for at most {self.max_batch}: "
                f"run fewer, or build for more with `mge-build --batch 1,1,{len(frames)}`"
            )
        result = self._executor.run(frames, len(run), wanted)
        return ChainResult(result.tensors, answer, result.times_ms)

    def report(self) -> dict[str, JsonValue]:
        """What the executor says of its memory and graphs; empty on a CPU."""
        return self._executor.report()

    def close(self) -> None:
        """Release every stage."""
        self._executor.close()

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
