"""Time contenders in turn, so that what disturbs one disturbs the others: pairs are compared, not runs apart."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import TypeVar

from mge_runtime.bench.contender import Contender
from mge_runtime.bench.deadline import UNBOUNDED, Deadline

__all__ = ["Plan", "Series", "Stepped", "interleave", "plan_rounds", "shuffled", "timed", "warm_up"]

_T = TypeVar("_T")

_STEADY = 0.05  # relative: a contender is warm when its last two runs beat the ones before by no more than this
_LEAST_WARM_UP, _MOST_WARM_UP = 4, 20  # runs of each contender
_WARM_UP_SECONDS, _WARM_UP_SHARE = 20.0, 0.25  # for all contenders together, and of the time that is left
_ENOUGH_ROUNDS, _MOST_ROUNDS = 6, 100  # fewer than six have no 95 % interval
_BLOCK_SECONDS = 0.02  # of the quickest contender: below, one run says more of the clock than of the work
_MOST_RUNS = 10  # in a block
_SHOWN = 5.0  # seconds between two lines of progress


class Stepped:
    """A contender that knows the steps of its last run; `Contender` asks for no more than `run`."""

    steps_ms: dict[str, float]


@dataclass
class Series:
    """The times of one contender."""

    contender: Contender
    rounds: list[list[float]] = field(default_factory=list["list[float]"])  # milliseconds of each run, by round
    steps: list[list[dict[str, float]]] = field(default_factory=list["list[dict[str, float]]"])  # the same, by step

    @property
    def times_ms(self) -> list[float]:
        """Of all runs."""
        return [ms for block in self.rounds for ms in block]

    @property
    def medians(self) -> list[float]:
        """The median of each round, ms."""
        return [median(block) for block in self.rounds]

    def step_medians(self, step: str) -> list[float]:
        """The median of a step in each round, ms."""
        return [median(steps.get(step, 0.0) for steps in block) for block in self.steps]


@dataclass(frozen=True)
class Plan:
    """How often what runs."""

    rounds: int
    runs: int  # of each contender in a round, one after the other; before several, one is not counted


def warm_up(
    contenders: Sequence[Contender], runs: int | None, deadline: Deadline = UNBOUNDED
) -> tuple[int, dict[str, float]]:
    """Run all contenders in turn until none of them gets faster any more.

    Args:
        contenders: opened.
        runs: of each; None: until they are steady, or 20 s are over.
        deadline: at most a quarter of the time is spent, but each runs once.

    Returns:
        How many runs each had, and the quickest of its last three in milliseconds, by name.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    most = _WARM_UP_SECONDS if runs is None else math.inf
    deadline = Deadline.after(min(most, _WARM_UP_SHARE * deadline.left))
    count = 0
    while count < (_MOST_WARM_UP if runs is None else max(runs, 1)):
        for contender in contenders:
            times[contender.name].append(timed(contender))
        count += 1
        judged = runs is None and count >= _LEAST_WARM_UP
        steady = judged and all(min(ms[-2:]) >= min(ms[:-2]) * (1 - _STEADY) for ms in times.values())
        if steady or deadline.left <= 0:
            break
    return count, {name: min(ms[-3:]) for name, ms in times.items()}


