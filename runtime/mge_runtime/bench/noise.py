"""How quiet the machine was: what else ran on its processors, and how far the times of one contender were apart."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mge_runtime.bench.stats import percentile
from mge_runtime.fields import JsonValue
from mge_runtime.machine import cpu_count

__all__ = ["Cpu", "Noise", "Watch", "describe_cpu"]

_STAT, _LOAD, _INFO = Path("/proc/stat"), Path("/proc/loadavg"), Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_MOST_SPREAD = 0.15  # of the reference's rounds, (p90 - p10) / median
_MOST_OTHERS = 0.10  # of the processors this process may use, taken by others
_MOST_STEAL = 0.02  # of all processors, taken by other machines of the host


@dataclass(frozen=True)
class Cpu:
    """The processor, as far as the system tells; empty where it does not."""

    model: str
    architecture: str
    processors: int  # that this process may use
    governor: str
    mhz: float | None


def describe_cpu() -> Cpu:
    """This machine's."""
    fields: dict[str, str] = {}
    for line in _read(_INFO).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    model = fields.get("model name") or fields.get("Model") or platform.processor()
    try:
        mhz = float(fields["cpu MHz"])
    except (KeyError, ValueError):
        mhz = None
    return Cpu(model, platform.machine(), cpu_count(), _read(_GOVERNOR).strip(), mhz)


@dataclass(frozen=True)
class Noise:
    """What may have disturbed a measurement."""

    reference: str  # the contender whose rounds were compared with each other
    spread: float  # of its rounds: (p90 - p10) / median
    load: str  # one minute's load average, before and after
    others: float | None  # processors, of those this process may use, that others kept busy on average
    steal: float | None  # share of their time that the hypervisor gave to other machines
    warning: str | None  # why the figures are not to be trusted; None where nothing says so

    def to_dict(self) -> dict[str, JsonValue]:
        """Plain values."""
        return dict(vars(self))


class Watch:
    """Looks at the machine from its making to `stop`."""

    def __init__(self) -> None:
        self._load = _load()
        self._start = _now()

    def stop(self, reference: str, rounds_ms: Sequence[float]) -> Noise:
        """What happened meanwhile.

        Args:
            reference: a contender.
            rounds_ms: the medians of its rounds.
        """
        before, after = self._start, _now()
        spread = (percentile(rounds_ms, 90) - percentile(rounds_ms, 10)) / percentile(rounds_ms, 50)
        others = steal = None
        if before.total is not None and after.total is not None and after.total > before.total:
            wall = after.wall - before.wall
            ticks = os.sysconf("SC_CLK_TCK")
            others = max(0.0, ((after.busy - before.busy) / ticks - (after.own - before.own)) / wall)
            steal = (after.steal - before.steal) / (after.total - before.total)
        reasons: list[str] = []
        if spread > _MOST_SPREAD:
            reasons.append(f"the rounds of {reference!r} lie {spread:.0%} apart")
        if others is not None and others > _MOST_OTHERS * cpu_count():
            reasons.append(f"other processes kept {others:.1f} processors busy")
        if steal is not None and steal > _MOST_STEAL:
            reasons.append(f"the hypervisor took {steal:.0%} of the time")
        warning = f"too noisy to trust: {', '.join(reasons)}" if reasons else None
        return Noise(reference, spread, f"{self._load} -> {_load()}", others, steal, warning)


@dataclass(frozen=True)
class _Moment:
    wall: float  # seconds
    own: float  # processor seconds of this process and of its children that have ended
    busy: int = 0  # ticks of the processors that this process may use, since the machine started
    steal: int = 0
    total: int | None = None  # None where the system does not tell


def _now() -> _Moment:
    times = os.times()
    wall, own = time.perf_counter(), times.user + times.system + times.children_user + times.children_system
    here = _processors()
    ticks = [0] * 8
    found = 0
    for line in _read(_STAT).splitlines():
        name, *counts = line.split()[:9]
        if name[:3] == "cpu" and name[3:].isdecimal() and (here is None or int(name[3:]) in here) and len(counts) == 8:
            found += 1
            ticks = [total + int(count) for total, count in zip(ticks, counts, strict=True)]
    if not found:
        return _Moment(wall, own)
    user, nice, system, idle, waiting, irq, softirq, steal = ticks  # guests are part of user and nice
    busy = user + nice + system + irq + softirq
    return _Moment(wall, own, busy, steal, busy + idle + waiting + steal)


def _processors() -> set[int] | None:
    """Numbers of those that this process may use; None: any."""
    try:
        return set(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return None


def _load() -> str:
    return (_read(_LOAD).split() or ["unknown"])[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
