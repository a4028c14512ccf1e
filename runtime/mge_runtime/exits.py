"""What a caller says about stopping early, and what it means for one chain."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeAlias

from mge_runtime.chain import first_graphs
from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    from mge_runtime.calibrated import Calibrated, ExitPoint
    from mge_runtime.manifest import Manifest

__all__ = ["Exit", "Stops", "resolve_exit"]

# "never": the whole chain; "calibrated": stop each image as soon as its answer is as sure as the calibration asks for;
# N: stop after graph N, from 1, as a rule expert N.
Exit: TypeAlias = "Literal['never', 'calibrated'] | int"


@dataclass(frozen=True)
class Stops:
    """Where a run of the chain stops."""

    graphs: int | None = None  # for every image, after this many; None: at the end
    exits: Sequence[ExitPoint] = ()  # for the images that are sure enough


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
