"""What `mge-calibrate` learned, read and checked: temperatures of the answers, and where the chain may stop early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mge_runtime.bundle.layout import CALIBRATION
from mge_runtime.errors import BackendError
from mge_runtime.fields import Field, JsonValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.manifest import Manifest

__all__ = ["Calibrated", "ExitPoint", "Promise", "RunsOn", "confidence"]

_TEMPERATURES = (1e-3, 1e3)  # mge-calibrate fits from 0.05 to 20; beyond, softmax is one class or says nothing
_ADVICE = "calibrate again with mge-calibrate"


@dataclass(frozen=True)
class ExitPoint:
    """One place where the chain stops for the images whose answer is sure enough."""

    graphs: int  # how many have run there, from 1
    answer: str  # the tensor [B, C] that answers there
    temperature: float  # of that answer, in [0.001, 1000]
    threshold: float  # in [0, 1]: an image stops where its calibrated confidence is at least this

    def stops(self, logits: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether each image stops here, bool [B]; one whose logits are not finite goes on.

        Args:
            logits: [B, C], the answer.
        """
        return confidence(logits, self.temperature) >= self.threshold


@dataclass(frozen=True)
class Promise:
    """With probability 1 - delta at most a share epsilon of answers differs from the full chain's."""

    epsilon: float  # in (0, 1)
    delta: float  # in (0, 1)


@dataclass(frozen=True)
class RunsOn:
    """What ran a chain; rounding, and so which images stop, differs from one to the other."""

    backend: str  # "onnxruntime", "tensorrt", ...
    device: str  # "cpu", "cuda:0", ...

    def __str__(self) -> str:
        """For example "onnxruntime on cpu"."""
        return f"{self.backend} on {self.device}"

    def is_like(self, other: RunsOn) -> bool:
        """Whether both are one backend on one kind of device, whichever its number."""
        kinds = [(run.backend, run.device.partition(":")[0]) for run in (self, other)]
        return kinds[0] == kinds[1]


@dataclass(frozen=True)
class Calibrated:
    """Temperatures and exits of one bundle; `from_values` reads a calibration, `none` stands in where there is none."""

    temperatures: Mapping[str, float]  # by logits tensor, one for every graph's, > 0
    # Calibrated confidence by logits tensor at or above which the chain stops there, in [0, 1]; an answer that is
    # missing stops nothing. None: the calibration learned no exits.
    exits: Mapping[str, float] | None
    promise: Promise | None = None  # that the exits keep
    fitted: bool = True  # False: nothing was learned, the temperatures are 1
    images: Mapping[str, int] = field(default_factory=dict[str, int])  # used for "temperatures" and "exits", if told
    runs_on: RunsOn | None = None  # what answered the images; the promise holds there alone. None: not told

    @classmethod
    def none(cls, manifest: Manifest) -> Calibrated:
        """What holds without a calibration: temperature 1 everywhere, no exits."""
        return cls({graph.logits: 1.0 for graph in manifest.graphs}, None, fitted=False)

    @classmethod
    def from_values(cls, values: Mapping[str, JsonValue], manifest: Manifest) -> Calibrated:
        """Read the values of a calibration.

        Args:
            values: as in `mge_runtime.bundle.Calibration`.
            manifest: of the bundle that they belong to.

        Raises:
            BundleError: a temperature or a threshold is missing, out of range or of another type, or names no answer
                of this chain.
        """
        root = Field(dict(values), "", CALIBRATION, _ADVICE).table()
        answers = [graph.logits for graph in manifest.graphs]
        temperatures = _member(root, "temperatures").members(answers)
        exits = _member(root, "exits").optional(lambda f: f.members(("epsilon", "delta", "thresholds")))
        return cls(
            {name: f.number(*_TEMPERATURES) for name, f in temperatures.items()},
            None if exits is None else _thresholds(exits["thresholds"], answers[:-1]),
            None if exits is None else Promise(*(_share(exits[name]) for name in ("epsilon", "delta"))),
            images=_images(root),
            runs_on=root["runs_on"].optional(_runs_on) if "runs_on" in root else None,
        )

    @property
    def has_exits(self) -> bool:
        """Whether the chain may stop early anywhere."""
        return bool(self.exits)

    def remark(self, backend: str, device: str) -> str | None:
        """Why the exits' promise is not made for what runs here, in one line; None: it is, or is not told.

        Args:
            backend: that runs, such as "onnxruntime".
            device: such as "cpu" or "cuda:0".
        """
        here = RunsOn(backend, device)
        if self.runs_on is None or self.runs_on.is_like(here):
            return None
        return (
            f"the exits were learned with {self.runs_on}; it is no promise for {here}, which rounds otherwise; "
            "calibrate here for one that is (mge-calibrate)"
        )

    def exit_points(self, manifest: Manifest) -> tuple[ExitPoint, ...]:
        """Where the chain may stop, in the order in which it runs.

        Raises:
            BackendError: it may stop nowhere; the message says why and what to do.
        """
        if not self.fitted:
            raise BackendError(
                "asked for calibrated exits, but this bundle has no calibration; learn them with "
                "`mge-calibrate mge.plan --data DIR`, or run the whole chain with exit never"
            )
        if not self.exits:
            raise BackendError(
                "asked for calibrated exits, but this bundle's calibration found none that keep its promise; calibrate "
                "with more images or a larger epsilon (mge-calibrate), or run the whole chain with exit never"
            )
        return tuple(
            ExitPoint(number, graph.logits, self.temperatures[graph.logits], self.exits[graph.logits])
            for number, graph in enumerate(manifest.graphs[:-1], 1)
            if graph.logits in self.exits
        )


