"""Time several ways of doing the same work side by side, and compare them round by round.

What disturbs one way disturbs the others: a ratio is that of two medians of the same round, and what is reported is the
median of these ratios with its 95 % interval.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from scipy.stats import bootstrap

_BLOCK_MS = 20.0  # of the quickest way: below, one run says more of the clock than of the work
_MOST_RUNS = 10  # in a round
_WARM_UP, _WARM_UP_MS = 3, 1000.0  # runs of each way at most, and milliseconds after which no other is begun
_FEWEST_FOR_INTERVAL = 6  # of fewer values even the whole range holds the median with less than 95 %


@dataclass(frozen=True)
class Ratio:
    """A median ratio over rounds."""

    median: float
    low: float  # ends of the 95 % interval, or the least and the most round where there are too few for one
    high: float
    rounds: int

    def __str__(self) -> str:
        what = "95 %" if self.rounds >= _FEWEST_FOR_INTERVAL else "all rounds"
        return f"{self.median:.3f} ({what} {self.low:.3f} to {self.high:.3f}, {self.rounds} rounds)"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The median of the ratios within each round; its interval is a percentile bootstrap over rounds (Efron 1979).

    Rounds count as independent; a drift that is slower than a round makes the interval too narrow.
    """
    values = np.asarray(above, np.float64) / np.asarray(below, np.float64)
    low, high = values.min(), values.max()
    if len(values) >= _FEWEST_FOR_INTERVAL and low < high:
        found = bootstrap((values,), np.median, method="percentile", rng=np.random.default_rng(0))
        low, high = found.confidence_interval
    return Ratio(float(np.median(values)), float(low), float(high), len(values))


def time_rounds(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 2019,
) -> dict[str, list[float]]:
    """Run every way in every round.

    The order is drawn anew for each round; none follows itself, since it would find the caches as it left them. A way
    that takes less than 20 ms runs several times in a round, after one run that does not count.

    Args:
        ways: by name; each does the whole work once and comes back when it is done.
        rounds: how many count, after up to three runs of each way that do not.
        clock: seconds; `time.process_time` leaves out what others do, and waiting, and adds up threads.
        seed: of the orders.

    Returns:
        The median of each round by name, milliseconds.
    """

    def timed(way: Callable[[], object]) -> float:
        start = clock()
        way()
        return (clock() - start) * 1e3

    def warm_up(way: Callable[[], object]) -> float:
        times = [timed(way)]
        while len(times) < _WARM_UP and sum(times) < _WARM_UP_MS:
            times.append(timed(way))
        return min(times)

    quickest = min(map(warm_up, ways.values()))
    runs = min(_MOST_RUNS, max(1, math.ceil(_BLOCK_MS / max(quickest, 1e-3))))
    names, draws = list(ways), Random(seed)
    taken: dict[str, list[float]] = {name: [] for name in names}
    last = None
    gc.collect()
    gc.freeze()  # what is there already (PyTorch has half a million objects) is not looked through again
    try:
        for _ in range(rounds):
            draws.shuffle(names)
            while len(names) > 1 and names[0] == last:
                draws.shuffle(names)
            last = names[-1]
            gc.collect()
            for name in names:
                if runs > 1:
                    ways[name]()
                taken[name].append(float(np.median([timed(ways[name]) for _ in range(runs)])))
    finally:
        gc.unfreeze()
    return taken
