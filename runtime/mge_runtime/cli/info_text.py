"""The text of `mge-info`: ten lines of a bundle, or all of it."""

from __future__ import annotations

import functools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, cast

from mge_runtime.bundle.layout import cpu_graph_entry, graph_entry, weights_entry
from mge_runtime.calibrated import Calibrated
from mge_runtime.errors import BundleError, printable
from mge_runtime.files import format_bytes
from mge_runtime.machine import Machine
from mge_runtime.manifest import Manifest

__all__ = ["brief_lines", "info_lines", "parity_lines"]

_WIDTH = 110  # characters
_INDENT = 11


def brief_lines(facts: dict[str, Any], manifest: Manifest) -> Iterator[str]:
    """Ten lines, from what `describe` returned; more only where nothing runs."""
    yield from _bundle(facts)
    yield from _row("model", _pairs(manifest.model) or "unknown", lines=1)
    yield from _row("classes", _classes(manifest), lines=1)
    yield from _row("input", _input(manifest), lines=1)
    kinds = Counter(manifest.precision.get(graph.name, {}).get("type", "unknown") for graph in manifest.graphs)
    yield from _row("precision", ", ".join(f"{kind} in {count} graphs" for kind, count in kinds.items()), lines=1)
    parity = parity_lines(manifest.parity)
    failed = [line for line in parity if line.startswith("out of tolerance")]
    yield from _row("parity", "; ".join(failed or parity[:1]), lines=1)
    found = [*facts["engines"], *(f"{engine['target']} in the cache" for engine in facts["cached_engines"])]
    yield from _row("engines", ", ".join(found) or "none; ONNX alone", lines=1)
    yield from _row("calibrated", "; ".join(_calibration(facts["calibration"], manifest)), lines=1)
    runs = next(_here(facts["here"]))
    yield from _row(_runs_label(facts), runs, lines=None if facts["here"]["backend"] is None else 1)


def info_lines(facts: dict[str, Any], manifest: Manifest, machine: Machine) -> Iterator[str]:
    """Everything for people, from what `describe` returned."""
    yield from _bundle(facts)
    if manifest.model:
        yield from _row("model", _pairs(manifest.model))
    yield from _row("classes", _classes(manifest), lines=3)
    yield from _row("input", _input(manifest))
    made = [f"{name} {version}" for name, version in manifest.tools.items()]
    checkpoint = manifest.checkpoint_sha256
    yield from _row("made by", ", ".join(made) or "unknown tools")
    yield from _row("", f"from the checkpoint {checkpoint[:16]}" if checkpoint else "from an unknown checkpoint")
    yield from _graphs(manifest, facts["entries"])
    yield from _rows("parity", parity_lines(manifest.parity))
    yield from _rows("engines", _engines(facts))
    yield from _rows("calibrated", _calibration(facts["calibration"], manifest))
    yield from _row("machine", machine.summary)
    yield from _rows(_runs_label(facts), _here(facts["here"]))
    yield from _row("", "everything, operators and the whole parity report included: --json")


def parity_lines(parity: Any) -> list[str]:
    """The export's parity report: what it was measured on, a line for each check, what failed."""
    if parity is None:
        return ["not measured"]
    head = f"on {parity.get('source', 'unknown images')}; reference: {parity.get('reference', 'unknown')}"
    return [head, *_parity_checks(parity)]


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
def _parity_checks(parity: Any) -> Iterator[str]:
    for check in parity["checks"].values():
        chain = check["chain"]
        alone = [float(value) for graph in check["graphs"].values() for value in graph["relative"].values()]
        ious = [float(box["p1"]) for box in chain["box_iou"].values()]
        yield (
            f"{check['label']}: each graph within {max(alone):.1e} of its tensors' largest value, the chain's logits "
            f"within {float(chain['answer_relative']):.1e}; {chain['class_changes']} images change their class"
            + (f"; 1st percentile of box IoU {min(ious):.3f}" if ious else "")
        )
    yield from (f"out of tolerance: {text}" for text in parity["failures"])
    yield from (f"warning: {text}" for text in parity["warnings"])


