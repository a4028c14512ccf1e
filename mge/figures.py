"""The figures of an evaluation, as plain values and as text: the ablation, the experts, the classes, the confusions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mge.cost import RUNS
from mge.evaluation import Evaluation, Predictions, gate_entropy, gate_report, summarize, top_k_correct
from mge.parts import part_report, read_parts, view_areas
from mge_runtime.errors import InputError, printable
from mge_runtime.files import echo
from mge_runtime.layouts import relative_name
from mge_runtime.metrics import share_interval

_SHOWN = 5  # classes and confusions that the text names


def _classes(predictions: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Of each class that has images, the least accurate first: how many, top-1 of the final logits and each expert."""
    labels, found = predictions.labels, list[dict[str, Any]]()
    experts = [logits for name, logits in predictions.heads.items() if re.fullmatch(r"expert \d+", name)]
    right = top_k_correct(predictions.final, labels)
    of_experts = np.stack([top_k_correct(logits, labels) for logits in experts], 1)
    for label, images in zip(*np.unique(labels, return_counts=True), strict=True):
        own = labels == label
        found.append(
            {
                "class": classes[label],
                "images": int(images),
                "top1": float(right[own].mean()),
                "top1_interval": share_interval(int(right[own].sum()), int(images)),
                "experts": of_experts[own].mean(0).tolist(),
            }
        )
    return sorted(found, key=lambda row: row["top1"])


def confusions(predictions: Predictions) -> list[tuple[int, int, int]]:
    """Class, class that was predicted instead, and for how many images; the most frequent first."""
    pairs = zip(predictions.labels.tolist(), predictions.final.argmax(1).tolist(), strict=True)
    counts = Counter(pair for pair in pairs if pair[0] != pair[1])
    return sorted(((*pair, count) for pair, count in counts.items()), key=lambda row: (-row[2], row))


