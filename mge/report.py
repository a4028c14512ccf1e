"""The table of `mge-eval`, as figures, as text and as a file for later comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mge.evaluation import Answers, median_areas, summarize
from mge.metrics import view_areas
from mge.parts import part_report, read_parts
from mge_runtime.errors import InputError
from mge_runtime.files import atomic_path, echo

__all__ = ["figures", "print_table", "write_predictions"]


def figures(answers: Answers, folder: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """Everything that the table shows, as plain values.

    Args:
        answers: on the images `paths`, in their order.
        folder: of the images; its `parts.csv`, where there is one, tells where the deciding part of each image lies.
        paths: below `folder`.

    Raises:
        InputError: `parts.csv` leaves an image out.
    """
    areas = view_areas(answers.views)
    result: dict[str, Any] = {
        "images": len(answers.labels),
        "heads": [asdict(row) for row in summarize(answers)],
        "temperature": answers.temperature,
        "gate": [float(weight) for weight in answers.gate.mean(0)],
        "view_areas": median_areas(answers),
        "crop_areas": [1.0, *(float(np.median(areas[:, k] / areas[:, k - 1])) for k in range(1, areas.shape[1]))],
    }
    parts = read_parts(folder)
    if parts is not None:
        names = [path.relative_to(folder).as_posix() for path in paths]
        if missing := [name for name in names if name not in parts]:
            raise InputError(
                f"{folder / 'parts.csv'} has no row for {missing[0]} ({len(missing)} images in all); "
                "expected the part of every image, or no parts.csv"
            )
        report = part_report(np.array([parts[name] for name in names]), answers.views)
        result["part_kept"], result["part_enlargement"] = list(report.kept), list(report.enlargement)
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    echo(f"{result['images']} images\n")
    echo(f"{'answer':<18}{'top-1 %':>9}{'top-5 %':>9}{'NLL':>8}{'ECE %':>8}")
    for row in result["heads"]:
        echo(
            f"{row['name']:<18}{100 * row['top1']:9.2f}{100 * row['top5']:9.2f}{row['nll']:8.3f}{100 * row['ece']:8.2f}"
        )
    calibrated = result["heads"][-1]
    if calibrated["calibrated_nll"] is not None:
        echo(
            f"\n{calibrated['name']} after the bundle's temperature {result['temperature']:.3f}, as mge-run answers: "
            f"NLL {calibrated['calibrated_nll']:.3f}, ECE {100 * calibrated['calibrated_ece']:.2f} %; "
            "the rows above are before any temperature"
        )
    echo("\nECE: 15 bins of equal mass")
    columns = [
        ("gate %", [f"{100 * value:.1f}" for value in result["gate"]]),
        ("crop area %", [f"{100 * value:.1f}" for value in result["crop_areas"]]),
        ("view area %", [f"{100 * value:.1f}" for value in result["view_areas"]]),
    ]
    if "part_kept" in result:
        columns.append(("part kept %", [f"{100 * value:.1f}" for value in result["part_kept"]]))
        columns.append(("part enlarged", [f"{value:.2f} x" for value in result["part_enlargement"]]))
    echo("\n" + f"{'expert':<8}" + "".join(f"{name:>15}" for name, _ in columns))
    for k in range(len(result["gate"])):
        echo(f"{k + 1:<8}" + "".join(f"{values[k]:>15}" for _, values in columns))
    echo(
        "\ncrop area: median share that each expert's crop keeps of the view before; view area: of the first view"
        + ("; part: the deciding part of the image" if "part_kept" in result else "")
    )


def write_predictions(path: Path, answers: Answers, names: Sequence[str]) -> None:
    """Write every answer to a .npz file: `names`, `labels`, `gate`, `views` and `logits/<head>` for every head."""
    arrays: dict[str, Any] = {f"logits/{name}": logits for name, logits in answers.heads.items()}
    arrays |= {"names": np.array(names), "labels": answers.labels, "gate": answers.gate, "views": answers.views}
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
