"""The calibration as plain values, as text, and as two plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_calibration.calibrate import Learned
from mge_calibration.exits import ExitOutcome
from mge_calibration.quality import Interval, TemperatureOutcome
from mge_runtime.calibrated import Promise
from mge_runtime.fields import JsonValue
from mge_runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["as_text", "as_values", "save_exits", "save_reliability"]

_DIGITS = 6
# Okabe and Ito, "Color Universal Design" (2008): told apart by all kinds of color vision.
_BEFORE, _AFTER, _LIMIT, _MUTED = "#d55e00", "#0072b2", "#cc79a7", "#70777f"
_DPI = 150
_LEAST_RANGE = 4  # points of accuracy


def as_values(learned: Learned) -> dict[str, JsonValue]:
    """What `calibration.json` keeps under "report", rounded for reading."""
    exits = {"none_because": learned.exits} if isinstance(learned.exits, str) else asdict(learned.exits)
    values = {
        "judged_on": "temperature images" if learned.exit_part is None else "exit images",
        "probabilities": {
            name: {"before": asdict(o.before), "after": asdict(o.after), "at_bound": o.fit.bounded}
            for name, o in learned.temperatures.items()
        },
        "exits": exits,
        "gmacs": learned.gmacs,
        "times_ms": asdict(learned.times),
        "unreadable": learned.unreadable,
    }
    return _plain(values)


def _plain(value: Any) -> Any:
    """JSON values, floats with six significant digits."""
    if isinstance(value, Mapping):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(member) for member in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def as_text(learned: Learned) -> str:
    """The report for people; several lines, the last one ended."""
    part = learned.temperature_part
    judges = f"judged on {learned.exit_part.images} others" if learned.exit_part else "judged on the same images"
    lines = [
        f"temperatures from {part.images} images in {part.folder}, {judges}",
        "",
        f"{'logits':<15}{'temperature':>12}  {'NLL':<43}  {'ECE %':<43}  floor % (95 %)",
    ]
    for name, outcome in learned.temperatures.items():
        before, after = outcome.before, outcome.after
        lines.append(
            f"{name:<15}{outcome.fit.temperature:>12.3f}  "
            f"{_change(before.nll, after.nll, 1, 3):<43}  {_change(before.ece, after.ece, 100, 1):<43}  "
            f"{100 * after.ece_floor:.1f} ({100 * after.ece_floor_95:.1f})"
        )
    lines += [
        "",
        "floor: the ECE that true probabilities show at this number of images, on average (and 95 % of the time);",
        "in brackets 95 % bootstrap intervals; an ECE's is for the true error, which chance only adds to",
        "",
    ]
    if isinstance(learned.exits, str):
        lines.append(f"no early exits: {learned.exits}")
    else:
        lines += _exit_lines(learned, learned.exits)
    return "\n".join(lines) + "\n"


def _exit_lines(learned: Learned, exits: ExitOutcome) -> list[str]:
    times, guarantee = learned.times, learned.request.guarantee
    folder = learned.exit_part.folder if learned.exit_part else learned.request.data
    lines = [
        f"early exits from {exits.images} images in {folder}",
        "",
        f"{'stops after':<15}{'threshold':>12}{'images %':>12}{'GMACs':>12}{'ms':>12}",
    ]
    for (name, count), gmacs, ms in zip(exits.stopped.items(), learned.gmacs, times.stops, strict=True):
        threshold = exits.thresholds.get(name)
        shown = "" if name not in exits.thresholds else "never" if threshold is None else f"{threshold:.4f}"
        lines.append(f"{name:<15}{shown:>12}{100 * count / exits.images:>12.1f}{gmacs:>12.4g}{ms:>12.2f}")
    with_exits = times.full if times.exits is None else times.exits
    change = exits.accuracy_change
    return [
        *lines,
        f"{'mean':<39}{exits.mean_cost:>12.4g}{with_exits:>12.2f}",
        f"{'% of whole':<39}{100 * exits.mean_cost_share:>12.1f}{100 * with_exits / times.full:>12.1f}",
        "",
        f"another class than the full chain's: {exits.disagreements} of {exits.images} images "
        f"({100 * exits.disagreements / exits.images:.2f} %)",
        f"guarantee: with probability {100 * (1 - guarantee.delta):g} % at most {100 * guarantee.epsilon:g} % of new "
        f"images from the same source (bound {100 * exits.bound:.2f} %)",
        f"top-1 {100 * exits.accuracy:.2f} % with exits, {100 * exits.accuracy_full:.2f} % without: "
        f"{100 * change.value:+.2f} points [{100 * change.low:+.2f}, {100 * change.high:+.2f}]",
        "shares, cost, disagreement and top-1 are of the images that chose the thresholds, so a little better than on "
        "new ones; the guarantee allows for that",
        f"ms: {times.images} of the images one by one on {learned.runs_on}, with exits and without in turn, decoding "
        "not counted; the guarantee, too, is for predictions computed so",
    ]


def _change(before: Interval, after: Interval, scale: float, digits: int) -> str:
    return " -> ".join(
        f"{scale * i.value:.{digits}f} [{scale * i.low:.{digits}f}, {scale * i.high:.{digits}f}]"
        for i in (before, after)
    )


def save_reliability(path: Path, outcomes: Mapping[str, TemperatureOutcome], images: int) -> None:
    """Accuracy over confidence after every graph, before and after, in bins of equal mass, as PNG.

    Bars are 95 % intervals of a bin's accuracy (Wilson 1927).

    Args:
        path: of the PNG.
        outcomes: by tensor of logits.
        images: that judged them.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.figure import Figure
    from scipy.stats import binomtest

    figure = Figure(figsize=(3.7 * len(outcomes) + 0.4, 4.3), layout="constrained")
    figure.suptitle(f"Reliability on {images} images, bins of equal mass", fontsize=11)
    axes = figure.subplots(1, len(outcomes), squeeze=False)[0]
    for panel, (name, outcome) in zip(axes, outcomes.items(), strict=True):
        panel.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        ways = (("before", outcome.before, _BEFORE, "s"), ("after", outcome.after, _AFTER, "o"))
        for label, quality, color, marker in ways:
            confident, right, counts = map(np.array, zip(*quality.bins, strict=True))
            tests = [binomtest(round(share * n), n) for share, n in zip(right, counts, strict=True)]
            low, high = np.array([test.proportion_ci(method="wilson") for test in tests]).T
            panel.errorbar(
                confident,
                right,
                yerr=(np.maximum(right - low, 0), np.maximum(high - right, 0)),
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                elinewidth=0.8,
                alpha=0.9,
                label=f"{label}: ECE {100 * quality.ece.value:.1f} %, NLL {quality.nll.value:.3f}",
            )
        panel.set_title(f"{name}, temperature {outcome.fit.temperature:.2f}", fontsize=10)
        panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel="confidence")
        panel.grid(alpha=0.25)
        floor = f"floor of a true model: ECE {100 * outcome.after.ece_floor:.1f} %"
        panel.legend(fontsize=8, loc="best", framealpha=0.9, title=floor, title_fontsize=8, alignment="left")
    axes[0].set_ylabel("share that is right")
    _save(figure, path)


