"""Run the chain of a bundle: which graphs, where it stops, which tensors are returned. Knows no device."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeAlias

import numpy as np

from mge_runtime.errors import BackendError, BundleError
from mge_runtime.manifest import GraphSpec, Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.backends.base import Array, Executor, ExecutorResult
    from mge_runtime.bundle import Bundle
    from mge_runtime.calibrated import Calibrated, ExitPoint
    from mge_runtime.fields import JsonValue

__all__ = ["Chain", "ChainResult", "Exit", "ImageResult", "Stops", "first_graphs", "resolve_exit"]

# "never": the whole chain; "calibrated": stop each image as soon as its logits are as confident as the calibration asks
# for; N: stop after graph N, from 1, as a rule expert N.
Exit: TypeAlias = "Literal['never', 'calibrated'] | int"


@dataclass(frozen=True)
class Stops:
    """Where a run of the chain stops."""

    graphs: int | None = None  # for every image, after this many; None: at the end
    exits: Sequence[ExitPoint] = ()  # for the images that are confident enough


@dataclass(frozen=True)
class ImageResult:
    """Outputs of one run of the chain for one image."""

    tensors: Mapping[str, Array]  # by name, without the batch; those of graphs that ran for it
    answer: str  # the tensor [C] that answers
    step_ms: Mapping[str, float]  # its share of the steps that it took part in, in their order


@dataclass(frozen=True)
class ChainResult:
    """Outputs of one run of the chain."""

    # By name, on the host. The first axis is the batch, or what of it ran so far where images stopped early: a tensor
    # has one row for each image that ran the graph it is an output of, in the order of the frames.
    tensors: Mapping[str, Array]
    answer: str  # the tensor [B, C] that answers what did not stop early
    step_ms: Mapping[str, float]  # milliseconds for all images, by step: the graphs, or what a device can tell
    graphs_run: NDArray[np.intp]  # [B]: how many graphs each image ran
    _manifest: Manifest
    _step_graphs: Mapping[str, int]  # with which a step begins, from 0

    def images(self) -> list[ImageResult]:
        """The same for each image, in the order of the frames."""
        tensors: list[dict[str, Array]] = [{} for _ in self.graphs_run]
        for number, graph in enumerate(self._manifest.graphs):
            ran = np.flatnonzero(self.graphs_run > number).tolist()
            for name in {tensor.name for tensor in graph.outputs} & self.tensors.keys():
                for row, image in enumerate(ran):
                    tensors[image][name] = self.tensors[name][row]
        step_ms: list[dict[str, float]] = [{} for _ in self.graphs_run]
        for step, ms in self.step_ms.items():
            ran = np.flatnonzero(self.graphs_run > self._step_graphs.get(step, 0)).tolist()
            for image in ran:
                step_ms[image][step] = ms / len(ran)
        answers = [self._manifest.graphs[int(count) - 1].logits for count in self.graphs_run]
        return [ImageResult(*parts) for parts in zip(tensors, answers, step_ms, strict=True)]


class Chain:
    """The opened chain of one bundle. Used from as many threads at a time as it has streams.

    Args:
        bundle: open.
        executor: that opened it; closed with the chain.
    """

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        self._manifest = manifest = bundle.manifest
        self._executor = executor
        self._outputs = [(n, graph.name, spec) for n, graph in enumerate(manifest.graphs) for spec in graph.outputs]
        # Tensors that a prediction reports.
        reported = (manifest.gate, *(name for v in manifest.views for name in (v.logits, v.heatmap, v.box)))
        self._reported = {name for name in reported if name is not None}
        # What is mapped from the file changes with it.
        self._file = bundle.watched() if bundle.maps_weights and executor.maps_weights else None
        self.streams = executor.streams  # how many runs may be in flight at once
        self.max_batch = executor.max_batch  # most frames in one run; None: no limit but memory

    def run(
        self,
        frames: Array,
        *,
        graphs: int | None = None,
        outputs: Collection[str] | None = None,
        exits: Sequence[ExitPoint] = (),
    ) -> ChainResult:
        """Run the chain on a batch.

        Args:
            frames: uint8 RGB [B, S, S, 3].
            graphs: stop after this many; None: run all of them.
            outputs: names of the tensors to return beside the answers; default: those of the views and the gate.
                Those of graphs that did not run are left out.
            exits: where images that are sure enough stop; the others go on.

        Raises:
            BundleError: the file whose weights are mapped was overwritten, or an output is not what the manifest says.
            BackendError: a graph failed or an output is not finite, the batch is larger than `max_batch`, or `graphs`
                or an output does not exist.
        """
        run = first_graphs(self._manifest, graphs)
        if outputs is not None:
            known = {spec.name for _, _, spec in self._outputs}
            if unknown := sorted(set(outputs) - known):
                raise BackendError(f"no graph has an output {unknown[0]!r}; the chain has {', '.join(sorted(known))}")
        wanted = {run[-1].logits, *(point.answer for point in exits), *(self._reported if outputs is None else outputs)}
        self._check_file()  # mapped pages that are gone would end the process
        try:
            result = self._executor.run(frames, len(run), wanted | self._reported, exits)
        finally:
            self._check_file()  # half of the weights may have been another model's
        self._check(result)  # all that a prediction rests on, whatever is asked for
        tensors = {name: tensor for name, tensor in result.tensors.items() if name in wanted}
        return ChainResult(
            tensors, run[-1].logits, result.times_ms, result.graphs_run, self._manifest, result.step_graphs
        )

    def report(self) -> dict[str, JsonValue]:
        """What the executor says of its memory and graphs; empty on a CPU."""
        return self._executor.report()

    def close(self) -> None:
        """Release every graph."""
        self._executor.close()
        if self._file is not None:
            self._file.close()

    def _check_file(self) -> None:
        if self._file is not None:
            self._file.check()

    def _check(self, result: ExecutorResult) -> None:
        """Refuse outputs that cannot be right: a class that follows from a NaN heat map looks like any other."""
        made = [
            (*output, result.tensors[output[2].name]) for output in self._outputs if output[2].name in result.tensors
        ]
        for number, graph, spec, tensor in made:
            shape = (int(np.count_nonzero(result.graphs_run > number)), *spec.shape[1:])
            if tensor.shape != shape or tensor.dtype != spec.dtype:
                raise BundleError(
                    f"the output {spec.name} of the graph {graph} is {tensor.dtype} {list(tensor.shape)}; the manifest "
                    f"says {spec.dtype} {list(shape)}: export the bundle again"
                )
        # Looked at all together, which is quicker, and one by one where there is something to say.
        if not np.isfinite(np.concatenate([tensor.ravel() for *_, tensor in made])).all():
            graph, name = next((graph, spec.name) for _, graph, spec, t in made if not np.isfinite(t).all())
            raise BackendError(
                f"the output {name} of the graph {graph} holds NaN or infinity; expected finite numbers: its weights "
                "are damaged or overflow here, export it again in FP32"
            )


def first_graphs(manifest: Manifest, count: int | None) -> tuple[GraphSpec, ...]:
    """The first `count` graphs of a chain; None: all.

    Raises:
        BackendError: it has fewer.
    """
    if count is None:
        return manifest.graphs
    if not 1 <= count <= len(manifest.graphs):
        raise BackendError(
            f"asked to stop after graph {count}; this chain has {len(manifest.graphs)}: "
            f'give a number from 1 to {len(manifest.graphs)}, or "never"'
        )
    return manifest.graphs[:count]


def resolve_exit(exit: object, calibrated: Calibrated, manifest: Manifest) -> Stops:
    """What an `Exit` means for a chain.

    Args:
        exit: an `Exit`; any other value is refused.
        calibrated: what is known of the bundle's exits.
        manifest: of the chain.

    Raises:
        BackendError: no `Exit`, a graph that the chain does not have, or calibrated exits where there are none.
    """
    if isinstance(exit, str) and exit in ("never", "calibrated"):
        return Stops(exits=calibrated.exit_points(manifest) if exit == "calibrated" else ())
    if isinstance(exit, SupportsIndex) and not isinstance(exit, bool):
        return Stops(len(first_graphs(manifest, operator.index(exit))))
    raise BackendError(
        f'asked to stop after graph {exit!r}; expected the number of a graph, from 1, "never" or "calibrated"'
    )
