"""What a bench found, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mge_runtime.bench.energy import Energy
from mge_runtime.bench.noise import Cpu, Noise
from mge_runtime.bench.stats import Percentiles, Ratio
from mge_runtime.fields import JsonValue
from mge_runtime.machine import Machine

if TYPE_CHECKING:
    from mge_runtime.bench.fresh import Fresh
    from mge_runtime.bench.pipelined import Pipelined

__all__ = ["BatchResult", "BundleFacts", "Memory", "NotRun", "Results", "Row", "Step"]


@dataclass(frozen=True)
class NotRun:
    """What was not measured here."""

    name: str
    reason: str
    command: str | None = None  # that would measure it


@dataclass(frozen=True)
class Row:
    """One contender, or a part of its runs that the executor tells apart."""

    name: str
    times: Percentiles  # milliseconds for a batch
    images_per_s: float  # at the median
    rounds_ms: tuple[tuple[float, ...], ...]  # every run, by round


@dataclass(frozen=True)
class Step:
    """One step of the chain, as its executor times it."""

    name: str
    ms: float  # median over the rounds, for a batch
    times: Percentiles  # milliseconds for a batch, of all runs
    share: float  # of the whole chain, median over the rounds


@dataclass(frozen=True)
class BatchResult:
    """Everything that was timed with one batch size."""

    batch: int
    warm_up: int  # runs of each contender before
    rounds: int
    runs: int  # of each contender in a round
    rows: tuple[Row, ...]
    steps: tuple[Step, ...]
    ratios: tuple[Ratio, ...]
    copies: str  # what is known of copies between host and device
    growth: int | None  # bytes of host memory from the first round to the last; None: unknown
    noise: Noise
    not_run: tuple[NotRun, ...]
    pytorch_threads: Mapping[str, int]  # on the CPU, as PyTorch says, by contender; empty without a checkpoint


@dataclass(frozen=True)
class Memory:
    """Beside a fresh process's peak."""

    weights_stored: int  # bytes of its weights files


@dataclass(frozen=True)
class BundleFacts:
    """Which model was measured."""

    name: str  # of the file
    manifest_sha256: str
    arch: str
    image_size: int
    classes: int
    experts: int
    precision: str
    targets: tuple[str, ...]
    calibrated: bool


@dataclass
class Results:
    """One run of `mge-bench`; its sections are added as they end."""

    mge: str  # version
    date: str  # UTC
    bundle: BundleFacts
    backend: str
    device: str
    library: str  # version of what computes
    threads: int | None  # on the CPU; None on a device
    images: str  # what was answered
    machine: Machine
    cpu: Cpu
    versions: Mapping[str, str]  # of the Python packages that take part
    memory: Memory
    batches: list[BatchResult] = field(default_factory=list[BatchResult])
    pipelined: Pipelined | None = None
    fresh: Fresh | None = None
    # What the executor says of memory and graphs; empty on a CPU.
    report: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    energy: Energy | None = None
    not_run: list[NotRun] = field(default_factory=list[NotRun])
    interrupted: str | None = None  # what was being measured when it was stopped; None: it came to its end
