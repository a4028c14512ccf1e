"""The reports of `mge-bench`, of a measurement and of a self-check: text, Markdown for an issue, JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from mge_runtime.files import format_bytes
from mge_runtime.machine import cpu_count, cpu_model

if TYPE_CHECKING:
    from mge_runtime.bench_subject import Subject
    from mge_runtime.fields import JsonValue


_PERCENTILES = {"p50_ms": (50, 1), "p90_ms": (90, 10), "p99_ms": (99, 100)}  # and the fewest runs that have one


class Report(ABC):
    """What was run, where and with which images; subclasses say what was found. It names no folder of the machine.

    Args:
        subject: what is run.
        images: what it is run with, for people.
    """

    def __init__(self, subject: Subject, images: str) -> None:
        manifest, on_cpu = subject.manifest, subject.device == "cpu"
        model = f"{manifest.model.get('arch', 'unknown')}, {len(manifest.views)} experts"
        self.bundle: dict[str, Any] = {
            "name": subject.path.name,
            "manifest_sha256": subject.manifest_sha256,
            "model": f"{model}, {manifest.preprocess.size} px, {len(manifest.class_names)} classes",
            "precision": subject.precision,
            "bytes": subject.path.stat().st_size,
            "calibrated": subject.calibrated,
            "engines": subject.targets,
        }
        self.mge = version("mge")
        self.date = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
        self.backend, self.device = subject.backend, subject.device
        self.threads = (subject.options["threads"] or cpu_count()) if on_cpu else None  # None on a device
        self.images = images
        self.cpu, self.machine = cpu_model(), subject.machine
        self.interrupted: str | None = None  # what ran when it was stopped; None: it came to its end

    @property
    @abstractmethod
    def failed(self) -> bool:
        """Whether the command fails."""

    @abstractmethod
    def lines(self) -> Iterable[str]:
        """What was found, for the text form."""

    def to_json(self) -> str:
        """All of it, for scripts."""
        return json.dumps(vars(self), default=_plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_text(self) -> str:
        """For a terminal."""
        return "\n".join([*self._facts(), *self.lines(), ""])

    def to_markdown(self) -> str:
        """For an issue."""
        return f"### mge-bench: {self.bundle['model']}\n\n```text\n{self.to_text()}```\n"

    def _facts(self) -> Iterator[str]:
        bundle = self.bundle
        threads = "" if self.threads is None else f", {self.threads} threads"
        exits = "; the bundle is calibrated, exits are not taken" if bundle["calibrated"] else ""
        if self.interrupted is not None:
            yield f"PARTIAL  it was interrupted during {self.interrupted}; what was found before is here"
        yield f"date     {self.date}, mge {self.mge}"
        yield f"bundle   {bundle['name']}, manifest {bundle['manifest_sha256']}, {bundle['precision']}"
        yield f"model    {bundle['model']}"
        yield f"engines  {', '.join(bundle['engines']) or 'none in the bundle'}"
        yield f"ran      {self.backend} on {self.device}{threads}; the whole chain (exit never){exits}"
        yield f"images   {self.images}"
        yield f"machine  {self.cpu}, {cpu_count()} processors for this process; {self.machine.summary}"


@dataclass
class BatchTimes:
    """What was timed with one batch size."""

    batch: int
    # Milliseconds for a batch, by name, of each run; "chain/expert_1" is a part of "chain".
    runs_ms: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    def to_dict(self) -> dict[str, Any]:
        """By name: percentiles (None where there are too few runs for one), images a second at the median, all runs."""
        rows: list[dict[str, Any]] = []
        for name in self.runs_ms[0]:
            times = [run[name] for run in self.runs_ms]
            row: dict[str, Any] = {"name": name}
            for key, (percent, fewest) in _PERCENTILES.items():
                row[key] = float(np.percentile(times, percent)) if len(times) >= fewest else None
            rate = self.batch / row["p50_ms"] * 1e3 if row["p50_ms"] else None
            rows.append({**row, "images_per_s": rate, "runs_ms": times})
        return {"batch": self.batch, "runs": len(self.runs_ms), "rows": rows}


class BenchReport(Report):
    """What a bundle takes; measurements are added as they end. docs/guide/measuring.md says what each name means."""

    def __init__(self, subject: Subject, images: str) -> None:
        super().__init__(subject, images)
        self.batches: list[BatchTimes] = []
        self.start_up_s: list[float] = []  # of fresh processes, to their first prediction
        self.peak_bytes: list[int] = []  # most that was resident in each; empty: unknown
        self.memory: Mapping[str, JsonValue] = {}  # the executor's memory and CUDA graphs; empty on a CPU
        self.not_run: dict[str, str] = {}  # why, by name

    @property
    def failed(self) -> bool:
        """Whether nothing was measured."""
        return not self.batches

    def lines(self) -> Iterator[str]:
        """A table for each batch size; start-up, memory, what was not measured."""
        for times in self.batches:
            title = f"batch {times.batch}, {len(times.runs_ms)} runs"
            yield f"\n{title:<26}  p50 ms   p90 ms   p99 ms images/s"
            for row in times.to_dict()["rows"]:
                parent, _, name = row["name"].rpartition("/")
                numbers = [row[key] for key in (*_PERCENTILES, "images_per_s")]
                cells = [f"{'-':>9}" if number is None else f"{number:9.2f}" for number in numbers]
                yield f"{'  ' if parent else ''}{name}".ljust(25) + "".join(cells)
        memory = {f"device: {name}": value for name, value in self.memory.items() if name.endswith("_bytes")}
        memory["bundle's file"] = self.bundle["bytes"]
        if self.start_up_s:
            starts = f"median of {len(self.start_up_s)} with a warm file cache, least {min(self.start_up_s):.2f} s"
            yield f"\nprocess start to first prediction  {median(self.start_up_s):.2f} s ({starts})"
            memory |= {"peak memory of such a process": max(self.peak_bytes)} if self.peak_bytes else {}
        yield ""
        yield from (f"{name:<33}  {format_bytes(value)}" for name, value in memory.items() if isinstance(value, int))
        yield from (f"not run: {name}: {reason}" for name, reason in self.not_run.items())


@dataclass(frozen=True)
class Result:
    """What one check found."""

    outcome: Literal["passed", "failed", "not run"]  # "not run" is neither passed nor failed
    found: str  # what failed, why it did not run, or what passed
    numbers: Mapping[str, JsonValue] = field(default_factory=dict[str, "JsonValue"])  # what was measured

    @classmethod
    def of(cls, failures: list[str], found: str, numbers: Mapping[str, JsonValue]) -> Result:
        """Passed if nothing failed."""
        return cls("failed" if failures else "passed", "; ".join(failures) or found, numbers)


class CheckReport(Report):
    """What a self-check found; results take their place as checks end."""

    def __init__(self, subject: Subject, images: str, checks: Iterable[str]) -> None:
        super().__init__(subject, images)
        self.checks = dict.fromkeys(checks, Result("not run", "interrupted"))

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(check.outcome == "failed" for check in self.checks.values())

    @property
    def verdict(self) -> str:
        """For example "6 passed, 0 failed, 2 not run"."""
        outcomes = [check.outcome for check in self.checks.values()]
        return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "not run"))

    def lines(self) -> Iterator[str]:
        """Every check in a few lines, the verdict."""
        for name, check in self.checks.items():
            mark = "FAILED" if check.outcome == "failed" else check.outcome
            yield f"\n{mark:<7}  {name}\n         {check.found}"
        yield f"\n{self.verdict}"


def _plain(value: object) -> dict[str, Any]:
    """What JSON has no form of."""
    return value.to_dict() if isinstance(value, BatchTimes) else asdict(cast("Any", value))
