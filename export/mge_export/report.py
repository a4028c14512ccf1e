"""The parity report as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mge_export.activations import FP16_MAX
from mge_export.parity import Check, ParityReport
from mge_export.tolerances import FEW_IMAGES

__all__ = ["format_report"]


def format_report(report: ParityReport) -> str:
    """Lay out graphs and chain of every check, then what is out of tolerance or worth a look."""
    lines = [f"Parity with the checkpoint in FP32, on {report.images.source}"]
    for check in report.checks:
        lines += ["", f"{check.label}:", *_table(_rows(check, report))]
    lines += ["", *_crop_lines(report)]
    lines += [f"Tolerances ({report.tolerances.reason}):", f"  {_limits(report)}"]
    lines += [f"warning: {line}" for line in report.warnings]
    lines += [f"out of tolerance: {line}" for line in report.failures]
    return "\n".join(lines)


def _rows(check: Check, report: ParityReport) -> Iterable[Sequence[str]]:
    yield ("graph", "abs diff", "rel diff", "same class", "box IoU", "1st pct", "max |act|", "of FP16")
    for name, graph in check.graphs.items():
        peak = report.peaks.get(name) if check.name == "torch" else None
        yield (
            name,
            _worst(graph.absolute.values()),
            _worst(graph.relative.values()),
            _same([change for changes in graph.class_changes.values() for change in changes]),
            *_iou(graph.box_iou),
            f"{peak.value:.4g}" if peak else "",
            f"{100 * peak.value / FP16_MAX:.2g} %" if peak else "",
        )
    boxes = [iou for values in check.chain.box_iou.values() for iou in values]
    yield ("whole chain", "", _worst([check.chain.relative]), _same(check.chain.class_changes), *_iou(boxes), "", "")


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    columns = zip(*cells, strict=True)
    aligned = [
        [cell.rjust(width) if number else cell.ljust(width) for cell in column]
        for number, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return ["  " + "  ".join(row).rstrip() for row in zip(*aligned, strict=True)]


def _crop_lines(report: ParityReport) -> list[str]:
    return [
        f"Crop {name.removeprefix('box_')}: keeps a median of {100 * np.median(shares):.0f} % of its view"
        for name, shares in report.crop_area.items()
    ]


def _limits(report: ParityReport) -> str:
    limits, images = report.tolerances, report.images.count
    changes, few = limits.allowed_changes(images), images < FEW_IMAGES
    ties = "" if changes else ", ties aside"
    return (
        f"rel diff <= {limits.relative:g}; class may change on {changes} of {images}{ties}; "
        f"box IoU median >= {limits.box_iou_median:g}, "
        + (f">= {limits.box_iou_p1:g} on all but 1" if few else f"1st percentile >= {limits.box_iou_p1:g}")
    )


def _worst(values: Iterable[Sequence[float]]) -> str:
    found = [value for several in values for value in several]
    return f"{max(found):.1e}" if found else ""


def _same(changes: Sequence[bool]) -> str:
    return f"{len(changes) - sum(changes)}/{len(changes)}" if changes else ""


def _iou(values: Sequence[float]) -> tuple[str, str]:
    return (f"{np.median(values):.4f}", f"{np.percentile(values, 1):.4f}") if values else ("", "")
