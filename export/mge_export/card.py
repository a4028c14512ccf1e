"""The model card of a bundle, its author's words and what was measured; and the folder that the Hub takes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mge.evaluation import Label, evaluate_bundle, find_labeled
from mge.figures import cost_cells, figures, percent
from mge_runtime.bundle import Bundle, add_card
from mge_runtime.bundle.reader import LABELS
from mge_runtime.cli.info import describe
from mge_runtime.cli.info_text import subjects
from mge_runtime.errors import BundleError, InputError, OutputError, brief
from mge_runtime.fields import LARGEST
from mge_runtime.files import atomic_path
from mge_runtime.machine import describe_machine

_CARD = re.compile(r"---\n(.*?)^---\n(.*)", re.DOTALL | re.MULTILINE)
_FRONT = {"library_name": "mge", "pipeline_tag": "image-classification"}  # what the Hub files a model under
_PLAN = "mge.plan"  # its name on the Hub
_SECTIONS = ("Data", "Limits")  # that no tool can write
_SUBJECTS = ("model", "classes", "input", "precision", "graphs", "made by")  # of `mge-info`
_WORST = 3  # classes and confusions that are named
_USE = """\
```sh
mge-run --engine {name} IMAGES...    # --save DIR draws where each expert looked
mge-info {name}                      # what is inside, what would run here and why
```

```python
from mge_runtime import Pipeline

with Pipeline.open("{name}") as pipeline:
    prediction = pipeline.predict("image.jpg")
print(prediction.class_name, prediction.probability)
```"""


@dataclass(frozen=True)
class Words:
    """What the author says of a model and no tool can know: data, license, limits."""

    front: dict[str, Any]  # the YAML front matter that the Hub reads
    text: str  # Markdown

    @classmethod
    def read(cls, path: Path) -> Words:
        """Read a Markdown file that begins with YAML front matter.

        Raises:
            InputError: it cannot be read, names no license or lacks a section.
        """
        expected = "expected Markdown that begins with YAML between two lines ---, with `license: mit` or another in it"
        try:
            with path.open(encoding="utf-8") as file:
                found = _CARD.fullmatch(file.read(LARGEST))
            front = yaml.safe_load(found[1]) if found else None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"cannot read the model card {path}: {brief(error)}; {expected}") from error
        if found is None or not isinstance(front, dict) or not front.get("license"):
            raise InputError(f"the model card {path} names no license; {expected}")
        if missing := [name for name in _SECTIONS if not re.search(rf"^#+ {name}\b", found[2], re.MULTILINE)]:
            raise InputError(f"the model card {path} has no section {missing[0]}; expected a line `## {missing[0]}`")
        return cls(front, found[2].strip())


@dataclass(frozen=True)
class CardRequest:
    """What a card is to be made of."""

    words: Words
    images: tuple[Path, Path, Label] | None  # to measure accuracy on, as `find_labeled` found them
    source: str  # what these are called
    max_pixels: int

    @classmethod
    def read(cls, words: Path, data: Path | None, max_pixels: int, say: Callable[[str], None]) -> CardRequest:
        """Read the author's words, and find the test images of `data`; None: accuracy is not measured.

        Raises:
            InputError: as for `Words.read`, or there are no such images.
        """
        said = Words.read(words)
        if data is None:
            return cls(said, None, "", max_pixels)
        images = folder, root, _ = find_labeled(data, "test", say)
        place = data if folder == root else folder  # a list's folder is that of all its splits
        return cls(said, images, "/".join(place.resolve().parts[-2:]), max_pixels)

    def attach(self, path: Path, name: str) -> None:
        """Run the bundle over the test images, write its card and attach it.

        Args:
            path: the bundle, in its place or about to take it.
            name: of its file, for the commands in the card.

        Raises:
            InputError: a test image cannot be read.
            BundleError: the bundle cannot be read, or was changed meanwhile.
            OutputError: it cannot be written.
        """
        with Bundle.open(path) as bundle:
            bundle.check_writable()
            machine, sha256 = describe_machine(), bundle.sha256
            told = dict(subjects(describe(bundle, machine), bundle.manifest, machine))
        facts = [f"- {key}: {'; '.join(x for x in told[key] if not x.startswith(' '))}" for key in _SUBJECTS]
        facts.append(f"- parity: {next(iter(told['parity']))} (`mge-info {name} --all`)")
        facts.append(f"- sha256: `{sha256}` (`mge-info {name} --verify SHA256`)")
        front, accuracy = {**_FRONT, **self.words.front}, ["Not measured."]
        if self.images is not None:
            found = figures(evaluate_bundle(path, *self.images, max_pixels=self.max_pixels))
            accuracy = _accuracy(found, self.source)
            front = {**_model_index(found, self.source, Path(name).stem), **front}
        sections = {
            "Accuracy": "\n".join(accuracy),
            "Calibration": "\n".join(f"- {text.strip()}" for text in told["calibrated"]),
            "Bundle": "\n".join(facts),
            "Use": _USE.format(name=name),
        }
        header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
        body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
        add_card(path, f"---\n{header}---\n\n{self.words.text}\n\n{body}\n", sha256=sha256)


def _model_index(found: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    """The accuracy of the final predictions as the Hub lists it: https://github.com/huggingface/hub-docs."""
    count, row = found["images"], found["heads"][-1]
    metrics = [
        {"type": "accuracy", "name": f"Top-{k} accuracy of {count} images", "value": round(float(row[f"top{k}"]), 4)}
        for k in (1, 5)
    ]
    dataset = {"name": source, "type": "imagefolder"}
    result = {"task": {"type": _FRONT["pipeline_tag"]}, "dataset": dataset, "metrics": metrics}
    return {"model-index": [{"name": name, "results": [result]}]}