def plan_rounds(estimates_ms: Sequence[float], iterations: int | None, seconds: float, probes_ms: float = 0.0) -> Plan:
    """How many rounds fit.

    Args:
        estimates_ms: of one run of each contender.
        iterations: at least so many of each, whatever time they take; None: as many as fit.
        seconds: to spend; infinite with a number of iterations.
        probes_ms: of what runs once in every round beside them.
    """
    runs = min(_MOST_RUNS, max(1, math.ceil(_BLOCK_SECONDS * 1e3 / min(estimates_ms))))
    if not math.isinf(seconds):  # enough rounds go before runs in a round
        runs = max(1, min(runs, int(seconds * 1e3 / sum(estimates_ms)) // _ENOUGH_ROUNDS - 1))
    if iterations is not None:
        runs = max(1, min(runs, iterations // _ENOUGH_ROUNDS))
        return Plan(math.ceil(iterations / runs), runs)
    round_ms = sum(estimates_ms) * (runs + (runs > 1)) + probes_ms
    return Plan(min(_MOST_ROUNDS, max(1, int(seconds * 1e3 / round_ms))), runs)


def interleave(
    contenders: Sequence[Contender],
    plan: Plan,
    say: Callable[[str], None] = lambda _line: None,
    clock: Callable[[], float] = time.perf_counter,
    probes: Sequence[Contender] = (),
    deadline: Deadline = UNBOUNDED,
    series: dict[str, Series] | None = None,
) -> dict[str, Series]:
    """Run all contenders in every round, in an order that is drawn anew each time (`shuffled`).

    Args:
        contenders: warm.
        plan: how often.
        say: is told how far it is, every few seconds.
        clock: seconds; `time.process_time` leaves out what others do, and waiting, and adds up threads.
        probes: run once in each round, in a place that is drawn as the contenders' are.
        deadline: when to stop, looked at between two blocks.
        series: where to put the times, for whoever wants them however the rounds end.

    Returns:
        The times by the contenders' names, of whole rounds alone.

    Raises:
        TimeUp: the deadline has passed.
    """
    runs = {contender.name: plan.runs for contender in contenders} | {probe.name: 1 for probe in probes}
    series = {} if series is None else series
    series |= {contender.name: Series(contender) for contender in (*contenders, *probes)}
    shown = time.perf_counter()
    gc.collect()
    gc.freeze()  # what is there already (PyTorch has half a million objects) is not looked through again
    try:
        for number, order in enumerate(islice(shuffled([*contenders, *probes]), plan.rounds)):
            gc.collect()
            for contender in order:
                deadline.check()
                _block(contender, runs[contender.name], series[contender.name], clock)
            if time.perf_counter() - shown > _SHOWN:
                shown = time.perf_counter()
                say(f"round {number + 1} of {plan.rounds}")
    finally:
        gc.unfreeze()
        whole = min(len(found.rounds) for found in series.values())
        for found in series.values():
            del found.rounds[whole:], found.steps[whole:]
    return series


def shuffled(items: Sequence[_T], seed: int = 2019, *, apart: bool = True) -> Iterator[list[_T]]:
    """Orders without end, drawn with a seed.

    What ran last has left the caches to itself: it must not follow itself more often than others follow it. Kept apart,
    none therefore begins with what the one before ended with, and two items keep their order for good: each always
    follows the other. Where a round takes seconds, or a process of its own, caches do not matter, and a drift of the
    machine's speed does: there the order is free, and of two items now one is first, now the other.

    Args:
        items: what runs in turn.
        seed: of the draws.
        apart: whether nothing may follow itself.
    """
    draws = random.Random(seed)
    last: list[_T] = []
    while True:
        order = list(items)
        draws.shuffle(order)
        while apart and last and len(order) > 1 and order[0] is last[-1]:
            draws.shuffle(order)
        last = order
        yield list(order)


def _block(contender: Contender, runs: int, series: Series, clock: Callable[[], float]) -> None:
    """One contender's part of a round."""
    if runs > 1:
        contender.run()  # the caches hold what the contender before left there
    times: list[float] = []
    steps: list[dict[str, float]] = []
    for _ in range(runs):
        times.append(timed(contender, clock))
        if isinstance(contender, Stepped):
            steps.append(dict(contender.steps_ms))
    series.rounds.append(times)
    series.steps.append(steps)


def timed(contender: Contender, clock: Callable[[], float] = time.perf_counter) -> float:
    """The milliseconds of one run."""
    start = clock()
    contender.run()
    return (clock() - start) * 1e3
