"""Thresholds to reject, to make prediction sets and to predict coarser classes, with a guarantee for known images.

All three are one rule. A score says how far a known image is from a failure: how known it looks (rejection), the
probability of its class (sets), minus the largest probability of a class or coarser class that it is taken for and
does not belong to (coarser classes). It fails where the score is below a threshold, the (k + 1)-th smallest score of n
held-out images: with probability at least 1 - delta over their draw at most a share epsilon of new images from the same
source fails, whatever the distribution. k is the largest count whose Clopper-Pearson upper bound at level 1 - delta,
the (1 - delta)-quantile of Beta(k + 1, n - k), is at most epsilon.

This is split conformal prediction, conditional on the images that set the threshold: Vovk, "Conditional validity of
inductive conformal predictors", ACML 2012, proposition 2; Park et al., "PAC confidence sets for deep neural networks
via calibrated prediction", ICLR 2020. The usual order statistic, k + 1 = floor(epsilon (n + 1)), holds on average over
draws; a bundle is calibrated once and used for long, and in about half of the draws its share would be above epsilon.

Sets hold every class whose probability reaches the threshold: LAC (Sadinle, Lei and Wasserman, "Least ambiguous
set-valued classifiers with bounded error levels", JASA 2019), the smallest sets on average for a coverage. APS and RAPS
(Romano et al. 2020, Angelopoulos et al. 2021) make larger ones, for a coverage that is more even between easy and hard
images. A set of LAC may be empty; it gets the likeliest class then, which can only raise coverage.

The images are others than those that set temperatures and exits, since how the chain is run must not depend on them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mge_calibration.collect import ChainLogits
from mge_calibration.exits import NEVER, apply_exits, certify, fewest_images, upper_bound
from mge_runtime.conformal import EXITS, Conformal, Hierarchy, Limit, energy
from mge_runtime.errors import InputError, brief
from mge_runtime.fields import Field
from mge_runtime.prediction import softmax

_Score = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # of logits / temperature [N, C], [N]


@dataclass(frozen=True)
class ConformalRequest:
    """What is asked for; shares are of known images that may fail, in (0, 1), and None is not asked for."""

    reject: float | None = None
    sets: float | None = None
    coarse: float | None = None
    hierarchy: Path | None = None  # a table of labels and parents, for `coarse`
    unknown: Path | None = None  # images of no class, for `reject`

    @property
    def smallest(self) -> float | None:
        """The smallest share, which needs most images; None: nothing is asked for."""
        return min((share for share in (self.reject, self.sets, self.coarse) if share is not None), default=None)


@dataclass(frozen=True)
class ConformalOutcome:
    """Thresholds, and what they do on the images that set them."""

    learned: Conformal
    images: int
    # By way to run the chain: share "rejected", share "unknown_rejected" and "auroc" of known against unknown images,
    # mean "set_size", share "coarsened" to what is no class; without what was not asked for.
    figures: Mapping[str, Mapping[str, float]]


def learn_conformal(
    request: ConformalRequest,
    held: ChainLogits,
    unknown: ChainLogits | None,
    temperatures: Mapping[str, float],
    exits: Mapping[str, float | None] | None,
    delta: float,
    class_names: tuple[str, ...],
    parents: Mapping[str, str] | None = None,
) -> ConformalOutcome:
    """Set the thresholds for every way to run the chain.

    Args:
        request: what is asked for, something at least.
        held: known images that set neither temperatures nor exits.
        unknown: images of no class; they say how many are rejected and change nothing.
        temperatures: by tensor of logits.
        exits: thresholds of the graphs before the last; None: there are no exits.
        delta: probability that a guarantee fails.
        class_names: of the model.
        parents: by `read_parents`.

    Raises:
        InputError: too few images for the smallest share.
    """
    require_enough(request, len(held), delta)
    ways = ways_to_run(held, temperatures, exits)
    hierarchy = Hierarchy(parents or {}, class_names)

    def limit(share: float | None, score: _Score, sign: int = 1) -> Limit | None:
        if share is None:
            return None
        values = {way: sign * score(scaled) for way, scaled in ways.items()}
        return Limit(share, {way: sign * order_statistic(found, share, delta) for way, found in values.items()})

    learned = Conformal(
        class_names,
        delta,
        reject=limit(request.reject, energy),
        sets=limit(request.sets, lambda scaled: softmax(scaled)[np.arange(len(held)), held.labels]),
        coarse=limit(request.coarse, lambda scaled: astray(softmax(scaled), held.labels, hierarchy), sign=-1),
        parents=parents,
    )
    others = {} if unknown is None else ways_to_run(unknown, temperatures, exits)
    figures = {way: _figures(learned, way, scaled, others.get(way)) for way, scaled in ways.items()}
    return ConformalOutcome(learned, len(held), figures)


def require_enough(request: ConformalRequest, images: int, delta: float) -> None:
    """Refuse fewer images than the smallest share needs.

    Raises:
        InputError: they are too few.
    """
    if (share := request.smallest) is not None and images < (least := fewest_images(share, delta)):
        raise InputError(
            f"{images} images are left to set rejection, sets or coarser classes; a share of {share:.3g} and delta "
            f"{delta:.3g} need {least} beside those for temperatures, and as many for exits: add images, or allow a "
            "larger share"
        )


def _figures(
    learned: Conformal, way: str, known: NDArray[np.float64], unknown: NDArray[np.float64] | None
) -> dict[str, float]:
    """What thresholds do to logits / temperature [N, C]."""
    judged = [learned.judge(row, 1.0, way) for row in known]
    found: dict[str, float] = {}
    if learned.reject:
        found["rejected"] = float(np.mean([bool(j.rejected) for j in judged]))
        if unknown is not None:
            found["unknown_rejected"] = float(np.mean(energy(unknown) < learned.reject.thresholds[way]))
            found["auroc"] = auroc(energy(known), energy(unknown))
    if learned.sets:
        found["set_size"] = float(np.mean([len(j.set or ()) for j in judged]))
    if learned.coarse:
        found["coarsened"] = float(np.mean([not j.coarse or j.coarse.name not in learned.class_names for j in judged]))
    return found


def ways_to_run(
    found: ChainLogits, temperatures: Mapping[str, float], exits: Mapping[str, float | None] | None
) -> dict[str, NDArray[np.float64]]:
    """Logits / temperature [N, C] that images get from each way to run the chain, as `Conformal` names them."""
    scaled = {name: logits.astype(np.float64) / temperatures[name] for name, logits in found.logits.items()}
    if exits and any(threshold is not None for threshold in exits.values()):
        thresholds = [NEVER if (t := exits[name]) is None else t for name in list(scaled)[:-1]]
        stop, _ = apply_exits(found, temperatures, thresholds)
        scaled[EXITS] = np.stack(list(scaled.values()))[stop, np.arange(len(found))]
    return scaled


def order_statistic(scores: NDArray[np.floating], share: float, delta: float) -> float:
    """The largest threshold below which, with probability 1 - delta, at most a share of new scores lies.

    Args:
        scores: [N], exchangeable with the new ones.
        share: in (0, 1).
        delta: in (0, 1); N is at least `fewest_images(share, delta)`.
    """
    count = len(scores)
    allowed = int(certify(upper_bound(np.arange(count), count, delta), share))  # k + 1
    return float(np.sort(scores)[allowed - 1])


def astray(
    probabilities: NDArray[np.float64], labels: NDArray[np.integer], hierarchy: Hierarchy
) -> NDArray[np.float64]:
    """The least threshold [N] at which an image's coarser class is right.

    That is the largest probability of a node that its class is not in, on the way from the likeliest class to the root;
    0 where its class is the likeliest one.
    """
    paths = [hierarchy.path(row) for row in probabilities]
    return np.array(
        [
            max((node.probability for node in path if label not in hierarchy.members[node.name]), default=0.0)
            for path, label in zip(paths, labels.tolist(), strict=True)
        ]
    )


def auroc(known: NDArray[np.floating], unknown: NDArray[np.floating]) -> float:
    """The probability that a known image has a higher score than an unknown one, ties counting half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(known, unknown).statistic) / (len(known) * len(unknown))


