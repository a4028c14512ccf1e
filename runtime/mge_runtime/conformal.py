"""What a prediction says beside its class: "none of these", a set of classes, a coarser class; by learned thresholds.

`mge_calibration.conformal` learns the thresholds and says what they guarantee. A prediction that stopped early has
other logits than the whole chain's, so there is one threshold for each way to run the chain: by the tensor of logits
where every image stops, and `EXITS` where each stops as soon as it is confident enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mge_runtime.fields import Field
from mge_runtime.prediction import TopClass, softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray


EXITS = "calibrated"  # what `Pipeline.open` calls these exits

_DEEPEST = 32  # nodes from a class to its root


class Judgment(NamedTuple):
    """Fields of `Prediction`; None: it was not learned."""

    rejected: bool | None = None
    set: tuple[str, ...] | None = None
    coarse: TopClass | None = None


@dataclass(frozen=True)
class Limit:
    """Thresholds that fail for at most a share of known images."""

    share: float  # in (0, 1)
    thresholds: Mapping[str, float]  # by way to run the chain

    @classmethod
    def read(cls, f: Field, runs: Sequence[str]) -> Limit:
        """Read what `dataclasses.asdict` made of one."""
        values = f.members(("share", "thresholds"))
        if not 0 < (share := values["share"].number()) < 1:
            values["share"].fail("a number between 0 and 1")
        return cls(share, {run: field.number() for run, field in values["thresholds"].members(runs).items()})


class Hierarchy:
    """Classes below coarser ones.

    Args:
        parents: name of what lies above, by the name of a class or of a coarser one; a root has none.
        class_names: of the model, by class index.

    Raises:
        ValueError: a class is below itself, or more than 32 deep.
    """

    def __init__(self, parents: Mapping[str, str], class_names: Sequence[str]) -> None:
        self.parents = parents
        self.paths: list[list[str]] = []  # from each class up to its root
        for name in class_names:
            path = [name]
            while (parent := parents.get(path[-1])) is not None:
                if parent in path or len(path) == _DEEPEST:
                    raise ValueError(f"{name!r} has no root: {' < '.join([*path[:4], parent])}")
                path.append(parent)
            self.paths.append(path)
        self.members: dict[str, list[int]] = {}  # indices of the classes in each node
        for index, path in enumerate(self.paths):
            for node in path:
                self.members.setdefault(node, []).append(index)

    def path(self, probabilities: NDArray[np.float64]) -> list[TopClass]:
        """The likeliest class, what lies above it, and so on to the root, with their sums of probabilities [C]."""
        nodes = self.paths[int(probabilities.argmax())]
        return [TopClass(node, min(float(probabilities[self.members[node]].sum()), 1.0)) for node in nodes]


@dataclass(frozen=True)
class Conformal:
    """The learned thresholds of one bundle."""

    class_names: tuple[str, ...]  # of the model
    delta: float  # in (0, 1): probability that a guarantee fails
    reject: Limit | None = None  # an image is of no class where its `energy` is below the threshold
    sets: Limit | None = None  # a class is in the set where its probability is at least the threshold
    coarse: Limit | None = None  # a coarser class is predicted where its probability is above the threshold
    parents: Mapping[str, str] | None = None  # of `Hierarchy`, where `coarse` was learned

    @classmethod
    def read(cls, f: Field, class_names: tuple[str, ...], runs: Sequence[str]) -> Conformal:
        """Read what the calibration holds.

        Args:
            f: the values of `to_values`.
            class_names: of the model.
            runs: every way to run the chain that needs a threshold.

        Raises:
            BundleError: a value is missing, out of range or of another type.
        """
        values = f.members(("delta", "reject", "sets", "coarse", "parents"))
        if not 0 < (delta := values["delta"].number()) < 1:
            values["delta"].fail("a number between 0 and 1")
        reject, sets, coarse = (
            values[name].optional(lambda f: Limit.read(f, runs)) for name in ("reject", "sets", "coarse")
        )
        parents = values["parents"].optional(lambda f: {name: up.text() for name, up in f.table().items()})
        found = cls(class_names, delta, reject, sets, coarse, parents)
        try:
            _ = found.hierarchy
        except ValueError as error:
            values["parents"].fail(f"a hierarchy, but {error}")
        if found.coarse and parents is None:
            values["parents"].fail("parents of the classes")
        return found

    def to_values(self) -> dict[str, Any]:
        """What `read` reads."""
        return {name: value for name, value in asdict(self).items() if name != "class_names"}

    @cached_property
    def hierarchy(self) -> Hierarchy:
        """Of the classes."""
        return Hierarchy(self.parents or {}, self.class_names)

    def judge(self, logits: NDArray[Any], temperature: float, run: str) -> Judgment:
        """Apply the thresholds to one image.

        Args:
            logits: [C], finite, of the graph where it stopped.
            temperature: of these logits.
            run: how the chain is run: `EXITS`, or the tensor of logits where every image stops.
        """
        scaled = logits.astype(np.float64) / temperature
        probabilities = softmax(scaled)
        rejected = names = coarse = None
        if self.reject:
            rejected = bool(energy(scaled) < self.reject.thresholds[run])
        if self.sets:
            order: list[int] = np.argsort(-probabilities, kind="stable").tolist()
            count = max(int((probabilities >= self.sets.thresholds[run]).sum()), 1)  # a set is never empty
            names = tuple(self.class_names[index] for index in order[:count])
        if self.coarse:
            threshold = self.coarse.thresholds[run]
            coarse = next((node for node in self.hierarchy.path(probabilities) if node.probability > threshold), None)
        return Judgment(rejected, names, coarse)

    def __str__(self) -> str:
        """The guarantees for people, in one line."""
        parts = [
            ("rejects at most {:.4g}% of known images", self.reject),
            ("sets miss the class of at most {:.4g}%", self.sets),
            ("coarser classes are wrong for at most {:.4g}%", self.coarse),
        ]
        said = "; ".join(text.format(100 * limit.share) for text, limit in parts if limit)
        return f"{said}; each with probability {100 * (1 - self.delta):.4g}%"


def energy(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    """How known an image looks: log-sum-exp of its logits / temperature [..., C], [...]; higher is more.

    Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020, without the sign. Of unknown groceries it
    rejected more than the largest probability and the entropy did (docs/guide/rejection.md).
    """
    top = scaled.max(-1)
    return top + np.log(np.exp(scaled - top[..., None]).sum(-1))
