"""The text of `mge-info`: ten lines of a bundle, or all of it."""

from __future__ import annotations

import functools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, cast

from mge_runtime.bundle.archive import cpu_graph_entry, graph_entry, weights_entry
from mge_runtime.calibrated import Calibrated
from mge_runtime.errors import BundleError, printable
from mge_runtime.files import format_bytes
from mge_runtime.machine import Machine
from mge_runtime.manifest import Manifest

_WIDTH = 110  # characters
_INDENT = 11


def info_lines(facts: dict[str, Any], manifest: Manifest, machine: Machine, *, everything: bool) -> Iterator[str]:
    """Lines for people, from what `describe` returned.

    Args:
        facts: of an open bundle.
        manifest: of the same bundle.
        machine: where it is to run.
        everything: or ten lines, one for each subject; more only where nothing runs.
    """
    checked = ", every entry matches its hash" if facts.get("verified") else ""
    yield from _row("bundle", f"{facts['path']}, {format_bytes(facts['size'])}{'' if everything else ' (more: --all)'}")
    yield from _row("sha256", f"{facts['sha256']}{checked}")
    runs = "runs there" if facts["here"]["recorded"] else "runs here"
    brief = ("model", "classes", "input", "precision", "parity", "engines", "calibrated", "card", runs)
    for label, texts in subjects(facts, manifest, machine, runs):
        if everything:
            for number, text in enumerate(texts):
                yield from _row("" if number else label, text, lines=3 if label == "classes" else None)
        elif label in brief:
            whole = label == runs and facts["here"]["backend"] is None
            text = "; ".join(texts) if label == "calibrated" else next(iter(texts))
            yield from _row(label, text, lines=None if whole else 1)


def subjects(
    facts: dict[str, Any], manifest: Manifest, machine: Machine, runs: str = "runs here"
) -> Iterator[tuple[str, Iterable[str]]]:
    """What there is to say of a bundle: a label and its lines, the first of which stands for all of them.

    Args:
        facts: as for `info_lines`, and so are the next two.
        manifest: as well.
        machine: as well.
        runs: the label of what would run.
    """
    frame = manifest.preprocess
    crop = f"shorter side to {frame.resize}, center crop {frame.size} x {frame.size}"
    yield "model", [_pairs(manifest.model) or "unknown"]
    yield "classes", [f"{len(manifest.class_names)}: {', '.join(manifest.class_names)}"]
    yield "input", [f"RGB, {crop}, mean {_plain(frame.mean)}, std {_plain(frame.std)}"]
    checkpoint = f"from the checkpoint {(manifest.checkpoint_sha256 or 'unknown')[:16]}"
    yield "made by", [_pairs(manifest.tools) or "unknown tools", checkpoint]
    kinds = Counter(manifest.precision.get(graph.name, {}).get("type", "unknown") for graph in manifest.graphs)
    yield "precision", [", ".join(f"{kind} in {count} graphs" for kind, count in kinds.items())]
    yield "graphs", _graphs(manifest, facts["entries"])
    yield "parity", parity_lines(manifest.parity)
    yield "engines", _engines(facts)
    yield "calibrated", _calibration(facts["calibration"], manifest)
    if facts["card"] is not None:
        yield "card", [_card(facts["card"], facts["sha256"])]
    yield "machine", [machine.summary]
    yield runs, _here(facts["here"])
    yield "", ["everything, operators and the whole parity report included: --json"]


def _free_json(lines: Callable[[Any], Iterator[str]]) -> Callable[[Any], list[str]]:
    """Lines made of JSON that nobody has checked; one line instead where it is not as this version of mge writes it."""

    @functools.wraps(lines)
    def made(values: Any) -> list[str]:
        try:
            return list(lines(values))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            return ["  not as this version of mge writes it: see --json"]

    return made


@_free_json
def parity_lines(parity: Any) -> Iterator[str]:
    """The export's parity report: what failed, what it was measured on, a line for each check."""
    if parity is None:
        yield "not measured"
        return
    yield from (f"out of tolerance: {text}" for text in parity["failures"])
    yield f"on {parity['source']}; reference: {parity['reference']}"
    for check in parity["checks"].values():
        chain = check["chain"]
        alone = [float(value) for graph in check["graphs"].values() for value in graph["relative"].values()]
        ious = [float(box["p1"]) for box in chain["box_iou"].values()]
        yield (
            f"{check['label']}: each graph within {max(alone):.1e} of its tensors' largest value, the chain's logits "
            f"within {float(chain['logits_relative']):.1e}; {chain['class_changes']} images change their class"
            + (f"; 1st percentile of box IoU {min(ious):.3f}" if ious else "")
        )
    yield from (f"warning: {text}" for text in parity["warnings"])


