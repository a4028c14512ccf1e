"""The calibration that `mge-calibrate` learned: temperatures, where the chain may stop early, thresholds to reject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.bundle.archive import CALIBRATION
from mge_runtime.conformal import EXITS, Conformal
from mge_runtime.errors import BackendError
from mge_runtime.fields import Field, JsonValue
from mge_runtime.prediction import softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.manifest import Manifest


_TEMPERATURES = (1e-3, 1e3)  # mge-calibrate fits from 0.05 to 20; beyond, softmax is one class or says nothing


@dataclass(frozen=True)
class ExitPoint:
    """One place where the chain stops for the images whose logits are confident enough."""

    graphs: int  # how many have run there, from 1
    logits: str  # the tensor of logits [B, C] there
    temperature: float  # of these logits, in [0.001, 1000]
    threshold: float  # in [0, 1]: an image stops where its calibrated confidence is at least this

    def stops(self, logits: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether each image stops here, bool [B], by its logits [B, C]; one whose logits are not finite goes on."""
        return confidence(logits, self.temperature) >= self.threshold


@dataclass(frozen=True)
class Guarantee:
    """With probability 1 - delta at most a share epsilon of predicted classes differs from the full chain's."""

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


@dataclass(frozen=True)
class Calibrated:
    """Temperatures and exits of one bundle; `from_values` reads a calibration, `Calibrated()` is none."""

    temperatures: Mapping[str, float] = field(default_factory=dict[str, float])  # by logits tensor: of every graph, > 0
    # Calibrated confidence by logits tensor at or above which the chain stops there, in [0, 1]; logits that are
    # missing stop nothing. None: the calibration learned no exits.
    exits: Mapping[str, float] | None = None
    guarantee: Guarantee | None = None  # what the exits guarantee
    images: Mapping[str, int] = field(default_factory=dict[str, int])  # used for "temperatures" and "exits", if told
    why_no_exits: str | None = None  # for people; None: there are some, or it is not told
    runs_on: RunsOn | None = None  # what predicted the images; the guarantee holds there alone. None: not told
    conformal: Conformal | None = None  # what rejects, and what makes sets and coarser classes; None: not learned

    @classmethod
    def from_values(cls, values: Mapping[str, JsonValue], manifest: Manifest) -> Calibrated:
        """Read the values of a `mge_runtime.bundle.Calibration` that belongs to a manifest.

        Raises:
            BundleError: a temperature or a threshold is missing, out of range or of another type, or names no logits
                of this chain.
        """
        absent = dict.fromkeys(("temperatures", "exits", "data", "runs_on", "report", "conformal"))
        root = Field({**absent, **values}, "", CALIBRATION, "calibrate again with mge-calibrate").table()
        logits = [graph.logits for graph in manifest.graphs]
        temperatures = root["temperatures"].members(logits)
        exits = root["exits"].optional(lambda f: f.members(("epsilon", "delta", "thresholds")))
        parts = root["data"].optional(Field.table) or {}
        data = {part: f.optional(Field.table) or {} for part, f in parts.items()}
        report = root["report"].optional(Field.table) or {}
        of_exits = report["exits"].optional(Field.table) if "exits" in report else None
        thresholds = None if exits is None else _thresholds(exits["thresholds"], logits[:-1])
        runs = [*logits, EXITS] if thresholds else logits
        return cls(
            {name: f.number(*_TEMPERATURES) for name, f in temperatures.items()},
            thresholds,
            None if exits is None else Guarantee(_share(exits["epsilon"]), _share(exits["delta"])),
            images={part: table["images"].integer() for part, table in data.items() if "images" in table},
            why_no_exits=of_exits["none_because"].text() if of_exits and "none_because" in of_exits else None,
            runs_on=root["runs_on"].optional(_runs_on),
            conformal=root["conformal"].optional(lambda f: Conformal.read(f, manifest.class_names, runs)),
        )

    def note(self, backend: str, device: str) -> str | None:
        """Why thresholds guarantee nothing for a backend and a device, in one line; None: they do, or not told."""
        learned = self.runs_on
        if learned is None or (learned.backend, learned.device.split(":")[0]) == (backend, device.split(":")[0]):
            return None
        return (
            f"the thresholds were learned with {learned}; they guarantee nothing for {RunsOn(backend, device)}, which "
            "rounds otherwise; calibrate here for some that do (mge-calibrate)"
        )

    def exit_points(self, manifest: Manifest) -> tuple[ExitPoint, ...]:
        """Where the chain may stop, in the order in which it runs.

        Raises:
            BackendError: it may stop nowhere; the message says why and what to do.
        """
        if not self.temperatures:
            raise BackendError(
                "asked for calibrated exits, but this bundle has no calibration; learn them with "
                "`mge-calibrate mge.plan --data DIR`, or run the whole chain with exit never"
            )
        if not self.exits:
            raise BackendError(
                f"asked for calibrated exits, but this bundle has none ({self.why_no_exits or 'none were learned'}); "
                "calibrate with more images or a larger epsilon (mge-calibrate), or run the whole chain with exit never"
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
    with np.errstate(invalid="ignore"):
        confident = softmax(logits.astype(np.float64) / temperature).max(-1)
    # A single -inf would leave a probability; `Chain.run` refuses such a row.
    return np.where(np.isfinite(logits).all(-1), confident, np.nan)


def _thresholds(f: Field, logits: Sequence[str]) -> dict[str, float]:
    table = f.table()
    if unknown := [name for name in table if name not in logits]:
        table[unknown[0]].fail(f"thresholds of {', '.join(logits) or 'nothing, since the chain has one graph'} alone")
    found = {name: value.optional(lambda f: f.number(0, 1)) for name, value in table.items()}
    return {name: threshold for name, threshold in found.items() if threshold is not None}


def _share(f: Field) -> float:
    if not 0 < (number := f.number()) < 1:
        f.fail("a number between 0 and 1")
    return number


def _runs_on(f: Field) -> RunsOn:
    values = f.members(("backend", "device"))
    return RunsOn(values["backend"].text(), values["device"].text())
