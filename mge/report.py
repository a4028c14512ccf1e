"""The page about an evaluation: one HTML file with its images inside, to be opened anywhere and forwarded."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mge.comparison import difference
from mge.cost import RUNS
from mge.evaluation import Evaluation, Predictions, top_k_correct
from mge.figures import confusions, cost_cells, expert_table, percent
from mge_runtime.decode import MAX_PIXELS, decode_image
from mge_runtime.draw import Canvas, blend_heatmap, draw_boxes, expert_color, seen
from mge_runtime.errors import InputError, printable
from mge_runtime.files import atomic_path
from mge_runtime.metrics import log_softmax, mean_interval
from mge_runtime.prediction import softmax

_PAIRS, _ERRORS, _RIGHT = 12, 6, 6  # examples of each kind
_LONGEST, _SEEN, _GAP = 248, 120, 8  # pixels: of the image, of what an expert saw, between them
_QUALITY = 82  # of the JPEGs; some 20 kB each
_NLL_RESAMPLES = 2000

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #20242a; background: #fff; max-width: 1120px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 2em 0 .4em }
p { max-width: 75ch } .muted, figcaption small { color: #616972 } .warning { border-left: 4px solid #e69f00;
  padding: .3em .8em; background: #fff7e6 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2em .8em .2em 0; text-align: right; border-bottom: 1px solid #e7eaee; white-space: nowrap }
th { color: #616972; font-weight: 600 } th:first-child, td:first-child, .text { text-align: left }
td.text { white-space: normal } tr.output td { font-weight: 600 }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1.6em 2em }
figure { margin: 0 } figure img { display: block; max-width: 100% }
figcaption { font-size: .93em; margin-top: .3em } figcaption small { display: block }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .9em }
"""


