"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from mge_runtime.bench.fresh import BUNDLE, PLAIN, Fresh
from mge_runtime.bench.noise import Noise
from mge_runtime.bench.results import BatchResult, Results
from mge_runtime.bench.stats import FEWEST_FOR_P99, Ratio
from mge_runtime.bench.tables import Table
from mge_runtime.files import format_bytes

__all__ = ["report_tables"]

_RATIO = ("", "median", "95 % from", "to", "rounds")


def report_tables(found: Results) -> Iterator[Table]:
    """Every table, in the order of the report."""
    for batch in found.batches:
        yield from _batch(batch)
    if (pipelined := found.pipelined) is not None:
        ways = (("JPEG to answer", pipelined.files_s), ("compute alone", pipelined.frames_s))
        times = {name: pipelined.image_ms(seconds) for name, seconds in ways}
        rows = [[name, f"{min(ms):.2f}", f"{median(ms):.2f}", str(len(ms))] for name, ms in times.items()]
        notes = [
            _line(pipelined.ratio),
            f"{pipelined.images} images each way, {pipelined.distinct} of them distinct; ratio over all "
            f"together {pipelined.total_ratio:.3f}; one stream",
            *_noise(pipelined.noise),
        ]
        title = "Many images, the next ones decoded meanwhile, ms an image"
        yield Table(title, ("", "least", "median", "rounds"), rows, notes)
    if found.fresh is not None:
        yield _fresh(found, found.fresh)
    if (energy := found.energy) is not None:
        line = (
            f"{energy.joules_per_image:.3f} J an image ({energy.meter}, {energy.images} images, {energy.seconds:.1f} s)"
        )
        yield Table("Energy of everything that the counter counts", (), (), [line])
    if found.not_run:
        rows = [[item.name, item.reason, item.command or ""] for item in found.not_run]
        yield Table("Not run", (), (), [": ".join(filter(None, row[:2])) + _command(row[2]) for row in rows])


def _batch(found: BatchResult) -> Iterator[Table]:
    rows = [
        [row.name, *(_ms(value) for value in (row.times.p50, row.times.p90, row.times.p99)), f"{row.images_per_s:.2f}"]
        for row in found.rows
    ]
    count = found.rounds * found.runs
    notes = [f"{count} runs of each in {found.rounds} interleaved rounds, after {found.warm_up} to warm up"]
    if count < FEWEST_FOR_P99:
        notes.append(f"p99 needs {FEWEST_FOR_P99} runs: --iterations {FEWEST_FOR_P99}")
    notes.append(found.copies)
    if found.pytorch_threads:
        counts = sorted(set(found.pytorch_threads.values()))
        notes.append(f"PyTorch computes with {' or '.join(map(str, counts))} threads")
    yield Table(f"Batch {found.batch}, ms", ("", "p50", "p90", "p99", "images/s"), rows, notes)
    ratios = [[r.name, f"{r.median:.3f}", *_ends(r, ".3f"), str(len(r.rounds))] for r in found.ratios]
    yield Table(f"Batch {found.batch}, ratios within a round", _RATIO, ratios, list(_noise(found.noise)))
    steps = [
        [
            step.name,
            *("-" if ms is None else f"{ms:.3f}" for ms in (step.times.p50, step.times.p90, step.times.p99)),
            f"{step.share:.1%}",
        ]
        for step in found.steps
    ]
    yield Table(f"Batch {found.batch}, the chain step by step, ms", ("", "p50", "p90", "p99", "share"), steps)
    notes = [f"{item.name}: {item.reason}{_command(item.command)}" for item in found.not_run]
    if found.growth is not None:
        notes.append(
            f"host memory grew by {found.growth / 1e6:+.2f} MB over the rounds (the process's own, all contenders)"
        )
    if notes:
        yield Table(f"Batch {found.batch}, beside that", (), (), notes)


def _noise(noise: Noise) -> Iterator[str]:
    others = "unknown" if noise.others is None else f"{noise.others:.2f} processors"
    steal = "" if noise.steal is None else f", {noise.steal:.1%} taken by the hypervisor"
    yield (
        f"noise: rounds of {noise.reference!r} {noise.spread:.1%} apart (p10 to p90), load {noise.load}, "
        f"others took {others}{steal}"
    )


def _fresh(found: Results, fresh: Fresh) -> Table:
    rows: list[list[str]] = []
    for name, starts in ((BUNDLE, fresh.bundle), (PLAIN, fresh.files)):
        if starts:
            seconds = [start.seconds for start in starts]
            peaks = [start.peak for start in starts if start.peak is not None]
            peak = format_bytes(max(peaks)) if peaks else "unknown"
            rows.append([name, f"{median(seconds):.3f}", f"{min(seconds):.3f}", peak, str(len(seconds))])
    notes: list[str] = []
    ratio, whole = fresh.ratio, fresh.ratio_of_medians
    if ratio is not None and whole is not None:
        notes.append(f"{ratio.name}: ratio of the medians {whole:.3f}; round by round: {_numbers(ratio)}")
    notes += _noise(fresh.noise)
    notes.append(f"weights: {format_bytes(found.memory.weights_stored)}")
    devices = [start.device for start in fresh.bundle if start.device is not None]
    if devices:
        notes.append(f"device memory in use, by all processes: {format_bytes(max(devices))}")
    report = fresh.bundle[0].report or {}
    notes += [f"device: {key} {value}" for key, value in report.items() if key.endswith("_bytes")]
    title = "A fresh process, from its start to the first answer (batch 1), s"
    return Table(title, ("", "median", "least", "peak memory", "rounds"), rows, notes)


def _line(ratio: Ratio) -> str:
    return f"{ratio.name}: {_numbers(ratio)}"


def _numbers(ratio: Ratio) -> str:
    if ratio.interval is None:
        least, most = min(ratio.rounds), max(ratio.rounds)
        return f"median {ratio.median:.3f}, rounds from {least:.3f} to {most:.3f} (too few for a 95 % interval)"
    low, high = ratio.interval
    return f"median {ratio.median:.3f}, 95 % interval {low:.3f} to {high:.3f}"


def _ends(ratio: Ratio, form: str) -> list[str]:
    """The ends of a median's 95 % interval."""
    return ["-", "-"] if ratio.interval is None else [format(end, form) for end in ratio.interval]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _command(command: str | None) -> str:
    return f" ({command})" if command else ""
