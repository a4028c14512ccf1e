"""Time contenders in turn, so that what disturbs one disturbs the others: pairs are compared, not runs apart."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from mge_runtime.bench.contender import Contender

__all__ = ["Plan", "Series", "Stepped", "interleave", "plan_rounds", "warm_up"]

_STEADY = 0.05  # spread of three runs in a row, relative, from which on a contender counts as warm
_MOST_WARM_UP = 20  # runs of each contender
_WARM_UP_SECONDS = 20.0  # for all contenders together; each gets three runs all the same
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 100
_BLOCK_SECONDS = 0.02  # of the quickest contender: below, one run says more of the clock than of the work
_MOST_RUNS = 10  # in a block


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


def warm_up(contenders: Sequence[Contender], runs: int | None) -> tuple[int, dict[str, float]]:
    """Run all contenders in turn until each is steady.

    Args:
        contenders: opened.
        runs: of each; None: until three in a row are within 5 % of each other, or time is up.

    Returns:
        How many runs each had, and the milliseconds of the last, or a quick one of the last three, by name.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    start = time.perf_counter()
    count = 0
    while count < (_MOST_WARM_UP if runs is None else max(runs, 1)):
        for contender in contenders:
            times[contender.name].append(timed(contender))
        count += 1
        if runs is None and count >= 3:
            steady = all(max(last := ms[-3:]) <= min(last) * (1 + _STEADY) for ms in times.values())
            if steady or time.perf_counter() - start > _WARM_UP_SECONDS:
                break
    return count, {name: min(ms[-3:]) for name, ms in times.items()}


def plan_rounds(estimates_ms: Sequence[float], iterations: int | None, seconds: float) -> Plan:
    """How many rounds fit.

    Args:
        estimates_ms: of one run of each contender.
        iterations: at least so many of each, whatever time they take; None: as many as fit.
        seconds: to spend.
    """
    runs = min(_MOST_RUNS, max(1, math.ceil(_BLOCK_SECONDS * 1e3 / min(estimates_ms))))
    if iterations is not None:
        runs = max(1, min(runs, iterations // _LEAST_ROUNDS))
        return Plan(math.ceil(iterations / runs), runs)
    round_ms = sum(estimates_ms) * (runs + (runs > 1))
    return Plan(min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(seconds * 1e3 / round_ms))), runs)


def interleave(
    contenders: Sequence[Contender], plan: Plan, say: Callable[[str], None] = lambda _line: None
) -> dict[str, Series]:
    """Run all contenders in every round, forwards and backwards in turn.

    Returns:
        The times by the contenders' names.
    """
    series = {contender.name: Series(contender) for contender in contenders}
    shown = time.perf_counter()
    for number in range(plan.rounds):
        gc.collect()
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            if plan.runs > 1:
                contender.run()  # the caches hold what the contender before left there
            block: list[float] = []
            steps: list[dict[str, float]] = []
            for _ in range(plan.runs):
                block.append(timed(contender))
                if isinstance(contender, Stepped):
                    steps.append(dict(contender.steps_ms))
            series[contender.name].rounds.append(block)
            series[contender.name].steps.append(steps)
        if time.perf_counter() - shown > 5:
            shown = time.perf_counter()
            say(f"round {number + 1} of {plan.rounds}")
    return series


def timed(contender: Contender) -> float:
    """The milliseconds of one run."""
    start = time.perf_counter()
    contender.run()
    return (time.perf_counter() - start) * 1e3
