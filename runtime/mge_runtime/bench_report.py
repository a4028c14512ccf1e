"""The report of `mge-bench`: text for a terminal, Markdown for an issue, JSON with every number."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.files import format_bytes
from mge_runtime.machine import Machine, cpu_count, describe_machine

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.fields import JsonValue
    from mge_runtime.pipeline import Pipeline

__all__ = ["BatchTimes", "BenchReport"]

_PERCENTILES = {"p50_ms": (50, 1), "p90_ms": (90, 10), "p99_ms": (99, 100)}  # and the fewest runs that have one


@dataclass
class BatchTimes:
    """What was timed with one batch size."""

    batch: int
    warm_up: int = 0  # runs before, which do not count
    # Milliseconds for a batch, by name, of each run; "chain/expert_1" is a part of "chain".
    runs_ms: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    def rows(self) -> Iterator[dict[str, Any]]:
        """By name: percentiles (None where there are too few runs for one), images a second at the median, all runs."""
        for name in self.runs_ms[0]:
            times = [run[name] for run in self.runs_ms]
            row: dict[str, Any] = {"name": name}
            for key, (percent, fewest) in _PERCENTILES.items():
                row[key] = float(np.percentile(times, percent)) if len(times) >= fewest else None
            rate = self.batch / row["p50_ms"] * 1e3 if row["p50_ms"] else None
            yield {**row, "images_per_s": rate, "runs_ms": times}


@dataclass
class BenchReport:
    """One run of `mge-bench`; measurements are added as they end."""

    mge: str  # version
    date: str  # UTC
    bundle: dict[str, Any]  # which model was measured
    backend: str
    device: str
    threads: int | None  # on the CPU; None on a device
    images: str  # what was measured with
    cpu: str
    machine: Machine
    batches: list[BatchTimes] = field(default_factory=list[BatchTimes])
    start_up_s: list[float] = field(default_factory=list[float])  # of fresh processes, to their first prediction
    peak_bytes: list[int] = field(default_factory=list[int])  # most that was resident in each; empty: unknown
    # What the executor says of memory and graphs; empty on a CPU.
    memory: Mapping[str, JsonValue] = field(default_factory=dict[str, "JsonValue"])
    not_run: dict[str, str] = field(default_factory=dict[str, str])  # why, by name
    interrupted: str | None = None  # what was being measured when it was stopped; None: it came to its end

    @classmethod
    def of(cls, bundle: Bundle, pipeline: Pipeline, threads: int | None, images: str) -> BenchReport:
        """A report without measurements.

        Args:
            bundle: what is measured.
            pipeline: opened on it.
            threads: as the pipeline was opened with.
            images: what is measured with, for people.
        """
        manifest, choice = bundle.manifest, pipeline.choice
        kinds = sorted({str(plan.get("type", "unknown")) for plan in manifest.precision.values()})
        model = f"{manifest.model.get('arch', 'unknown')}, {len(manifest.views)} experts"
        facts = {
            "name": bundle.path.name,
            "manifest_sha256": bundle.manifest_sha256,
            "model": f"{model}, {manifest.preprocess.size} px, {len(manifest.class_names)} classes",
            "precision": " and ".join(kinds),
            "bytes": bundle.path.stat().st_size,
            "calibrated": bundle.calibration() is not None,
        }
        return cls(
            mge=importlib.metadata.version("mge"),
            date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
            bundle=facts,
            backend=choice.backend,
            device=choice.device,
            threads=(threads or cpu_count()) if choice.device == "cpu" else None,
            images=images,
            cpu=_cpu_model(),
            machine=describe_machine(always=True),
        )

    @property
    def failed(self) -> bool:
        """Whether nothing was measured."""
        return not self.batches

    def to_json(self) -> str:
        """All of it, for scripts; docs/performance.md says what each name means."""
        batches = [
            {"batch": times.batch, "warm_up": times.warm_up, "runs": len(times.runs_ms), "rows": list(times.rows())}
            for times in self.batches
        ]
        values = {**vars(self), "batches": batches, "machine": asdict(self.machine)}
        return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_text(self) -> str:
        """For a terminal."""
        return "\n".join([*self._facts(), *self._tables(), ""])

    def to_markdown(self) -> str:
        """For an issue."""
        title = f"### mge-bench: {self.bundle['model']}, {self.backend} on {self.device}"
        return f"{title}\n\n```text\n{self.to_text()}```\n"

    def _facts(self) -> Iterator[str]:
        bundle = self.bundle
        threads = "" if self.threads is None else f", {self.threads} threads"
        exits = "; the bundle is calibrated, exits are not taken" if bundle["calibrated"] else ""
        if self.interrupted is not None:
            yield f"PARTIAL  it was interrupted during {self.interrupted}; what was measured before is here"
        yield f"date     {self.date}, mge {self.mge}"
        yield f"bundle   {bundle['name']}, manifest {bundle['manifest_sha256']}, {bundle['precision']}"
        yield f"model    {bundle['model']}"
        yield f"ran      {self.backend} on {self.device}{threads}; the whole chain (exit never){exits}"
        yield f"images   {self.images}"
        yield f"machine  {self.cpu}, {cpu_count()} processors for this process; {self.machine.summary}"

    def _tables(self) -> Iterator[str]:
        for times in self.batches:
            title = f"batch {times.batch}, {len(times.runs_ms)} runs"
            yield f"\n{title:<26}  p50 ms   p90 ms   p99 ms images/s"
            for row in times.rows():
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


def _cpu_model() -> str:
    """As the system calls the processor."""
    with suppress(OSError):  # not on Linux
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()
