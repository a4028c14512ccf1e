"""Many pictures in a row, decoded while the chain computes, against the chain alone over decoded frames."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from mge_runtime.bench.noise import Noise, Watch
from mge_runtime.bench.rounds import shuffled
from mge_runtime.bench.stats import Ratio
from mge_runtime.errors import InputError

if TYPE_CHECKING:
    from mge_runtime.bench.inputs import Inputs
    from mge_runtime.pipeline import Pipeline

__all__ = ["Pipelined", "measure_pipelined"]

_ROUNDS = 3
_LEAST, _MOST = 4, 200  # runs of the chain in a round


@dataclass(frozen=True)
class Pipelined:
    """Rounds of both ways, in the same process on the same sessions."""

    images: int  # in each round
    distinct: int  # pictures behind them
    files_s: tuple[float, ...]  # seconds of each round, picture files to predictions
    frames_s: tuple[float, ...]  # the chain alone
    noise: Noise

    @property
    def ratio(self) -> Ratio:
        """What decoding costs although it is hidden, round by round."""
        return Ratio.of("JPEG to answer, pipelined / compute alone", self.files_s, self.frames_s)


def measure_pipelined(
    pipeline: Pipeline,
    inputs: Inputs,
    batch: int,
    images: int | None,
    *,
    chain_ms: float,
    seconds: float,
    say: Callable[[str], None] = lambda _line: None,
) -> Pipelined:
    """Answer the same pictures both ways, in turn.

    Args:
        pipeline: opened with one stream, warm.
        inputs: the pictures, taken again from the start where there are too few.
        batch: pictures in one run of the chain.
        images: in each round; None: as many as fit.
        chain_ms: of one run of the chain, to tell what fits.
        seconds: to spend.
        say: is told how far it is.

    Raises:
        InputError: a picture cannot be read any more.
    """
    runs = min(_MOST, max(_LEAST, int(seconds * 1e3 / (2 * _ROUNDS * chain_ms))))
    count = runs * batch if images is None else images
    numbers = list(islice(cycle(range(len(inputs.files))), count))

    def from_files() -> None:
        for _, answer in pipeline.predict_iter((inputs.files[n] for n in numbers), batch=batch):
            if isinstance(answer, InputError):
                raise answer

    def from_frames() -> None:
        for first in range(0, count, batch):
            pipeline.run(inputs.frames[numbers[first : first + batch]])

    ways = {"files": from_files, "frames": from_frames}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    watch, orders = Watch(), shuffled(list(ways), apart=False)
    for number in range(_ROUNDS):
        for way in next(orders):
            start = time.perf_counter()
            ways[way]()
            taken[way].append(time.perf_counter() - start)
        say(f"round {number + 1} of {_ROUNDS}")
    noise = watch.stop("compute alone", [s * 1e3 for s in taken["frames"]])
    return Pipelined(count, min(count, len(inputs.files)), tuple(taken["files"]), tuple(taken["frames"]), noise)
