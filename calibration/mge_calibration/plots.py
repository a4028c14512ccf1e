"""Pictures of a calibration: reliability before and after, and what exits cost and save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mge_calibration.judge import ExitOutcome, TemperatureOutcome
from mge_runtime.calibrated import Promise
from mge_runtime.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_exits", "save_reliability"]

# Okabe and Ito, "Color Universal Design" (2008): told apart by all kinds of colour vision.
_BEFORE, _AFTER, _LIMIT, _MUTED = "#d55e00", "#0072b2", "#cc79a7", "#70777f"
_DPI = 150
_LEAST_RANGE = 4  # points of accuracy


def save_reliability(path: Path, outcomes: Mapping[str, TemperatureOutcome], images: int) -> None:
    """Accuracy over confidence for every answer, before and after, in bins of equal mass, as PNG.

    Bars are 95 % intervals of a bin's accuracy (Wilson 1927).

    Args:
        path: of the PNG.
        outcomes: by answer.
        images: that judged them.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.7 * len(outcomes) + 0.4, 4.3), layout="constrained")
    figure.suptitle(f"Reliability on {images} images, bins of equal mass", fontsize=11)
    axes = figure.subplots(1, len(outcomes), squeeze=False)[0]
    for number, (panel, outcome) in enumerate(zip(axes, outcomes.values(), strict=True)):
        panel.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        quality = (outcome.before, outcome.after)
        labels = (
            f"before: ECE {100 * quality[0].ece.value:.1f} %, NLL {quality[0].nll.value:.3f}",
            f"after: ECE {100 * quality[1].ece.value:.1f} %, NLL {quality[1].nll.value:.3f}",
        )
        _reliability(panel, outcome.bins_before, _BEFORE, "s", labels[0])
        _reliability(panel, outcome.bins_after, _AFTER, "o", labels[1])
        panel.set_title(f"{outcome.answer}, temperature {outcome.fit.temperature:.2f}", fontsize=10)
        panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel="confidence")
        if number == 0:
            panel.set_ylabel("share that is right")
        panel.grid(alpha=0.25)
        panel.legend(
            fontsize=8,
            loc="best",
            framealpha=0.9,
            title=f"floor of a true model: ECE {100 * outcome.after.floor:.1f} %",
            title_fontsize=8,
            alignment="left",
        )
    _save(figure, path)


def save_exits(path: Path, outcome: ExitOutcome, promise: Promise) -> None:
    """Accuracy and disagreement over mean cost along the path of thresholds, with the choice, as PNG.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.figure import Figure

    curve = outcome.curve
    full = curve.always[-1]
    cost = 100 * np.concatenate(([full[0]], curve.cost))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(cost, 100 * np.concatenate(([full[1]], curve.accuracy)), color=_AFTER, label="exits by confidence")
    names = list(outcome.stopped)
    for name, (share, accuracy) in zip(names, curve.always, strict=True):
        left.plot(100 * share, 100 * accuracy, "s", color=_MUTED, markersize=5)
        label = "full chain" if name == names[-1] else f"always {name}"
        left.annotate(
            label,
            (100 * share, 100 * accuracy),
            xytext=(-6, -6) if name == names[-1] else (6, -6),
            textcoords="offset points",
            ha="right" if name == names[-1] else "left",
            va="top",
            fontsize=8,
            color=_MUTED,
        )
    left.plot(100 * outcome.cost_share, 100 * outcome.accuracy, "o", color=_BEFORE, markersize=8, label="chosen")
    left.set(xlabel="mean cost, % of the full chain", ylabel="top-1 %", title="accuracy")
    left.margins(y=0.15)
    low, high = left.get_ylim()
    if (missing := _LEAST_RANGE - (high - low)) > 0:  # where accuracy hardly changes, that is what should be seen
        left.set_ylim(low - missing / 2, high + missing / 2)
    right.plot(
        cost[1:], 100 * curve.bound, color=_AFTER, linestyle="--", label=f"upper bound, {100 - 100 * promise.delta:g} %"
    )
    right.plot(cost, 100 * np.concatenate(([0.0], curve.disagreement)), color=_AFTER, label="measured")
    right.axhline(100 * promise.epsilon, color=_LIMIT, label=f"allowed: {100 * promise.epsilon:g} %")
    right.plot(
        100 * outcome.cost_share,
        100 * outcome.disagreements / outcome.images,
        "o",
        color=_BEFORE,
        markersize=8,
        label="chosen",
    )
    right.set(
        xlabel="mean cost, % of the full chain",
        ylabel="another class than the full chain's, %",
        title=f"disagreement on {outcome.images} images",
        ylim=(0, 400 * promise.epsilon),
    )
    for panel in (left, right):
        panel.set_xlim(0, 104)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    _save(figure, path)


def _reliability(panel: Axes, bins: list[tuple[float, float, int]], colour: str, marker: str, label: str) -> None:
    confidence, accuracy, counts = map(np.array, zip(*bins, strict=True))
    low, high = _wilson(accuracy, counts)
    panel.errorbar(
        confidence,
        accuracy,
        yerr=(np.maximum(accuracy - low, 0), np.maximum(high - accuracy, 0)),
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.2,
        elinewidth=0.8,
        alpha=0.9,
        label=label,
    )


def _wilson(share: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a probability from shares and numbers of trials."""
    z = 1.959964
    scale = 1 + z**2 / counts
    centre = (share + z**2 / (2 * counts)) / scale
    half = z * np.sqrt(share * (1 - share) / counts + z**2 / (4 * counts**2)) / scale
    return centre - half, centre + half


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_path(path) as part:
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(str(part))
