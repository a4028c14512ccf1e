"""The text of `mge-info`."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from mge_runtime.bundle.archive import cpu_graph_entry, graph_entry, weights_entry
from mge_runtime.cli.info_calibration import calibration_lines
from mge_runtime.cli.info_here import engine_lines, here_lines, machine_line
from mge_runtime.cli.info_parity import parity_lines
from mge_runtime.errors import printable
from mge_runtime.files import format_bytes

__all__ = ["brief_lines", "info_lines"]

_WIDTH = 110  # characters
_INDENT = 11


def brief_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Ten lines for people, from what `describe` returned; more only where nothing runs."""
    manifest = facts["manifest"]
    yield from _bundle(facts)
    yield from _row("model", _pairs(manifest["model"]) or "unknown", lines=1)
    yield from _row("classes", f"{len(manifest['class_names'])}: {', '.join(manifest['class_names'])}", lines=1)
    yield from _row("input", _preprocess(manifest["preprocess"]), lines=1)
    kinds = Counter(manifest["precision"].get(g["name"], {}).get("type", "unknown") for g in manifest["graphs"])
    yield from _row("precision", ", ".join(f"{kind} in {count} graphs" for kind, count in kinds.items()), lines=1)
    parity = list(parity_lines(manifest["parity"]))
    failed = [line for line in parity if line.startswith("out of tolerance")]
    yield from _row("parity", "; ".join(failed or parity[:1]), lines=1)
    found = [*facts["engines"], *(f"{engine['target']} in the cache" for engine in facts["cached_engines"])]
    yield from _row("engines", ", ".join(found) or "none; ONNX alone", lines=1)
    yield from _row("calibrated", "; ".join(calibration_lines(facts["calibration"], manifest)), lines=1)
    runs = next(here_lines(facts["here"]))
    yield from _row(_runs_label(facts), runs, lines=None if facts["here"]["backend"] is None else 1)


def info_lines(facts: dict[str, Any]) -> Iterator[str]:
    """All lines for people, from what `describe` returned."""
    manifest = facts["manifest"]
    yield from _bundle(facts)
    if manifest["model"]:
        yield from _row("model", _pairs(manifest["model"]))
    yield from _row("classes", f"{len(manifest['class_names'])}: {', '.join(manifest['class_names'])}", lines=3)
    yield from _row("input", _preprocess(manifest["preprocess"]))
    made = [f"{name} {version}" for name, version in manifest["tools"].items()]
    checkpoint = manifest["checkpoint_sha256"]
    yield from _row("made by", ", ".join(made) or "unknown tools")
    yield from _row("", f"from the checkpoint {checkpoint[:16]}" if checkpoint else "from an unknown checkpoint")
    yield from _graphs(manifest, facts["entries"])
    for number, line in enumerate(parity_lines(manifest["parity"])):
        yield from _row("" if number else "parity", line)
    for number, line in enumerate(engine_lines(facts)):
        yield from _row("" if number else "engines", line)
    for number, line in enumerate(calibration_lines(facts["calibration"], manifest)):
        yield from _row("" if number else "calibrated", line)
    yield from _row("machine", machine_line(facts["machine"]))
    for number, line in enumerate(here_lines(facts["here"])):
        yield from _row("" if number else _runs_label(facts), line)
    yield from _row("", "everything, operators and the whole parity report included: --json")


def _bundle(facts: dict[str, Any]) -> Iterator[str]:
    yield from _row("bundle", f"{facts['path']}, {format_bytes(facts['size'])} (more: --all)")
    checked = ", every entry matches its hash" if facts.get("verified") else ""
    yield from _row("sha256", f"{facts['sha256']}{checked}")


def _runs_label(facts: dict[str, Any]) -> str:
    return "runs there" if facts["here"]["recorded"] else "runs here"


def _graphs(manifest: dict[str, Any], sizes: dict[str, int]) -> Iterator[str]:
    for graph in manifest["graphs"]:
        name = graph["name"]
        size = sum(sizes.get(entry(name), 0) for entry in (graph_entry, cpu_graph_entry, weights_entry))
        plan = dict(manifest["precision"].get(name, {}))
        precision = plan.pop("type", "of unknown precision")
        attested = plan.pop("attested", None)
        yield from _row("graph", f"{name}: {precision}, {manifest['gmacs'][name]:.3g} GMACs, {format_bytes(size)}")
        yield from _row("", f"  precision {f'attested: {attested}' if attested else 'not attested'}")
        # Tables, such as counts of operators, are for --json.
        if scalars := {key: value for key, value in plan.items() if not isinstance(value, (dict, list))}:
            yield from _row("", f"  {_pairs(scalars)}")
        for label, tensors in (("in", graph["inputs"]), ("out", graph["outputs"])):
            texts = [f"{t['name']} {t['dtype']} [{', '.join(map(str, t['shape']))}]" for t in tensors]
            yield from _row("", f"  {label:<4}{'; '.join(texts)}")


def _preprocess(values: dict[str, Any]) -> str:
    return (
        f"RGB, shorter side to {values['resize']}, centre crop {values['size']} x {values['size']}, "
        f"mean {_plain(values['mean'])}, std {_plain(values['std'])}"
    )


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + _pairs(cast("dict[str, Any]", value)) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(_plain(v) for v in cast("list[Any]", value)) + "]"
    return "none" if value is None else str(value)


def _row(label: str, text: str, *, lines: int | None = None) -> Iterator[str]:
    """Wrap a text beside its label; at most `lines` lines of it."""
    # Texts come from the file: what is no printable character must not reach the terminal.
    body = printable(text.lstrip())
    indent = _INDENT + len(text) - len(body)
    wrapped = [body]
    if len(body) > _WIDTH - indent:
        wrapped = textwrap.wrap(
            body, _WIDTH - indent, max_lines=lines, placeholder=" ...", break_long_words=False, break_on_hyphens=False
        )
    for number, line in enumerate(wrapped):
        prefix = f"{label:<{_INDENT}}" if number == 0 else ""
        yield (prefix + " " * (indent - len(prefix)) + line).rstrip()