def write_report(path: Path, result: dict[str, Any], evaluation: Evaluation, max_pixels: int = MAX_PIXELS) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the HTML file.
        result: by `mge.figures.figures`.
        evaluation: that they were made of; names in it may hold any characters.
        max_pixels: the most that an image may have.

    Raises:
        InputError: there is a single image, or one of an example cannot be read any more.
        OutputError: the file cannot be written.
    """
    predictions, config = evaluation.predictions, evaluation.model
    if len(predictions.labels) < 2:
        raise InputError(f"{evaluation.folder} holds one image; expected two at least, which a report compares")
    examples = _Examples(evaluation, max_pixels)
    title = f"{evaluation.name} on {'/'.join(evaluation.folder.resolve().parts[-2:])}"
    sizes = config.get("image_sizes") or [config.get("image_size")]
    gate = f", gate: {config.get('gate')}" if len(result["gate"]) > 1 else ""
    model = (
        f"{config.get('experts')} x {config.get('arch')}, {', '.join(map(str, sizes))} px{gate}; "
        f"{result['images']} images of {len(result['classes'])} classes"
    )
    parts = [
        f'<h1>{_text(title)}</h1><p class="muted">{_text(model)}</p>',
        *(f'<p class="warning">{_text(warning)}</p>' for warning in result["warnings"]),
        *_ablation(result, predictions),
        *_experts(result),
        *_confused(examples),
        *_chosen(examples),
        *_classes(result),
        f'<p class="muted">Written by mge-eval {version("mge")}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC.</p>',
    ]
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _text(text: str) -> str:
    """Any text as HTML that shows it."""
    return html.escape(printable(text))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], output: str = "", texts: Sequence[str] = ()) -> str:
    """A table of plain text: numbers to the right but in the columns `texts`, the row called `output` in bold."""
    kinds = [' class="text"' if title in texts else "" for title in titles]
    head = "".join(f"<th{kind}>{_text(title)}</th>" for kind, title in zip(kinds, titles, strict=True))
    body: list[str] = []
    for row in rows:
        cells = "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        body.append(f'<tr class="output">{cells}</tr>' if row[0] == output else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(body) + "</table></div>"


def _ablation(result: dict[str, Any], predictions: Predictions) -> list[str]:
    """What each head, combination and the exits are worth, and what they cost."""
    labels, final = predictions.labels, predictions.final
    right = top_k_correct(final, labels)
    logits, heads = dict(predictions.heads), list(result["heads"])
    if predictions.exits is not None:
        logits["with early exits"] = predictions.exits.logits
        heads.append({"name": "with early exits", "top5": None, "ece": None, **result["exits"]})
    rows: list[list[str]] = []
    changes: dict[str, str] = {}
    for row in heads:
        found = logits[row["name"]]
        losses = -log_softmax(found)[np.arange(len(labels)), labels]
        nll = mean_interval(losses, resamples=_NLL_RESAMPLES)
        change = difference(right, top_k_correct(found, labels)).change
        changes[row["name"]] = f"{100 * change.value:+.2f} [{100 * change.low:+.2f}, {100 * change.high:+.2f}]"
        rows.append(
            [
                row["name"],
                percent(row),
                "" if found is final else changes[row["name"]],
                *("" if row[name] is None else f"{100 * row[name]:.2f}" for name in ("top5", "ece")),
                f"{nll.value:.3f} [{nll.low:.3f}, {nll.high:.3f}]",
                *cost_cells(row),
            ]
        )
    last = result["heads"][-1]
    titles = ["", "top-1 % [95 %]", "minus output, points [95 %]", "top-5 %", "ECE %", "NLL [95 %]", "GMACs", "ms"]
    lead = f"The output ({last['name']}) is right for {percent(last)} % of the images."
    alone = next(row for row in result["heads"] if row["name"] == "expert 1")
    if alone is not last:
        price = "" if alone["gmacs"] is None else f", at {100 * alone['gmacs'] / last['gmacs']:.0f} % of the operations"
        lead += f" Expert 1 alone{price}: {percent(alone)} %, {changes['expert 1']} points."
    if exits := result["exits"]:
        stopped = ", ".join(f"{100 * share:.0f} % after expert {k}" for k, share in enumerate(exits["stopped"], 1))
        lead += f" With early exits images stop: {stopped}; {exits['other_class']} get another class than without."
    notes = ["Intervals: 95 %, over images; Wilson's for top-1, paired bootstrap for differences, bootstrap for NLL."]
    if cost := result["cost"]:
        notes.append(
            "Cost of one image, of all that a row needs: GMACs of convolutions and products; ms, the median of "
            f"{RUNS} runs, {cost['measured']}."
        )
    if last["calibrated_nll"] is not None:
        notes.append(
            f"All rows are before any temperature. After the bundle's, {result['temperature']:.3f}, the output has "
            f"NLL {last['calibrated_nll']:.3f} and ECE {100 * last['calibrated_ece']:.2f} %."
        )
    notes.append("ECE: 15 bins of equal mass.")
    return [
        f"<p>{_text(lead)}</p>",
        "<h2>What each part is worth</h2>",
        _table(titles, rows, last["name"]),
        f'<p class="muted">{_text(" ".join(notes))}</p>',
    ]


def _experts(result: dict[str, Any]) -> list[str]:
    """Gate and crops; nothing of a single network."""
    if len(result["gate"]) == 1:
        return []
    titles, rows = expert_table(result)
    note = (
        f"Gate: mean weights; their mean entropy is {100 * result['gate_entropy']:.0f} % of the most there can be. "
        "Crop area: the median share that an expert's crop keeps of the view before; view area: of the first view."
    )
    return ["<h2>Gate and crops</h2>", _table(titles, rows), f'<p class="muted">{_text(note)}</p>']


def _confused(examples: _Examples) -> list[str]:
    """The most confused pairs, the most confident image of each."""
    predictions = examples.evaluation.predictions
    classes = predictions.classes
    of_class = np.bincount(predictions.labels, minlength=len(classes))
    confidence, predicted = examples.confidence, predictions.final.argmax(1)
    figures: list[str] = []
    for label, other, count in confusions(predictions)[:_PAIRS]:
        found = np.flatnonzero((predictions.labels == label) & (predicted == other))
        note = f"{count} of {of_class[label]} {classes[label]}"
        figures.append(examples.figure(int(found[confidence[found].argmax()]), note))
    keys = "".join(
        f'<span class="key" style="background: rgb{expert_color(k)}"></span>expert {k + 1}'
        for k in range(predictions.gate.shape[1])
    )
    note = "Each image with what the experts saw of it; beside it their views, below these their attention."
    return ["<h2>Most confused pairs</h2>", f'<p class="muted">{note} {keys}</p>', *_gallery(figures)]


def _chosen(examples: _Examples) -> list[str]:
    """The most confident errors that were not shown yet, and some images that are right."""
    predictions = examples.evaluation.predictions
    right = top_k_correct(predictions.final, predictions.labels)
    order = np.argsort(-examples.confidence, kind="stable")
    wrong = [int(i) for i in order if not right[i] and i not in examples.shown][:_ERRORS]
    alone = top_k_correct(predictions.heads["expert 1"], predictions.labels)
    gained, same = np.flatnonzero(right & ~alone), np.flatnonzero(right & alone)
    good = np.concatenate([_spread(gained, _RIGHT // 2), _spread(same, _RIGHT)])[:_RIGHT].tolist()
    first = f": first of the {len(gained)} that expert 1 alone gets wrong" if len(gained) else ""
    return [
        "<h2>Other confident errors</h2>",
        *_gallery([examples.figure(i) for i in wrong]),
        f"<h2>Correct{first}</h2>",
        *_gallery([examples.figure(i) for i in good]),
    ]


def _spread(found: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of an array, evenly."""
    return found[np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)]


