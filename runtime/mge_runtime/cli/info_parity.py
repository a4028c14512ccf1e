"""The parity report in the text of `mge-info`. It is free JSON to the bundle, so nothing of it is taken for granted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

__all__ = ["parity_lines"]

_HEAD = ("graph", "abs diff", "rel diff", "class changes", "box IoU", "1st pct")


def parity_lines(parity: dict[str, Any] | None) -> Iterator[str]:
    """A table for each check of the export: worst differences by graph, then what the report adds."""
    if parity is None:
        yield "not measured"
        return
    yield f"on {parity.get('source', 'unknown images')}; reference: {parity.get('reference', 'unknown')}"
    for check in _table(parity.get("checks")).values():
        yield f"{_table(check).get('label', 'a check')}:"
        rows = [_HEAD]
        rows += [_graph_row(name, _table(graph)) for name, graph in _table(_table(check).get("graphs")).items()]
        if chain := _table(_table(check).get("chain")):
            rows.append(_chain_row(chain))
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
        for name, *cells in rows:
            aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            yield "  " + "  ".join([f"{name:<{widths[0]}}", *aligned]).rstrip()
    activations = _table(parity.get("largest_activation"))
    if activations:
        peaks = [f"{graph} {_number(_table(peak).get('value'), '.4g')}" for graph, peak in activations.items()]
        yield f"largest activations: {', '.join(peaks)}"
    areas = _table(parity.get("crop_area_median"))
    if areas:
        shares = [f"{name} {_number(share, '.0%')}" for name, share in areas.items()]
        yield f"crops keep a median of: {', '.join(shares)}"
    for kind in ("failures", "warnings"):
        for text in _list(parity.get(kind)):
            yield f"{'out of tolerance' if kind == 'failures' else 'warning'}: {text}"


def _graph_row(name: str, graph: dict[str, Any]) -> tuple[str, ...]:
    iou = _table(graph.get("box_iou"))
    return (
        name,
        _worst(graph.get("absolute")),
        _worst(graph.get("relative")),
        _number(graph.get("class_changes"), "d"),
        _number(iou.get("median"), ".4f"),
        _number(iou.get("p1"), ".4f"),
    )


def _chain_row(chain: dict[str, Any]) -> tuple[str, ...]:
    boxes = [_table(box) for box in _table(chain.get("box_iou")).values()]
    worst: dict[str, float | None] = {}
    for key in ("median", "p1"):
        values: list[float] = [box[key] for box in boxes if _is_number(box.get(key))]
        worst[key] = min(values, default=None)
    return (
        "whole chain",
        "",
        _number(chain.get("answer_relative"), ".1e"),
        _number(chain.get("class_changes"), "d"),
        _number(worst["median"], ".4f"),
        _number(worst["p1"], ".4f"),
    )


def _worst(values: Any) -> str:
    numbers = [value for value in _table(values).values() if _is_number(value)]
    return _number(max(numbers, default=None), ".1e")


def _number(value: Any, style: str) -> str:
    if not _is_number(value):
        return ""
    return format(int(value) if style == "d" else float(value), style)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _table(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []
