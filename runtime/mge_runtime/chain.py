"""The chain of a bundle: which graphs run, where they stop, which tensors are returned. It knows no device."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias

import numpy as np

from mge_runtime.errors import BackendError, BundleError
from mge_runtime.manifest import GraphSpec, Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.backends.base import Array, Executor, ExecutorResult
    from mge_runtime.bundle import Bundle
    from mge_runtime.calibrated import Calibrated, ExitPoint
    from mge_runtime.fields import JsonValue


# "never": the whole chain; "calibrated": stop each image as soon as its logits are as confident as the calibration asks
# for; N: stop after graph N, from 1, as a rule expert N.
Exit: TypeAlias = "Literal['never', 'calibrated'] | int"


@dataclass(frozen=True)
class ExitPolicy:
    """Where a run of the chain stops."""

    graphs: int | None = None  # for every image, after this many; None: at the end
    exits: Sequence[ExitPoint] = ()  # for the images that are confident enough


@dataclass(frozen=True)
class ImageResult:
    """Outputs of one run of the chain for one image."""

    tensors: dict[str, NDArray[Any]]  # by name, without the batch; those of graphs that ran for it
    logits: str  # the tensor [C] of the last graph that ran, the chain's
    step_ms: dict[str, float]  # its share of the steps that it took part in, in their order


def by_image(result: ExecutorResult, graphs: Sequence[GraphSpec]) -> list[ImageResult]:
    """One run of a chain's graphs, image by image in the order of the frames."""
    counts: list[int] = result.graphs_run.tolist()
    images = [ImageResult({}, graphs[count - 1].logits, {}) for count in counts]

    def ran(number: int) -> list[ImageResult]:
        return [image for image, count in zip(images, counts, strict=True) if count > number]

    for number, graph in enumerate(graphs):
        for name in {tensor.name for tensor in graph.outputs} & result.tensors.keys():
            for image, row in zip(ran(number), result.tensors[name], strict=True):
                image.tensors[name] = row
    for step, ms in result.times_ms.items():
        for image in (took_part := ran(result.step_graphs.get(step, 0))):
            image.step_ms[step] = ms / len(took_part)
    return images


class Chain:
    """The opened chain of one bundle. Used from as many threads at a time as it has streams.

    Args:
        bundle: open.
        executor: that opened it; closed with the chain.
    """

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        self._manifest = manifest = bundle.manifest
        self._executor = executor
        # What each graph makes: its number, the tensor, and its type, which takes long to compare by name.
        self._outputs = [
            (n, spec, np.dtype(spec.dtype)) for n, graph in enumerate(manifest.graphs) for spec in graph.outputs
        ]
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
    ) -> ExecutorResult:
        """Run the chain on a batch.

        Args:
            frames: uint8 RGB [B, S, S, 3].
            graphs: stop after this many; None: run all of them.
            outputs: names of the tensors to return beside the logits; default: those of the views and the gate.
                Those of graphs that did not run are left out.
            exits: where images that are confident enough stop; the others go on.

        Raises:
            BundleError: the file whose weights are mapped was overwritten, or an output is not what the manifest says.
            BackendError: a graph failed or an output is not finite, the batch is larger than `max_batch`, or `graphs`
                or an output does not exist.
        """
        run = first_graphs(self._manifest, graphs)
        if outputs is not None:
            known = {tensor.name for graph in self._manifest.graphs for tensor in graph.outputs}
            if unknown := sorted(set(outputs) - known):
                raise BackendError(f"no graph has an output {unknown[0]!r}; the chain has {', '.join(sorted(known))}")
        wanted = {run[-1].logits, *(point.logits for point in exits), *(self._reported if outputs is None else outputs)}
        self._check_file()  # mapped pages that are gone would end the process
        try:
            result = self._executor.run(frames, len(run), wanted | self._reported, exits)
        finally:
            self._check_file()  # half of the weights may have been another model's
        self._check(result)  # all that a prediction rests on, whatever is asked for
        return replace(result, tensors={name: tensor for name, tensor in result.tensors.items() if name in wanted})

    def report(self) -> dict[str, JsonValue]:
        """What the executor says of its memory and CUDA graphs; empty on a CPU."""
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
        images = [int(np.count_nonzero(result.graphs_run > number)) for number in range(len(self._manifest.graphs))]
        made = [
            (*output, result.tensors[output[1].name]) for output in self._outputs if output[1].name in result.tensors
        ]
        for number, spec, dtype, tensor in made:
            shape = (images[number], *spec.shape[1:])
            if tensor.shape != shape or tensor.dtype != dtype:
                raise BundleError(
                    f"the output {spec.name} of the graph {self._manifest.graphs[number].name} is {tensor.dtype} "
                    f"{list(tensor.shape)}; the manifest says {dtype} {list(shape)}: export the bundle again"
                )
        # Looked at all together, which is quicker, and one by one where there is something to say.
        if not np.isfinite(np.concatenate([tensor.ravel() for *_, tensor in made])).all():
            number, spec = next((number, spec) for number, spec, _, t in made if not np.isfinite(t).all())
            raise BackendError(
                f"the output {spec.name} of the graph {self._manifest.graphs[number].name} holds NaN or infinity; "
                "expected finite numbers: its weights are damaged or overflow here, export it again in FP32"
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


def resolve_exit(exit: object, calibrated: Calibrated, manifest: Manifest) -> ExitPolicy:
    """What an exit that a caller named means for a chain.

    Raises:
        BackendError: `exit` is no `Exit`, a graph that the chain lacks, or calibrated exits where there are none.
    """
    if isinstance(exit, str) and exit in ("never", "calibrated"):
        return ExitPolicy(exits=calibrated.exit_points(manifest) if exit == "calibrated" else ())
    if isinstance(exit, SupportsIndex) and not isinstance(exit, bool):
        return ExitPolicy(len(first_graphs(manifest, operator.index(exit))))
    raise BackendError(
        f'asked to stop after graph {exit!r}; expected the number of a graph, from 1, "never" or "calibrated"'
    )