def _graphs(manifest: Manifest, sizes: dict[str, int]) -> Iterator[str]:
    for graph in manifest.graphs:
        size = sum(sizes.get(entry(graph.name), 0) for entry in (graph_entry, cpu_graph_entry, weights_entry))
        plan = manifest.precision.get(graph.name, {})
        precision = plan.get("type", "of unknown precision")
        yield f"{graph.name}: {precision}, {manifest.gmacs[graph.name]:.3g} GMACs, {format_bytes(size)}"
        yield f"  precision {_attested(plan)}"
        for label, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            texts = [f"{t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors]
            yield f"  {label:<4}{'; '.join(texts)}"


def _attested(plan: Mapping[str, Any]) -> str:
    return f"attested: {plan['attested']}" if plan.get("attested") else "not attested"


def _engines(facts: dict[str, Any]) -> Iterator[str]:
    named = dict(facts["engines"]) | {f"{e['target']} {e['place']}": e for e in facts["cached_engines"]}
    yield ", ".join(named) or "none; ONNX alone"
    for name, engine in named.items():
        plans = engine["plans"]
        yield f"{name}: {len(plans)} graphs, {format_bytes(sum(plans.values()))}, {engine['status']}"
        yield from _engine_details(engine["details"])
        yield "  fits the machine" if engine["misfit"] is None else f"  does not fit: {engine['misfit']}"


@_free_json
def _engine_details(details: Any) -> Iterator[str]:
    gpu, (least, _, most) = details["gpu"], details["batch"]
    place = f"on {gpu['name']} ({gpu['capability']})" if gpu else "ahead of time, without a GPU"
    yield f"  built by version {details['version']}, {place}, for batch {least} to {most}"
    graphs: dict[str, list[str]] = {}
    for graph, record in details["precision"].items():
        graphs.setdefault(f"{record['type']} ({_attested(record)})", []).append(graph)
    if graphs:
        yield "  " + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in graphs.items())
    if scratch := details["options"].get("scratch"):
        shared, apart = format_bytes(max(scratch.values())), format_bytes(sum(scratch.values()))
        yield f"  activations: {shared} shared by all graphs, which run in turn; {apart} if each had its own"


def _calibration(values: dict[str, Any] | None, manifest: Manifest) -> Iterator[str]:
    if values is None:
        yield "no: probabilities are the model's own and there are no calibrated exits (mge-calibrate learns both)"
        return
    try:
        calibrated = Calibrated.from_values(values, manifest)
    except BundleError as error:
        yield f"cannot be read: {error}"
        return
    images = {key: f" (from {count} images)" for key, count in calibrated.images.items()}
    temperatures = ", ".join(f"{name} {value:.4g}" for name, value in calibrated.temperatures.items())
    yield f"temperatures: {temperatures}{images.get('temperatures', '')}"
    if calibrated.conformal:
        yield f"{calibrated.conformal}{images.get('conformal', '')}"
    if not calibrated.exits or (guarantee := calibrated.guarantee) is None:
        yield f"no early exits: {calibrated.why_no_exits or 'none were learned'}"
        return
    places = [
        f"after graph {point.graphs} where {point.logits} has a confidence of at least {point.threshold:.6g}"
        for point in calibrated.exit_points(manifest)
    ]
    yield f"exits (--exit calibrated): {', '.join(places)}{images.get('exits', '')}"
    yield (
        f"  with probability {100 * (1 - guarantee.delta):.4g}% at most {100 * guarantee.epsilon:.4g}% of predictions "
        "differ from the whole chain's, on images like those"
        + (f", with {calibrated.runs_on}" if calibrated.runs_on else "")
    )


def _card(text: str, sha256: str) -> str:
    title = next((line[2:].strip() for line in text.splitlines() if line.startswith("# ")), "without a title")
    stale = "" if sha256 in text else "; it is of another sha256: a calibration or engines came later, or went"
    return f"{title} (all of it: --card){stale}"


def _here(here: dict[str, Any]) -> Iterator[str]:
    """What runs, and what does not and why; backends that share a reason share a line."""
    if here["backend"] is None:
        yield f"no: {here['error']}"
        return
    status = f" ({here['status']})" if here["status"] else ""
    yield f"{here['backend']} on {here['device']}{status}: {here['reason']}"
    for (device, reason), others in groupby(here["passed_over"], lambda other: (other["device"], other["reason"])):
        yield f"not {', '.join(other['backend'] for other in others)} on {device}: {reason}"


def _pairs(values: Any) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return f"({_pairs(value)})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, cast('Iterable[Any]', value)))}]"
    return "none" if value is None else str(value)


def _row(label: str, text: str, *, lines: int | None = None) -> Iterator[str]:
    """Wrap a text beside its label; at most `lines` lines of it."""
    # Texts come from the file: what is no printable character must not reach the terminal.
    body = printable(text.lstrip())
    indent = " " * (_INDENT + len(text) - len(body))
    wrapped = textwrap.wrap(
        body,
        _WIDTH,
        initial_indent=f"{label:<{len(indent)}}",
        subsequent_indent=indent,
        max_lines=lines,
        placeholder=" ...",
        break_long_words=False,
        break_on_hyphens=False,
    )
    yield from wrapped or [label]
