"""Accuracy against cost, of single networks and of chains that stop after any expert: a table and a plot.

    python -m benchmarks.frontier runs/chain-s0 runs/chain-s1 single.npz --data groceries --out frontier

A run is a folder with `best.pt`, which `mge-eval` evaluates first (its predictions stay in OUT), or what `mge-eval
--predictions` wrote; OUT is for one --data. Runs that are called the same but for `-s0`, `-s1`, ... are seeds of one:
an image counts with the share of seeds that got it right. Intervals are 95 %, a bootstrap over images; GMACs are of one
image.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from mge.cli.evaluate import main as evaluate
from mge.evaluation import Predictions, read_predictions, top_k_correct
from mge_runtime.cli.common import reports_errors
from mge_runtime.errors import InputError
from mge_runtime.metrics import Interval, mean_interval

MARKS = (0.2, 0.5, 1, 2, 5, 20)  # GMACs, of the second table
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito (2008)


@dataclass(frozen=True)
class Point:
    """One output of one model."""

    run: str
    output: str  # "expert 1", "average 1-2", "mixture", ...
    chain: bool  # of several experts
    gmacs: float
    right: np.ndarray  # [N], share of seeds that got each image right
    seeds: list[float]  # top-1 of each, %

    @cached_property
    def top1(self) -> Interval:
        """In %, over images."""
        return mean_interval(100 * self.right)

    def __str__(self) -> str:
        return f"{self.top1.value:.1f} [{self.top1.low:.1f}, {self.top1.high:.1f}]"


def points(run: str, seeds: list[Predictions]) -> list[Point]:
    """What a chain gives where it stops after each expert, at its end, and with exits; or a single network."""
    made: dict[str, list[tuple[float, np.ndarray]]] = {}
    for found in seeds:
        assert found.cost is not None
        for name, logits in found.heads.items():
            if re.fullmatch("expert 1|average.*|mixture", name):
                gmacs = found.cost.gmacs[found.cost.place(name)]
                made.setdefault(name, []).append((gmacs, top_k_correct(logits, found.labels)))
        if found.exits is not None:
            mean = float(np.array(found.cost.gmacs)[found.exits.used - 1].mean())
            made.setdefault("with exits", []).append((mean, top_k_correct(found.exits.logits, found.labels)))
    chain, result = seeds[0].gate.shape[1] > 1, list[Point]()
    for name, of_seeds in made.items():
        gmacs, right = zip(*of_seeds, strict=True)
        output, tops = name if chain else "single network", [100 * float(one.mean()) for one in right]
        result.append(Point(run, output, chain, float(np.mean(gmacs)), np.mean(right, axis=0), tops))
    return sorted(result, key=lambda point: point.gmacs)


def table(found: list[Point]) -> Iterator[str]:
    """Every point by its cost; below, the most accurate of both kinds at or below each mark."""
    yield "| GMACs | run | output | top-1 % [95 %] | seeds |\n|---|---|---|---|---|"
    for point in sorted(found, key=lambda point: point.gmacs):
        seeds = " ".join(f"{value:.1f}" for value in point.seeds)
        yield f"| {point.gmacs:.3g} | {point.run} | {point.output} | {point} | {seeds} |"
    yield "\n| GMACs, at most | single network | chain | chain - single, points [95 %] |\n|---|---|---|---|"
    for mark in MARKS:
        kinds = [[p for p in found if p.gmacs <= mark and p.chain is chain] for chain in (False, True)]
        best = [max(kind, key=lambda point: point.right.mean(), default=None) for kind in kinds]
        cells = ["-" if point is None else f"{point.run}, {point.output}: {point}" for point in best]
        change = "-"
        if best[0] and best[1]:
            gain = mean_interval(100 * (best[1].right - best[0].right))
            change = f"{gain.value:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"
        yield f"| {mark:g} | {cells[0]} | {cells[1]} | {change} |"
    yield "\nThe most accurate were chosen on these images."


def plot(found: list[Point], path: Path) -> None:
    """Lines join what one chain gives; light points are seeds."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(dict.fromkeys(point.run for point in found)):
        own, color = [p for p in found if p.run == run], _COLORS[number % len(_COLORS)]
        x, y = np.array([p.gmacs for p in own]), np.array([p.top1.value for p in own])
        ends = np.abs([[p.top1.low for p in own] - y, [p.top1.high for p in own] - y])
        axes.errorbar(x, y, ends, fmt="o-" if own[0].chain else "s", color=color, capsize=3, label=run)
        for p in own:
            axes.plot([0.98 * p.gmacs] * len(p.seeds), p.seeds, ".", color=color, alpha=0.5)  # beside the interval
    axes.set(xscale="log", xlabel="GMACs of one image", ylabel="top-1 %")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.25)
    axes.legend(title="squares: single networks", fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path), help="Images, as for mge-eval.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of frontier.md and frontier.png.")
@reports_errors
def main(runs: tuple[Path, ...], data: Path | None, out: Path) -> None:
    """Evaluate what is no file yet, then draw."""
    out.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Predictions]] = {}
    same: list[tuple[str, str]] = []  # images and their classes
    files = [out / f"{run.name}.npz" if run.is_dir() else run for run in runs]
    if len(set(files)) < len(files):
        raise InputError(f"two of the runs are called alike: {' '.join(map(str, runs))}; expected names that differ")
    for run, file in zip(runs, files, strict=True):
        model = run / "best.pt"
        if run.is_dir() and not (file.exists() and file.stat().st_mtime > model.stat().st_mtime):
            given = ["--ckpt", model, "--data", data or ".", "--predictions", file]
            evaluate(list(map(str, given)), standalone_mode=False)
        found, images = read_predictions(file)
        of = list(zip(images, found.truth, strict=True))
        same = same or of
        if of != same or found.cost is None:
            raise InputError(f"{file} is of other images than {runs[0]}, or has no cost; evaluate both anew")
        groups.setdefault(re.sub(r"-s\d+$", "", file.stem), []).append(found)
    made = [point for name, seeds in groups.items() for point in points(name, seeds)]
    text = "\n".join(table(made)) + "\n"
    (out / "frontier.md").write_text(text, encoding="utf-8")
    plot(made, out / "frontier.png")
    click.echo(text, nl=False)


if __name__ == "__main__":
    sys.exit(main())