def _exits(predictions: Predictions) -> dict[str, Any] | None:
    """What early exits change, and their mean cost; None where the chain never stops early."""
    exits, cost = predictions.exits, predictions.cost
    if exits is None:
        return None
    right, place = top_k_correct(exits.logits, predictions.labels), exits.used - 1
    return {
        "top1": float(right.mean()),
        "top1_interval": share_interval(int(right.sum()), len(right)),
        "stopped": (np.bincount(place, minlength=predictions.gate.shape[1]) / len(place)).tolist(),
        "other_class": int((exits.logits.argmax(1) != predictions.final.argmax(1)).sum()),
        "gmacs": None if cost is None else float(np.array(cost.gmacs)[place].mean()),
        "ms": None if cost is None else float(np.array(cost.ms)[place].mean()),
    }


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that the table shows, as plain values.

    `parts.csv` in the folder of the images, where there is one, tells where the deciding part of each image lies.

    Raises:
        InputError: `parts.csv` leaves an image out.
    """
    predictions, folder = evaluation.predictions, evaluation.folder
    classes = predictions.classes
    areas = view_areas(predictions.views)
    result: dict[str, Any] = {
        "images": len(predictions.labels),
        "heads": [asdict(row) for row in summarize(predictions)],
        "exits": _exits(predictions),
        "cost": None if predictions.cost is None else asdict(predictions.cost),
        "classes": _classes(predictions, classes),
        "confusions": [
            {"class": classes[label], "predicted": classes[predicted], "images": count}
            for label, predicted, count in confusions(predictions)
        ],
        "temperature": predictions.temperature,
        "gate": predictions.gate.mean(0).tolist(),
        "gate_entropy": gate_entropy(predictions.gate),
        "warnings": gate_report(predictions.gate),
        "view_areas": np.median(areas, axis=0).tolist(),
        "crop_areas": [1.0, *np.median(areas[:, 1:] / areas[:, :-1], axis=0).tolist()],
    }
    parts = read_parts(folder)
    if parts is not None:
        names = [relative_name(path, folder) for path, _ in evaluation.samples]
        if missing := [name for name in names if name not in parts]:
            raise InputError(
                f"{folder / 'parts.csv'} has no row for {missing[0]} ({len(missing)} images in all); "
                "expected the part of every image, or no parts.csv"
            )
        boxes = np.array([parts[name] for name in names])
        result["part_kept"], result["part_enlargement"] = part_report(boxes, predictions.views)
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    echo(f"{result['images']} images\n")
    echo(f"{'head':<18}{'top-1 % [95 %]':>21}{'top-5 %':>9}{'NLL':>8}{'ECE %':>8}{'GMACs':>9}{'ms':>9}")
    for row in result["heads"]:
        shares = f"{percent(row):>21}{100 * row['top5']:9.2f}{row['nll']:8.3f}{100 * row['ece']:8.2f}"
        echo(f"{row['name']:<18}{shares}{''.join(f'{cell:>9}' for cell in cost_cells(row))}")
    if cost := result["cost"]:
        echo(f"\nGMACs and ms of one image, of all that a row needs; ms: median of {RUNS} runs, {cost['measured']}")
    if exits := result["exits"]:
        stopped = ", ".join(f"{k}: {100 * share:.0f} %" for k, share in enumerate(exits["stopped"], 1))
        mean = ", on average {} GMACs and {} ms".format(*cost_cells(exits))
        echo(
            f"with early exits: top-1 {percent(exits)} %{mean}; images that stop after expert {stopped}; "
            f"another class than the whole chain's for {exits['other_class']}"
        )
    last = result["heads"][-1]
    if last["calibrated_nll"] is not None:
        echo(
            f"\n{last['name']} after the bundle's temperature {result['temperature']:.3f}, as mge-run predicts: "
            f"NLL {last['calibrated_nll']:.3f}, ECE {100 * last['calibrated_ece']:.2f} %; "
            "the rows above are before any temperature"
        )
    echo("\nECE: 15 bins of equal mass")
    titles, rows = expert_table(result)
    echo("\n" + f"{titles[0]:<8}" + "".join(f"{title:>15}" for title in titles[1:]))
    for number, *values in rows:
        echo(f"{number:<8}" + "".join(f"{value:>15}" for value in values))
    echo(
        "\ncrop area: median share that each expert's crop keeps of the view before; view area: of the first view"
        + ("; part: the deciding part of the image" if "part_kept" in result else "")
    )
    if len(result["gate"]) > 1:
        echo(f"gate: mean weights; mean entropy {100 * result['gate_entropy']:.0f} % of the most there can be")
    for title, key, show in (
        ("least accurate", "classes", lambda row: f"{printable(row['class'])} {100 * row['top1']:.0f} %"),
        ("most confused", "confusions", lambda row: "{class} -> {predicted} {images}".format(**row)),
    ):
        echo(f"{title}: {', '.join(printable(show(row)) for row in result[key][:_SHOWN]) or 'none'}")
    for warning in result["warnings"]:
        echo(warning)


def expert_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles, and for each expert its number, gate, areas and the part, as text."""
    shares = {"gate %": "gate", "crop area %": "crop_areas", "view area %": "view_areas", "part kept %": "part_kept"}
    columns = {
        title: [f"{100 * value:.1f}" for value in result[name]] for title, name in shares.items() if name in result
    }
    if "part_kept" in result:
        columns["part enlarged"] = [f"{value:.2f} x" for value in result["part_enlargement"]]
    return ["expert", *columns], [[str(k), *values] for k, values in enumerate(zip(*columns.values(), strict=True), 1)]


def percent(row: Mapping[str, Any], digits: int = 2) -> str:
    """Top-1 with its interval, for example "91.82 [89.20, 93.85]"."""
    value, low, high = (f"{100 * share:.{digits}f}" for share in (row["top1"], *row["top1_interval"]))
    return f"{value} [{low}, {high}]"


def cost_cells(row: Mapping[str, Any]) -> list[str]:
    """GMACs and milliseconds as text; "-" where they were not measured."""
    return ["-" if row[key] is None else f"{row[key]:{form}}" for key, form in (("gmacs", ".3g"), ("ms", ".1f"))]