def confidence(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """The largest of softmax(logits / temperature) of each row, in double precision; NaN for rows that are not finite.

    Thresholds are learned and applied with this function alone. A row's value does not depend on the rows beside it.

    Args:
        logits: [..., C].
        temperature: > 0.

    Returns:
        [...], in (0, 1], or NaN, which reaches no threshold.
    """
    import numpy as np

    scaled = logits.astype(np.float64) / temperature
    with np.errstate(invalid="ignore"):
        shifted = scaled - scaled.max(-1, keepdims=True)
        sure = 1.0 / np.exp(shifted).sum(-1)
    # A single -inf would leave a probability; such a row is no answer, and `Prediction` refuses it.
    return np.where(np.isfinite(logits).all(-1), sure, np.nan)


def _member(table: Mapping[str, Field], name: str) -> Field:
    return table.get(name) or Field(None, name, CALIBRATION, _ADVICE)


def _thresholds(f: Field, answers: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in f.table().items():
        if name not in answers:
            value.fail(f"thresholds of {', '.join(answers) or 'no answer, since the chain has one graph'} alone")
        threshold = value.optional(lambda v: _between(v, 0, 1, "a confidence from 0 to 1, or null", closed=True))
        if threshold is not None:
            found[name] = threshold
    return found


def _share(f: Field) -> float:
    return _between(f, 0, 1, "a number between 0 and 1")


def _between(f: Field, low: float, high: float, expected: str, *, closed: bool = False) -> float:
    number = f.number()
    if not (low <= number <= high if closed else low < number < high):
        f.fail(expected)
    return number


def _runs_on(f: Field) -> RunsOn:
    values = f.members(("backend", "device"))
    return RunsOn(values["backend"].text(), values["device"].text())


def _images(root: Mapping[str, Field]) -> dict[str, int]:
    """How many images each part was learned from; what is not told stays out."""
    data = root["data"].optional(Field.table) if "data" in root else None
    tables = {part: f.optional(Field.table) for part, f in (data or {}).items()}
    return {part: table["images"].integer() for part, table in tables.items() if table and "images" in table}