def read_parents(path: Path, class_names: Sequence[str]) -> dict[str, str]:
    """Read a CSV table with the columns label and parent (empty: none), a row for each class and for what lies above.

    Raises:
        InputError: it cannot be read, lacks a class, or is no hierarchy.
    """
    expected = "expected a CSV table with the columns label and parent, a row for each class"
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = [((row["label"] or "").strip(), (row["parent"] or "").strip()) for row in csv.DictReader(lines)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        found = f"it has no column {error}" if isinstance(error, KeyError) else brief(error)
        raise InputError(f"cannot read {path}: {found}; {expected}") from error
    parents = dict(rows)
    if lacking := [name for name in class_names if name not in parents]:
        raise InputError(f"{path} has no row for {len(lacking)} classes, such as {lacking[0]!r}; {expected}")
    try:
        if len(parents) < len(rows):
            raise ValueError("a label has two rows")
        found = Hierarchy({name: parent for name, parent in parents.items() if parent}, class_names)
    except ValueError as error:
        raise InputError(f"{path} is no hierarchy: {error}; {expected}") from error
    parents = {name: found.parents[name] for name in found.members if name in found.parents}
    for name, parent in parents.items():
        Field(parent, f"parent of {name}", str(path), "write it otherwise").text()  # as the runtime will read it
    return parents
