"""The architecture, classes and preprocessing of one model, stored in its checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mge_runtime.errors import BundleError, CheckpointError, brief
from mge_runtime.fields import Field
from mge_runtime.manifest import Crops, Preprocess, read_class_names, read_preprocess

PAPER_THRESHOLD = 0.2  # `--box_thred` of the authors' code
GATES = ("network", "shared", "none")
SHARINGS = ("none", "backbone")
_LABELS = "expected a UTF-8 text file with one class name a line"


@dataclass(frozen=True)
class MGEConfig:
    """What it takes to build an `MGENet`; the defaults are the paper's.

    Raises:
        CheckpointError: a value is out of its range.
    """

    arch: str  # a timm model name that offers features_only
    classes: tuple[str, ...]  # names, by class index
    experts: int = 3  # K >= 1, experts in the chain
    image_size: int = 448  # pixels, S, a multiple of 16, the side of the first expert's square input
    resize: int = 512  # pixels, the shorter side before the center crop of the frame, >= its side
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per RGB channel in [0, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per RGB channel, > 0
    box_thresholds: tuple[float, ...] = (PAPER_THRESHOLD, PAPER_THRESHOLD)  # in [0, 1), one for each of the K - 1 crops
    parts_per_class: int = 10  # channels of the part convolution for each class
    gate_width: int = 512  # hidden units of the gate's network
    normalize_features: bool = False  # BatchNorm before the heads, for backbones whose last features are linear
    attention_head: str = "own"  # whose global head Grad-CAM reads: "own", each expert's; "first", always expert 1's
    gate: str = "network"  # what weighs the experts: "network", a backbone of its own; "shared", a linear layer over
    # the experts' pooled features; "none", weights that are the same for every image
    sharing: str = "none"  # "backbone": one for all experts, BatchNorms included, whose heads and feature norms stay
    # their own; a gate's own backbone stays its own
    image_sizes: tuple[int, ...] = ()  # pixels, one for each expert, the first is image_size; (): image_size for all
    source_size: int = 0  # pixels, N, a multiple of image_size: crops are cut from a frame of this side; 0: each from
    # the image of the expert before

    def __post_init__(self) -> None:
        size, crops = self.image_size, self.experts - 1
        checks = [
            # timm takes "hf-hub:...", "local-dir:..." and more for a place to fetch a model from
            (re.fullmatch(r"[\w.]+", self.arch, re.ASCII), "arch", "a CNN of timm itself, nothing is fetched"),
            (len(self.classes) >= 2, "classes", "at least two names"),
            (self.experts >= 1, "experts", "at least 1"),
            (size >= 32 and size % 16 == 0, "image_size", "a multiple of 16 pixels, the stride of c4"),
            (
                not self.image_sizes or (len(self.image_sizes) == self.experts and self.image_sizes[0] == size),
                "image_sizes",
                f"{self.experts}, one for each expert, the first {size} as image_size",
            ),
            (all(s >= 32 and s % 16 == 0 for s in self.image_sizes), "image_sizes", "multiples of 16 pixels"),
            (self.source_size % size == 0, "source_size", f"0, or a multiple of image_size ({size})"),
            (
                self.resize >= self.frame_size,
                "resize",
                f"at least {'source_size' if self.source_size else 'image_size'} ({self.frame_size})",
            ),
            (len(self.box_thresholds) == crops, "box_thresholds", f"{crops}, one for each crop"),
            (all(0 <= t < 1 for t in self.box_thresholds), "box_thresholds", "numbers in [0, 1)"),
            (self.parts_per_class >= 1, "parts_per_class", "at least 1"),
            (self.gate in GATES, "gate", " or ".join(map(repr, GATES))),
            (self.sharing in SHARINGS, "sharing", " or ".join(map(repr, SHARINGS))),
            (self.gate_width >= 1, "gate_width", "at least 1"),
            (self.attention_head in ("own", "first"), "attention_head", "'own' or 'first'"),
        ]
        for good, name, expected in checks:
            if not good:
                found = repr(getattr(self, name))
                found = found if len(found) <= 80 else found[:77] + "..."
                raise CheckpointError(f"model config: {name} is {found}; expected {expected}")
        try:  # what no bundle may hold is refused before it is trained
            advice = "it could not be exported"
            read_class_names(Field(list(self.classes), "classes", "model config", advice))
            read_preprocess(
                Field(json.loads(json.dumps(asdict(self.preprocess))), "preprocess", "model config", advice)
            )
        except BundleError as error:
            raise CheckpointError(str(error)) from error

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.classes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each expert's image in pixels."""
        return self.image_sizes or (self.image_size,) * self.experts

    @property
    def frame_size(self) -> int:
        """Side of the chain's input in pixels."""
        return self.source_size or self.image_size

    @property
    def crops(self) -> Crops:
        """What the boxes of its chain are pixels of."""
        return Crops(self.sizes, self.source_size)

    @property
    def preprocess(self) -> Preprocess:
        """What the runtime does to a decoded image before the chain."""
        return Preprocess(resize=self.resize, size=self.frame_size, mean=self.mean, std=self.std)

    def changed(self, **changes: Any) -> MGEConfig:
        """The same model with other fields; one box threshold is for all crops.

        In proportion follow the later experts' sizes that of the first, and `resize` the frame's side.

        Raises:
            CheckpointError: a value is out of its range.
        """
        if sizes := changes.get("image_sizes"):
            changes.setdefault("image_size", sizes[0])
        size = changes.get("image_size", self.image_size)
        if self.image_sizes and size != self.image_size:
            later = (nearest_side(side * size / self.image_size) for side in self.image_sizes[1:])
            changes.setdefault("image_sizes", (size, *later))
        if (frame := changes.get("source_size", self.source_size) or size) != self.frame_size:
            changes.setdefault("resize", round(frame * self.resize / self.frame_size))
        if len(thresholds := changes.get("box_thresholds", ())) == 1:
            changes["box_thresholds"] = thresholds * (changes.get("experts", self.experts) - 1)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint (lists for tuples)."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MGEConfig:
        """Read what `to_dict` wrote.

        Raises:
            CheckpointError: a field is unknown, missing, of the wrong type or out of its range.
        """
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise CheckpointError(f"model config: unknown field {unknown[0]!r}; a newer mge wrote it, upgrade this one")
        if missing := sorted({"arch", "classes"} - set(values)):
            raise CheckpointError(f"model config: field {missing[0]!r} is missing; expected a config that mge wrote")
        try:
            return cls(**{key: _read(str(known[key].type), value) for key, value in values.items()})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"model config: {error}; expected a config that mge wrote") from error


