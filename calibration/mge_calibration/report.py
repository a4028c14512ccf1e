"""A calibration as plain values for the bundle, as text, and as a reliability diagram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from mge_calibration.calibrate import Learned
from mge_calibration.conformal import ConformalOutcome
from mge_calibration.exits import ExitOutcome
from mge_calibration.images import LabeledImage, short_digest
from mge_calibration.temperature import TemperatureOutcome
from mge_runtime.fields import JsonValue
from mge_runtime.files import atomic_path
from mge_runtime.metrics import Interval

# Okabe and Ito, "Color Universal Design" (2008): told apart by all kinds of color vision.
_BEFORE, _AFTER, _MUTED = "#d55e00", "#0072b2", "#70777f"
_DPI = 150


def as_values(learned: Learned) -> dict[str, JsonValue]:
    """The values of the bundle's `calibration.json`; what the runtime does not read is under "report"."""
    guarantee, exits = learned.request.guarantee, learned.exits
    report = {
        "judged_on": "temperature images" if learned.tested is None else "exit images",
        "probabilities": {
            name: {"before": asdict(o.before), "after": asdict(o.after), "at_bound": o.fit.bounded}
            for name, o in learned.temperatures.items()
        },
        "exits": {"none_because": exits} if isinstance(exits, str) else asdict(exits),
        "conformal": learned.conformal and dict(learned.conformal.figures),
        "gmacs": list(learned.gmacs),
        "unreadable": learned.unreadable,
    }
    return {
        "temperatures": {name: outcome.fit.temperature for name, outcome in learned.temperatures.items()},
        "exits": None
        if isinstance(exits, str)
        else {"epsilon": guarantee.epsilon, "delta": guarantee.delta, "thresholds": dict(exits.thresholds)},
        "data": {
            "temperatures": _record(learned.fitted),
            "exits": None if learned.tested is None else _record(learned.tested),
            **({"conformal": _record(learned.held)} if learned.held else {}),
        },
        "conformal": learned.conformal and learned.conformal.learned.to_values(),
        "runs_on": asdict(learned.runs_on),
        "seed": learned.request.seed,
        "made_by": f"mge {version('mge')}",
        "report": report,
    }


def _record(images: Sequence[LabeledImage]) -> dict[str, JsonValue]:
    return {"images": len(images), "digests": sorted(short_digest(image.sha256) for image in images)}


def as_text(learned: Learned) -> str:
    """The report for people; several lines, the last one ended."""
    judges = f"judged on {len(learned.tested)} others" if learned.tested else "judged on the same images"
    lines = [
        f"temperatures from {len(learned.fitted)} images in {learned.folders[0]}, {judges}",
        "",
        f"{'logits':<15}{'temperature':>12}  {'NLL [95 % bootstrap interval]':<43}  {'ECE %':<13}  floor % (95 %)",
    ]
    for name, outcome in learned.temperatures.items():
        before, after = outcome.before, outcome.after
        likelihoods = f"{_with_interval(before.nll)} -> {_with_interval(after.nll)}"
        errors = f"{100 * before.ece:.1f} -> {100 * after.ece:.1f}"
        lines.append(
            f"{name:<15}{outcome.fit.temperature:>12.3f}  {likelihoods:<43}  {errors:<13}  "
            f"{100 * after.ece_floor:.1f} ({100 * after.ece_floor_95:.1f})"
        )
    lines += [
        "",
        "floor: the ECE that true probabilities show at this number of images, on average (and 95 % of the time)",
        "",
    ]
    if isinstance(learned.exits, str):
        lines.append(f"no early exits: {learned.exits}")
    else:
        lines += _exit_lines(learned, learned.exits)
    if learned.conformal:
        lines += ["", *_conformal_lines(learned.conformal)]
    return "\n".join(lines) + "\n"


def _conformal_lines(outcome: ConformalOutcome) -> list[str]:
    columns = {
        "rejected": ("rejected %", 100),
        "unknown_rejected": ("of unknown %", 100),
        "auroc": ("AUROC", 1),
        "set_size": ("classes in a set", 1),
        "coarsened": ("coarser %", 100),
    }
    shown = [name for name in columns if name in next(iter(outcome.figures.values()))]
    lines = [
        f"thresholds from {outcome.images} images of their own; {outcome.learned}",
        "",
        f"{'stops after':<15}" + "".join(f"{columns[name][0]:>18}" for name in shown),
    ]
    for way, figures in outcome.figures.items():
        lines.append(f"{way:<15}" + "".join(f"{figures[name] * columns[name][1]:>18.4g}" for name in shown))
    return lines


def _exit_lines(learned: Learned, exits: ExitOutcome) -> list[str]:
    guarantee, change = learned.request.guarantee, exits.accuracy_change
    lines = [
        f"early exits from {exits.images} images in {learned.folders[1]}",
        "",
        f"{'stops after':<15}{'threshold':>12}{'images %':>12}{'GMACs':>12}",
    ]
    for (name, count), gmacs in zip(exits.stopped.items(), learned.gmacs, strict=True):
        threshold = exits.thresholds.get(name)
        shown = "" if name not in exits.thresholds else "never" if threshold is None else f"{threshold:.4f}"
        lines.append(f"{name:<15}{shown:>12}{100 * count / exits.images:>12.1f}{gmacs:>12.4g}")
    return [
        *lines,
        f"{'mean':<39}{exits.mean_cost:>12.4g}",
        f"{'% of whole':<39}{100 * exits.mean_cost_share:>12.1f}",
        "",
        f"another class than the full chain's: {exits.disagreements} of {exits.images} images "
        f"({100 * exits.disagreements / exits.images:.2f} %)",
        f"guarantee: with probability {100 * (1 - guarantee.delta):g} % at most {100 * guarantee.epsilon:g} % of new "
        f"images from the same source (bound {100 * exits.bound:.2f} %), predicted by {learned.runs_on}",
        f"top-1 {100 * exits.accuracy:.2f} % with exits, {100 * exits.accuracy_full:.2f} % without: "
        f"{100 * change.value:+.2f} points [{100 * change.low:+.2f}, {100 * change.high:+.2f}]",
        "shares, cost, disagreement and top-1 are of the images that chose the thresholds, so a little better than on "
        "new ones; the guarantee allows for that",
    ]


def _with_interval(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def save_reliability(path: Path, outcomes: Mapping[str, TemperatureOutcome]) -> None:
    """Draw accuracy over confidence after every graph, before and after, in bins of equal mass, as PNG.

    Args:
        path: of the PNG.
        outcomes: by tensor of logits.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.7 * len(outcomes) + 0.4, 4.3), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, len(outcomes), squeeze=False)[0]
    for panel, (name, outcome) in zip(panels, outcomes.items(), strict=True):
        panel.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle="--")
        for label, quality, color in (("before", outcome.before, _BEFORE), ("after", outcome.after, _AFTER)):
            confident, right, _ = zip(*quality.bins, strict=True)
            label = f"{label}: ECE {100 * quality.ece:.1f} %, NLL {quality.nll.value:.3f}"
            panel.plot(confident, right, "o-", color=color, markersize=4, linewidth=1.2, label=label)
        floor = f"floor of a true model: ECE {100 * outcome.after.ece_floor:.1f} %"
        panel.legend(fontsize=8, title=floor, title_fontsize=8, alignment="left")
        panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel="confidence", ylabel="accuracy")
        panel.set_title(f"{name}, temperature {outcome.fit.temperature:.2f}", fontsize=10)
        panel.grid(alpha=0.25)
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(str(part))