def save_exits(path: Path, outcome: ExitOutcome, guarantee: Promise) -> None:
    """Accuracy and disagreement over mean cost along the path of thresholds, with the choice, as PNG.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.figure import Figure

    curve, chosen = outcome.curve, 100 * outcome.mean_cost_share
    full = curve.always[-1]
    cost = 100 * np.concatenate(([full[0]], curve.cost))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(cost, 100 * np.concatenate(([full[1]], curve.accuracy)), color=_AFTER, label="exits by confidence")
    early = list(outcome.stopped)[:-1]
    marks = [*((f"always {name}", (6, -6), "left") for name in early), ("full chain", (-6, -6), "right")]
    for (share, accuracy), (label, offset, side) in zip(curve.always, marks, strict=True):
        left.plot(100 * share, 100 * accuracy, "s", color=_MUTED, markersize=5)
        at, style = (100 * share, 100 * accuracy), {"fontsize": 8, "color": _MUTED, "ha": side, "va": "top"}
        left.annotate(label, at, xytext=offset, textcoords="offset points", **style)
    left.plot(chosen, 100 * outcome.accuracy, "o", color=_BEFORE, markersize=8, label="chosen")
    left.set(xlabel="mean cost, % of the full chain", ylabel="top-1 %", title="accuracy")
    left.margins(y=0.15)
    low, high = left.get_ylim()
    if (missing := _LEAST_RANGE - (high - low)) > 0:  # where accuracy hardly changes, that is what should be seen
        left.set_ylim(low - missing / 2, high + missing / 2)
    bound = f"upper bound, {100 - 100 * guarantee.delta:g} %"
    right.plot(cost[1:], 100 * curve.bound, color=_AFTER, linestyle="--", label=bound)
    right.plot(cost, 100 * np.concatenate(([0.0], curve.disagreement)), color=_AFTER, label="measured")
    right.axhline(100 * guarantee.epsilon, color=_LIMIT, label=f"allowed: {100 * guarantee.epsilon:g} %")
    share = 100 * outcome.disagreements / outcome.images
    right.plot(chosen, share, "o", color=_BEFORE, markersize=8, label="chosen")
    right.set(
        xlabel="mean cost, % of the full chain",
        ylabel="another class than the full chain's, %",
        title=f"disagreement on {outcome.images} images",
        ylim=(0, 400 * guarantee.epsilon),
    )
    for panel in (left, right):
        panel.set_xlim(0, 104)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_path(path) as part:
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(str(part))
