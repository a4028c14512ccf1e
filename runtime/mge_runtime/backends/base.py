"""The seam between the chain and whatever computes it: an `Executor`, frames in, tensors out, both on the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from mge_runtime.errors import BundleError
from mge_runtime.fields import JsonValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.calibrated import ExitPoint
    from mge_runtime.manifest import GraphSpec

    Array: TypeAlias = NDArray[np.generic]


Streams: TypeAlias = "int | Literal['auto']"  # runs in flight at once; "auto": as many as give the most images a second
Found: TypeAlias = "Mapping[str, tuple[str, Sequence[object]]]"  # by name: NumPy's name of its type, and its shape


@dataclass(frozen=True)
class ExecutorResult:
    """The outputs of one run.

    Images may stop early, so a tensor has one row for each image that ran the graph it is an output of, in the order
    of the frames; rows that did not run are absent. Without exits that is every image.
    """

    tensors: Mapping[str, Array]  # by name, on the host
    times_ms: Mapping[str, float]  # milliseconds for all images together, by step, in the order of the steps
    graphs_run: NDArray[np.intp]  # [B]: how many graphs each image ran; its logits are the last one's
    step_graphs: Mapping[str, int]  # by step, the graph it begins with, from 0: images that stopped before had no part


@dataclass(frozen=True)
class Span:
    """Graphs that run without a look at their logits."""

    first: int  # graph, from 0
    last: int  # one after the last graph
    point: ExitPoint | None  # what is asked after them; None: the run ends there


def split(graphs: int, exits: Sequence[ExitPoint]) -> list[Span]:
    """Cut the first `graphs` graphs of a chain behind each exit point, except at their end, where the run stops anyway.

    The exits come in any order, at most one for each graph.
    """
    points = sorted((point for point in exits if point.graphs < graphs), key=lambda point: point.graphs)
    cuts = [0, *(point.graphs for point in points), graphs]
    return [Span(*ends) for ends in zip(cuts[:-1], cuts[1:], [*points, None], strict=True)]


class Executor(ABC):
    """The opened chain of one bundle: every graph is ready to run, and each entry that is used was checked."""

    streams: int = 1  # runs that may be in flight at once, each in a thread of its own
    max_batch: int | None = None  # most frames in one run; None: no limit but memory
    maps_weights: bool = True  # whether it may read weights where they lie in the bundle's file

    @abstractmethod
    def run(
        self, frames: Array, graphs: int, outputs: Collection[str], exits: Sequence[ExitPoint] = ()
    ) -> ExecutorResult:
        """Run the chain on a batch.

        Args:
            frames: uint8 RGB [B, S, S, 3].
            graphs: run this many, from the first on; at least 1.
            outputs: names of the tensors to return; those of graphs that run for no image are left out.
            exits: where images that are confident enough leave the batch; the others go on.

        Raises:
            BackendError: a graph failed, or the batch is too large.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything; closing twice does nothing."""

    def report(self) -> dict[str, JsonValue]:
        """What is worth knowing about memory and CUDA graphs, as plain values; empty where there is nothing to say."""
        return {}


def check_tensors(graph: GraphSpec, inputs: Found, outputs: Found, advice: str) -> None:
    """Check what a library says of the inputs and outputs of a graph that it opened.

    Args:
        graph: as the manifest has it.
        inputs: as the library has them; axes that are no numbers get their size when the graph runs.
        outputs: the same.
        advice: what to do where they differ.

    Raises:
        BundleError: a name, a type or a shape differs.
    """
    for role, found, tensors in (("input", inputs, graph.inputs), ("output", outputs, graph.outputs)):
        expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
        for name in sorted(found.keys() | expected.keys()):
            (kind, shape), (dtype, wanted) = found.get(name, ("none", ())), expected.get(name, ("none", ()))
            sizes = [pair for pair in zip(shape[1:], wanted[1:], strict=False) if isinstance(pair[0], int)]
            if kind != dtype or len(shape) != len(wanted) or any(size != axis for size, axis in sizes):
                raise BundleError(
                    f"the graph {graph.name} has the {role} {name!r} as {kind} {list(shape)}; the manifest says "
                    f"{dtype} {list(wanted)}: {advice}"
                )