def _bundle(facts: dict[str, Any]) -> Iterator[str]:
    yield from _row("bundle", f"{facts['path']}, {format_bytes(facts['size'])} (more: --all)")
    checked = ", every entry matches its hash" if facts.get("verified") else ""
    yield from _row("sha256", f"{facts['sha256']}{checked}")


def _classes(manifest: Manifest) -> str:
    return f"{len(manifest.class_names)}: {', '.join(manifest.class_names)}"


def _input(manifest: Manifest) -> str:
    values = manifest.preprocess
    return (
        f"RGB, shorter side to {values.resize}, center crop {values.size} x {values.size}, "
        f"mean {_plain(values.mean)}, std {_plain(values.std)}"
    )


def _graphs(manifest: Manifest, sizes: dict[str, int]) -> Iterator[str]:
    for graph in manifest.graphs:
        size = sum(sizes.get(entry(graph.name), 0) for entry in (graph_entry, cpu_graph_entry, weights_entry))
        plan = dict(manifest.precision.get(graph.name, {}))
        precision = plan.pop("type", "of unknown precision")
        attested = plan.pop("attested", None)
        gmacs = manifest.gmacs[graph.name]
        yield from _row("graph", f"{graph.name}: {precision}, {gmacs:.3g} GMACs, {format_bytes(size)}")
        yield from _row("", f"  precision {f'attested: {attested}' if attested else 'not attested'}")
        # Tables, such as counts of operators, are for --json.
        if scalars := {key: value for key, value in plan.items() if not isinstance(value, (dict, list))}:
            yield from _row("", f"  {_pairs(scalars)}")
        for label, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            texts = [f"{t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors]
            yield from _row("", f"  {label:<4}{'; '.join(texts)}")


def _engines(facts: dict[str, Any]) -> Iterator[str]:
    named = [*facts["engines"].items(), *((f"{e['target']} {e['place']}", e) for e in facts["cached_engines"])]
    for name, engine in named:
        plans = engine["plans"]
        yield f"{name}: {len(plans)} graphs, {format_bytes(sum(plans.values()))}, {engine['status']}"
        yield from _engine_details(engine["details"])
        yield "  fits the machine" if engine["misfit"] is None else f"  does not fit: {engine['misfit']}"
    if not named:
        yield "none; ONNX alone"


@_free_json
def _engine_details(details: Any) -> Iterator[str]:
    gpu, (least, _, most) = details["gpu"], details["batch"]
    place = f"on {gpu['name']} ({gpu['capability']})" if gpu else "ahead of time, without a GPU"
    yield f"  built by version {details['version']}, {place}, for batch {least} to {most}"
    graphs: dict[str, list[str]] = {}
    for graph, record in details["precision"].items():
        attested = record.get("attested")
        kind = f"{record['type']} ({f'attested: {attested}' if attested else 'not attested'})"
        graphs.setdefault(kind, []).append(graph)
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
    if not calibrated.has_exits or (promise := calibrated.promise) is None:
        yield "no early exits: none was found that keeps its bound"
        return
    places = [
        f"after graph {point.graphs} where {point.answer} has a confidence of at least {point.threshold:.6g}"
        for point in calibrated.exit_points(manifest)
    ]
    yield f"exits (--exit calibrated): {', '.join(places)}{images.get('exits', '')}"
    yield (
        f"  with probability {100 * (1 - promise.delta):.4g}% at most {100 * promise.epsilon:.4g}% of predictions "
        "differ from the whole chain's, on images like those"
        + (f", with {calibrated.runs_on}" if calibrated.runs_on else "")
    )


def _runs_label(facts: dict[str, Any]) -> str:
    return "runs there" if facts["here"]["recorded"] else "runs here"


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


def _rows(label: str, texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield from _row("" if number else label, text)


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