def nearest_side(pixels: float) -> int:
    """A side of an image in pixels, a multiple of 32, the stride of backbones."""
    return max(32, round(pixels / 32) * 32)


def _read(kind: str, value: Any) -> Any:
    """A field's value, checked against its annotation; bool is an int to isinstance, not here."""
    if kind.startswith("tuple["):
        item = kind[len("tuple[") :].partition(",")[0]
        return tuple(float(v) if item == "float" else _read(item, v) for v in value)
    if type(value).__name__ != kind:
        raise TypeError(f"found {value!r} where {kind} belongs")
    return value


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names, one a line, in the order of the class indices.

    Spaces around a name and empty lines at the end do not count. Where *every* line begins with its own number, counted
    from 0 or 1, as in CUB-200-2011's `classes.txt` ("1 001.Black_footed_Albatross"), the number is left out.

    Raises:
        CheckpointError: the file is missing, no file, no text or empty, or a name is empty or stands there twice.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise CheckpointError(f"cannot read the labels {path}: it is a folder, a pipe or a device; {_LABELS}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the labels {path}: {brief(error)}; {_LABELS}") from error
    names = _without_numbers([line.strip() for line in text.rstrip().splitlines()])
    if not names or "\0" in text:
        raise CheckpointError(f"the labels {path} hold no names; {_LABELS}")
    for line, name in enumerate(names, 1):
        if not name:
            raise CheckpointError(f"the labels {path} have no name on line {line}; {_LABELS}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise CheckpointError(f"the labels {path} name {twice[0]!r} more than once; expected names that differ")
    return tuple(names)


def _without_numbers(names: list[str]) -> list[str]:
    pairs = [re.fullmatch(r"(\d+)\s+(.+)", name) for name in names]
    numbered = [(int(pair[1]), pair[2]) for pair in pairs if pair is not None]
    start = numbered[0][0] if numbered else 0
    counts_up = [number for number, _ in numbered] == list(range(start, start + len(names)))
    return [name for _, name in numbered] if counts_up and start in (0, 1) else names
