"""Many pictures in a row, decoded while the chain computes, against the chain alone over decoded frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil
from typing import TYPE_CHECKING

from mge_runtime.bench.noise import Noise, Watch
from mge_runtime.bench.rounds import shuffled
from mge_runtime.bench.stats import Ratio
from mge_runtime.errors import InputError

if TYPE_CHECKING:
    from mge_runtime.bench.inputs import Inputs
    from mge_runtime.pipeline import Pipeline

__all__ = ["Pipelined", "measure_pipelined"]

_ROUNDS = 3  # at least
_BLOCK = 50  # images in a round at most: what disturbs the machine for a while then meets both ways
_LEAST, _MOST = 4, 200  # runs of the chain in a round, where their number is left open


@dataclass(frozen=True)
class Pipelined:
    """Rounds of both ways, each over pictures of its own, in the same process on the same sessions."""

    images: int  # of all rounds, each answered both ways
    distinct: int  # pictures behind them
    round_images: tuple[int, ...]
    files_s: tuple[float, ...]  # seconds of each round, picture files to predictions
    frames_s: tuple[float, ...]  # the chain alone
    noise: Noise

    @property
    def ratio(self) -> Ratio:
        """What decoding costs although it is hidden, round by round."""
        return Ratio.of("JPEG to answer, pipelined / compute alone", self.files_s, self.frames_s)

    @property
    def total_ratio(self) -> float:
        """The same over all images together."""
        return sum(self.files_s) / sum(self.frames_s)

    def image_ms(self, seconds: Sequence[float]) -> list[float]:
        """Milliseconds an image of each round."""
        return [1e3 * s / count for s, count in zip(seconds, self.round_images, strict=True)]


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
        images: altogether; None: as many as fit.
        chain_ms: of one run of the chain, to tell what fits.
        seconds: to spend.
        say: is told how far it is.

    Raises:
        InputError: a picture cannot be read any more.
    """
    runs = min(_MOST, max(_LEAST, int(seconds * 1e3 / (2 * _ROUNDS * chain_ms))))
    count = _ROUNDS * runs * batch if images is None else images
    rounds = max(min(_ROUNDS, count), ceil(count / max(_BLOCK, batch)))
    numbers = list(islice(cycle(range(len(inputs.files))), count))
    ends = [count * (number + 1) // rounds for number in range(rounds)]
    blocks = [numbers[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def from_files(numbers: Sequence[int]) -> None:
        for _, answer in pipeline.predict_iter((inputs.files[n] for n in numbers), batch=batch):
            if isinstance(answer, InputError):
                raise answer

    def from_frames(numbers: Sequence[int]) -> None:
        for first in range(0, len(numbers), batch):
            pipeline.run(inputs.frames[numbers[first : first + batch]])

    ways = {"files": from_files, "frames": from_frames}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    watch, orders = Watch(), shuffled(list(ways), apart=False)
    for number, block in enumerate(blocks, 1):
        for way in next(orders):
            start = time.perf_counter()
            ways[way](block)
            taken[way].append(time.perf_counter() - start)
        say(f"round {number} of {rounds}")
    sizes = tuple(map(len, blocks))
    noise = watch.stop("compute alone", [1e3 * s / size for s, size in zip(taken["frames"], sizes, strict=True)])
    distinct = min(count, len(inputs.files))
    return Pipelined(count, distinct, sizes, tuple(taken["files"]), tuple(taken["frames"]), noise)