def _gallery(figures: Sequence[str]) -> list[str]:
    return ['<div class="examples">', *figures, "</div>"] if figures else ["<p>None.</p>"]


def _classes(result: dict[str, Any]) -> list[str]:
    """Every class, the least accurate first."""
    taken: dict[str, list[str]] = {}
    for row in result["confusions"]:
        taken.setdefault(row["class"], []).append(f"{row['predicted']} {row['images']}")
    numbers = range(1, len(result["gate"]) + 1) if len(result["gate"]) > 1 else ()
    rows = [
        [
            row["class"],
            str(row["images"]),
            percent(row, 0),
            *(f"{100 * row['experts'][k - 1]:.0f}" for k in numbers),
            ", ".join(taken.get(row["class"], [])[:3]),
        ]
        for row in result["classes"]
    ]
    titles = ["class", "images", "top-1 % [95 %]", *(f"expert {k} %" for k in numbers), "taken for"]
    return ["<h2>Classes, the least accurate first</h2>", _table(titles, rows, texts=["taken for"])]


class _Examples:
    """Draws images with what was predicted for them."""

    def __init__(self, evaluation: Evaluation, max_pixels: int) -> None:
        self.evaluation = evaluation
        self._names, self._max_pixels = evaluation.names, max_pixels
        predictions = evaluation.predictions
        self.confidence = softmax(predictions.final.astype(np.float64) / (predictions.temperature or 1.0)).max(1)  # [N]
        self.shown: set[int] = set()

    def figure(self, index: int, note: str = "") -> str:
        """An image, the classes, what each expert says."""
        self.shown.add(index)
        found, name = self.evaluation.predictions, self._names[index]
        classes = found.classes
        true, predicted = classes[found.labels[index]], classes[found.final[index].argmax()]
        arrow = f"{true} \u2192 {predicted}" if true != predicted else true
        votes: list[str] = []
        for k in range(1, found.gate.shape[1] + 1):
            shares = softmax(found.heads[f"expert {k}"][index])
            said = classes[shares.argmax()]
            votes.append(f"expert {k}: {said} {shares.max():.0%}" + (", which is right" * (said == true != predicted)))
        small = "".join(f"<small>{_text(line)}</small>" for line in (note, *votes, name) if line)
        data = base64.b64encode(self._draw(index)).decode()
        image = f'<img alt="{_text(f"{name} and what each expert saw")}" src="data:image/jpeg;base64,{data}">'
        caption = f"<b>{_text(arrow)}</b> {self.confidence[index]:.0%}{small}"
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"

    def _draw(self, index: int) -> bytes:
        """The image with its boxes, beside it what each expert saw above its attention: a JPEG file."""
        predictions, (path, _) = self.evaluation.predictions, self.evaluation.samples[index]
        image, boxes = decode_image(path, self._max_pixels), predictions.views[index]
        boxed = draw_boxes(image, boxes, _LONGEST, tags=False)
        width = boxed.width + len(boxes) * (_GAP + _SEEN)
        canvas = Canvas.blank(width, max(boxed.height, 2 * _SEEN + _GAP))
        canvas.paste(boxed, 0, 0)
        for k, (box, heatmaps) in enumerate(zip(boxes, predictions.heatmaps, strict=True)):
            view, left = seen(image, box, _SEEN), boxed.width + _GAP + k * (_GAP + _SEEN)
            canvas.paste(view, left, 0, outline=expert_color(k))
            heat = blend_heatmap(view, np.asarray(heatmaps[index]))
            canvas.paste(heat, left, _SEEN + _GAP, outline=expert_color(k))
        buffer = io.BytesIO()
        canvas.image.save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue()
