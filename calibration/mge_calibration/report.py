"""The calibration as plain values and as text."""

from __future__ import annotations

from dataclasses import asdict

from mge_calibration.calibrate import Learned
from mge_calibration.intervals import Interval
from mge_calibration.judge import ExitOutcome
from mge_calibration.metrics import Quality
from mge_runtime.fields import JsonValue

__all__ = ["as_text", "as_values"]

_DIGITS = 6


def as_values(learned: Learned) -> dict[str, JsonValue]:
    """What `calibration.json` keeps under "report", rounded for reading."""
    return {
        "judged_on": "exit images" if learned.judged_apart else "temperature images",
        "probabilities": {
            name: {
                "before": _quality(outcome.before),
                "after": _quality(outcome.after),
                "at_bound": outcome.fit.bounded,
            }
            for name, outcome in learned.temperatures.items()
        },
        "exits": _exit_values(learned),
        "cost": {"unit": learned.cost.unit, "stops": [_rounded(value) for value in learned.cost.stops]},
        "times_ms": {
            "images": learned.times.images,
            "stops": [_rounded(value) for value in learned.times.stops],
            "full": _rounded(learned.times.full),
            "exits": None if learned.times.exits is None else _rounded(learned.times.exits),
        },
        "unreadable": learned.unreadable,
    }


def as_text(learned: Learned) -> str:
    """The report for people; several lines, the last one ended."""
    part = learned.temperature_part
    judges = f"judged on {learned.exit_part.images} others" if learned.exit_part else "judged on the same images"
    lines = [
        f"temperatures from {part.images} images in {part.folder}, {judges}",
        "",
        f"{'answer':<12}{'temperature':>12}  {'NLL':<43}  {'ECE %':<43}  floor % (95 %)",
    ]
    for name, outcome in learned.temperatures.items():
        before, after = outcome.before, outcome.after
        lines.append(
            f"{name:<12}{outcome.fit.temperature:>12.3f}  "
            f"{_change(before.nll, after.nll, 1, 3):<43}  {_change(before.ece, after.ece, 100, 1):<43}  "
            f"{100 * after.floor:.1f} ({100 * after.floor_95:.1f})"
        )
    lines += [
        "",
        "floor: the ECE that true probabilities show at this number of images, on average (and 95 % of the time);",
        "in brackets 95 % bootstrap intervals; an ECE's is for the true error, which chance only adds to",
        "",
    ]
    return "\n".join([*lines, *_exit_lines(learned)]) + "\n"


def _exit_lines(learned: Learned) -> list[str]:
    exits, cost, times, promise = learned.exits, learned.cost, learned.times, learned.request.promise
    if isinstance(exits, str):
        return [f"no early exits: {exits}"]
    folder = learned.exit_part.folder if learned.exit_part else learned.request.data
    lines = [
        f"early exits from {exits.images} images in {folder}",
        "",
        f"{'stops after':<12}{'threshold':>12}{'images %':>12}{cost.unit:>12}{'ms':>12}",
    ]
    for number, (name, count) in enumerate(exits.stopped.items()):
        threshold = exits.thresholds.get(name)
        shown = "" if name not in exits.thresholds else "never" if threshold is None else f"{threshold:.4f}"
        lines.append(
            f"{name:<12}{shown:>12}{100 * count / exits.images:>12.1f}{cost.stops[number]:>12.4g}"
            f"{times.stops[number]:>12.2f}"
        )
    with_exits = times.full if times.exits is None else times.exits
    change = exits.accuracy_change
    return [
        *lines,
        f"{'mean':<36}{exits.mean_cost:>12.4g}{with_exits:>12.2f}",
        f"{'% of whole':<36}{100 * exits.cost_share:>12.1f}{100 * with_exits / times.full:>12.1f}",
        "",
        f"another class than the full chain's: {exits.disagreements} of {exits.images} images "
        f"({100 * exits.disagreements / exits.images:.2f} %)",
        f"promise: with probability {100 * (1 - promise.delta):g} % at most {100 * promise.epsilon:g} % of new images "
        f"from the same source (bound {100 * exits.bound:.2f} %)",
        f"top-1 {100 * exits.accuracy:.2f} % with exits, {100 * exits.accuracy_full:.2f} % without: "
        f"{100 * change.value:+.2f} points [{100 * change.low:+.2f}, {100 * change.high:+.2f}]",
        "shares, cost, disagreement and top-1 are of the images that chose the thresholds, so a little better than on "
        "new ones; the promise allows for that",
        f"ms: {times.images} of the images one by one on {learned.runs_on}, with exits and without in turn, decoding "
        "not counted; the promise, too, is for answers computed so",
    ]


def _exit_values(learned: Learned) -> JsonValue:
    exits = learned.exits
    if isinstance(exits, str):
        return {"none_because": exits}
    return {
        "stopped": dict(exits.stopped),
        "disagreements": exits.disagreements,
        "bound": _rounded(exits.bound),
        "mean_cost": _rounded(exits.mean_cost),
        "mean_cost_share": _rounded(exits.cost_share),
        "accuracy": _rounded(exits.accuracy),
        "accuracy_full": _rounded(exits.accuracy_full),
        "accuracy_change": _interval(exits.accuracy_change),
        "curve": _curve(exits),
    }


def _curve(exits: ExitOutcome) -> JsonValue:
    curve = exits.curve
    columns = {
        "cost_share": curve.cost,
        "accuracy": curve.accuracy,
        "disagreement": curve.disagreement,
        "bound": curve.bound,
    }
    return {name: [_rounded(float(value)) for value in values] for name, values in columns.items()}


def _quality(quality: Quality) -> JsonValue:
    return {
        "nll": _interval(quality.nll),
        "ece": _interval(quality.ece),
        "ece_floor": _rounded(quality.floor),
        "ece_floor_95": _rounded(quality.floor_95),
    }


def _interval(interval: Interval) -> JsonValue:
    return {name: _rounded(value) for name, value in asdict(interval).items()}


def _rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.{_DIGITS}g}")


def _change(before: Interval, after: Interval, scale: float, digits: int) -> str:
    return " -> ".join(
        f"{scale * i.value:.{digits}f} [{scale * i.low:.{digits}f}, {scale * i.high:.{digits}f}]"
        for i in (before, after)
    )