def _accuracy(found: Mapping[str, Any], source: str) -> Iterator[str]:
    yield (
        f"On the {found['images']} images of {source}, by this bundle; GMACs and ms are of one image, "
        f"{found['cost']['measured']}."
    )
    yield "\n| | top-1 % [95 % interval] | top-5 % | ECE % | GMACs | ms |\n|---|---|---|---|---|---|"
    for row in found["heads"]:
        ece = f"{100 * row['ece']:.1f}"
        if row["calibrated_ece"] is not None:
            ece += f", calibrated {100 * row['calibrated_ece']:.1f}"
        yield f"| {row['name']} | {percent(row, 1)} | {100 * row['top5']:.1f} | {ece} | {' | '.join(cost_cells(row))} |"
    if exits := found["exits"]:
        yield f"| early exits | {percent(exits, 1)} | | | {' | '.join(cost_cells(exits))} |"
    worst = [f"{row['class']} {100 * row['top1']:.0f} % of {row['images']}" for row in found["classes"][:_WORST]]
    taken = [f"{row['class']} for {row['predicted']} ({row['images']})" for row in found["confusions"][:_WORST]]
    yield f"\nLeast accurate: {', '.join(worst)}. Most often confused: {', '.join(taken) or 'none'}."


def _hub_files(bundle: Bundle) -> dict[str, bytes]:
    """What lies beside a bundle in a repository of the Hub, by name.

    Raises:
        InputError: it has no card.
    """
    if (card := bundle.card()) is None:
        raise InputError(f"{bundle.path} has no model card, which the Hub shows; add one with --card FILE")
    labels = "".join(f"{name}\n" for name in bundle.manifest.class_names)
    words, title, ours = card.rpartition("\n## Bundle\n")
    if named := re.search(r"^mge-run --engine (.+) IMAGES", ours, re.MULTILINE):  # the file, when it was written
        name = re.escape(named[1])
        ours = re.sub(rf'((?:mge-info |--engine |open\("))(?:{name})', rf"\g<1>{_PLAN}", ours)
    return {"README.md": (words + title + ours).encode(), LABELS: labels.encode()}


def check_hub_folder(folder: Path, path: Path) -> None:
    """Check that `write_hub_folder` replaces nothing but what it wrote.

    Args:
        folder: where to.
        path: the bundle, which may lie there itself.

    Raises:
        OutputError: the folder holds a README.md, mge.plan or labels.txt that is something else.
    """
    held = [file for name in (_PLAN, "README.md", LABELS) if os.path.lexists(file := folder / name)]
    with suppress(BundleError, InputError, OSError):  # what stays is not as it was written
        if held == [folder / _PLAN] and held[0].samefile(path):
            return
        if held:
            with Bundle.open(folder / _PLAN) as bundle:
                files = _hub_files(bundle)
            others = [file for file in held if file.name in files]
            held = [file for file in others if not file.is_file() or file.read_bytes() != files[file.name]]
    if held:
        raise OutputError(
            f"{held[0]} is not what --hf wrote, or was edited since; move it away, or name a new folder for --hf"
        )


def write_hub_folder(path: Path, folder: Path) -> list[Path]:
    """Write what a model repository of the Hugging Face Hub holds: README.md, the card; mge.plan; labels.txt.

    Args:
        path: a bundle with a card.
        folder: where to; files of the same names are replaced when all are written: `check_hub_folder` before.

    Returns:
        The files that were written.

    Raises:
        BundleError: the bundle cannot be read.
        InputError: it has no card.
        OutputError: the folder cannot be written.
    """
    with Bundle.open(path) as bundle, ExitStack() as stack:
        files, watched = _hub_files(bundle), bundle.watched()
        with suppress(OSError):  # atomic_path says what is wrong with the folder
            folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            stack.enter_context(atomic_path(folder / name)).write_bytes(data)
        copy = stack.enter_context(atomic_path(folder / _PLAN))
        with open(watched.descriptor, "rb", closefd=False) as content, copy.open("wb") as stream:
            content.seek(0)  # of the file that was opened, whatever lies in its place by now
            shutil.copyfileobj(content, stream)
        watched.check()
    return [folder / name for name in (*files, _PLAN)]
