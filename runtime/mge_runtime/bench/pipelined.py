"""Many pictures in a row, decoded while the chain computes, against the chain alone over decoded frames."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from mge_runtime.bench.deadline import Deadline, TimeUp
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
_SECONDS = 20.0  # where nothing bounds the run


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
    deadline: Deadline,
    say: Callable[[str], None],
    keep: Callable[[Pipelined], None],
) -> None:
    """Answer the same pictures both ways, in turn.

    Args:
        pipeline: opened with one stream, warm.
        inputs: the pictures, taken again from the start where there are too few.
        batch: pictures in one run of the chain.
        images: altogether, or as many of them as fit; None: as many as fit.
        chain_ms: of one run of the chain, to tell what fits.
        deadline: looked at after each run.
        say: is told how far it is.
        keep: is given the rounds, whatever ends them, if one of them was whole.

    Raises:
        InputError: a picture cannot be read any more.
        TimeUp: the deadline has passed.
    """
    runs = int(deadline.seconds(_SECONDS) * 1e3 / (2 * chain_ms))  # of each way that fit
    if images is None:
        runs, wanted = min(runs, _ROUNDS * _MOST), min(_ROUNDS, runs // _LEAST)
        count = runs * batch
    else:
        count, wanted = images if math.isinf(deadline.left) else min(images, runs * batch), _ROUNDS
    if min(count, wanted) < 1:
        raise TimeUp
    rounds = max(min(wanted, count), math.ceil(count / max(_BLOCK, batch)))
    numbers = list(islice(cycle(range(len(inputs.files))), count))
    ends = [count * (number + 1) // rounds for number in range(rounds)]
    blocks = [numbers[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def from_files(numbers: Sequence[int]) -> None:
        for _, answer in pipeline.predict_iter((inputs.files[n] for n in numbers), batch=batch):
            if isinstance(answer, InputError):
                raise answer
            deadline.check()

    def from_frames(numbers: Sequence[int]) -> None:
        for first in range(0, len(numbers), batch):
            pipeline.run(inputs.frames[numbers[first : first + batch]])
            deadline.check()

    ways = {"files": from_files, "frames": from_frames}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    watch, orders = Watch(), shuffled(list(ways), apart=False)
    try:
        for number, block in enumerate(blocks, 1):
            for way in next(orders):
                start = time.perf_counter()
                ways[way](block)
                taken[way].append(time.perf_counter() - start)
            say(f"round {number} of {rounds}")
    finally:
        if whole := min(map(len, taken.values())):
            sizes = tuple(map(len, blocks[:whole]))
            files, frames = (tuple(taken[way][:whole]) for way in ("files", "frames"))
            noise = watch.stop("compute alone", [1e3 * s / size for s, size in zip(frames, sizes, strict=True)])
            answered = sum(sizes)
            keep(Pipelined(answered, min(answered, len(inputs.files)), sizes, files, frames, noise))
