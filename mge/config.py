"""The architecture and preprocessing of one model, stored in its checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mge_runtime.errors import BundleError, CheckpointError
from mge_runtime.fields import Field
from mge_runtime.manifest import Preprocess, read_class_names, read_preprocess

__all__ = ["MGEConfig"]

PAPER_THRESHOLD = 0.2  # `--box_thred` of the authors' code


@dataclass(frozen=True)
class MGEConfig:
    """What it takes to build an `MGENet`; the defaults are the paper's.

    Raises:
        CheckpointError: a value is out of its range.
    """

    arch: str  # a timm model name that offers features_only
    classes: tuple[str, ...]  # names, by class index
    experts: int = 3  # K >= 1, experts in the chain; the gate comes on top
    image_size: int = 448  # pixels, S, a multiple of 16, the side of every expert's square input
    resize: int = 512  # pixels, the shorter side before the centre crop, >= image_size
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per RGB channel in [0, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per RGB channel, > 0
    box_thresholds: tuple[float, ...] = (PAPER_THRESHOLD, PAPER_THRESHOLD)  # in [0, 1), one for each of the K - 1 crops
    parts_per_class: int = 10  # channels of the part convolution for each class
    gate_width: int = 512  # hidden units of the gate
    normalize_features: bool = False  # BatchNorm before the heads, for trunks whose last features are linear
    attention_head: str = "own"  # whose global head Grad-CAM reads: "own", each expert's; "first", always expert 1's

    def __post_init__(self) -> None:
        checks = [
            (bool(self.arch), "arch", "the name of a timm model"),
            (len(self.classes) >= 2, "classes", "at least two names"),
            (len(set(self.classes)) == len(self.classes), "classes", "names that differ"),
            (self.experts >= 1, "experts", "at least 1"),
            (
                self.image_size >= 32 and self.image_size % 16 == 0,
                "image_size",
                "a multiple of 16 pixels, the stride of c4",
            ),
            (self.resize >= self.image_size, "resize", f"at least image_size ({self.image_size})"),
            (len(self.mean) == 3 and all(math.isfinite(m) for m in self.mean), "mean", "three finite numbers"),
            (len(self.std) == 3 and all(0 < s < math.inf for s in self.std), "std", "three numbers above 0"),
            (len(self.box_thresholds) == self.experts - 1, "box_thresholds", f"{self.experts - 1}, one for each crop"),
            (all(0 <= t < 1 for t in self.box_thresholds), "box_thresholds", "numbers in [0, 1)"),
            (self.parts_per_class >= 1, "parts_per_class", "at least 1"),
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
    def preprocess(self) -> Preprocess:
        """What the runtime does to a decoded image before the chain."""
        return Preprocess(resize=self.resize, size=self.image_size, mean=self.mean, std=self.std)

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
            raise CheckpointError(
                f"model config: unknown field {unknown[0]!r}; it was written by a newer mge, upgrade this one"
            )
        if missing := sorted({"arch", "classes"} - set(values)):
            raise CheckpointError(f"model config: field {missing[0]!r} is missing; expected a config that mge wrote")
        try:
            return cls(**{key: _READERS[str(known[key].type)](value) for key, value in values.items()})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"model config: {error}; expected a config that mge wrote") from error

    def with_thresholds(self, thresholds: tuple[float, ...]) -> MGEConfig:
        """The same model with other box thresholds."""
        return replace(self, box_thresholds=thresholds)


def _exactly(kind: type) -> Any:
    def read(value: Any) -> Any:
        # bool is an int to isinstance, not to us.
        if type(value) is not kind:
            raise TypeError(f"found {value!r} where {kind.__name__} belongs")
        return value

    return read


def _floats(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value)


# Keyed by the annotation's text, so that a field of a new type cannot be read without a reader.
_READERS: dict[str, Any] = {
    "str": _exactly(str),
    "int": _exactly(int),
    "bool": _exactly(bool),
    "tuple[str, ...]": lambda value: tuple(_exactly(str)(v) for v in value),
    "tuple[float, ...]": _floats,
    "tuple[float, float, float]": _floats,
}
