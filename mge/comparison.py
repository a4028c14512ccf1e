"""Two models on the same images: how far they differ, and what of it may be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from mge.evaluation import Predictions, top_k_correct
from mge_runtime.errors import InputError, printable
from mge_runtime.files import echo
from mge_runtime.metrics import Interval, mean_interval

_SHOWN = 10  # images that the text names on each side

Named = tuple[Predictions, Sequence[str]]  # predictions, and the names of their images


@dataclass(frozen=True)
class Difference:
    """Top-1 of two sets of logits for the same images."""

    first: float  # in [0, 1]
    second: float  # in [0, 1]
    change: Interval  # second - first, 95 % paired bootstrap over images
    only_first: int  # images that the first alone gets right
    only_second: int
    p: float  # McNemar's exact test, two-sided: as uneven as that, or more, were both equally often right


def difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Difference:
    """Compare two predictions of the same images: whether each was right, [N] both, N >= 2.

    McNemar, "Note on the sampling error of the difference between correlated proportions" (Psychometrika 1947), with
    the binomial distribution for the images on which they differ.
    """
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    p = float(binomtest(won, lost + won).pvalue) if lost + won else 1.0
    change = mean_interval(second.astype(np.float64) - first)
    return Difference(float(first.mean()), float(second.mean()), change, lost, won, p)


def compare_models(first: Named, second: Named) -> dict[str, Any]:
    """Compare two models: their outputs, then every head that both have, as plain values.

    Args:
        first: of a model.
        second: of another, for the same images in any order.

    Raises:
        InputError: the images or their classes are not the same, or fewer than two.
    """
    (a, names), (b, others) = first, second
    if set(names) != set(others) or len(names) < 2:
        odd = sorted(set(names) ^ set(others))
        raise InputError(
            f"the models were evaluated on {len(names)} and {len(others)} images"
            + (f", of which {len(odd)} are on one side alone, such as {odd[0]}" if odd else "")
            + "; expected the same images on both sides, two at least: evaluate both on the same --data"
        )
    place = {name: number for number, name in enumerate(others)}
    order = [place[name] for name in names]
    truths = b.truth
    for name, number, label in zip(names, order, a.truth, strict=True):
        if label != truths[number]:
            raise InputError(
                f"{name} is of class {label!r} in the first evaluation and of {truths[number]!r} in the second; "
                "expected the same class in both: evaluate both on the same --data"
            )

    def right(head_a: str, head_b: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        return (
            top_k_correct(a.heads[head_a], a.labels),
            top_k_correct(b.heads[head_b], b.labels)[order],
        )

    outputs = list(a.heads)[-1], list(b.heads)[-1]
    pairs = {"output": outputs} | {n: (n, n) for n in a.heads if n in b.heads and (n, n) != outputs}
    outcome = right(*outputs)
    return {
        "images": len(names),
        "outputs": outputs,
        "heads": [{"name": name, **asdict(difference(*right(*pair)))} for name, pair in pairs.items()],
        "only_first": [name for name, x, y in zip(names, *outcome, strict=True) if x and not y],
        "only_second": [name for name, x, y in zip(names, *outcome, strict=True) if y and not x],
        "costs": [None if side.cost is None else asdict(side.cost) for side in (a, b)],
    }


def print_comparison(result: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Print a comparison for people; `labels` say what A and B are."""
    for letter, label, output, cost in zip("AB", labels, result["outputs"], result["costs"], strict=True):
        said = "cost unknown" if cost is None else "{:.3g} GMACs, {:.1f} ms".format(cost["gmacs"][-1], cost["ms"][-1])
        where = "" if cost is None else f" ({cost['measured']})"
        echo(f"{letter}  {printable(label)}: {output}, {said}{where}")
    echo(
        f"\n{result['images']} images\n\n{'top-1 %':<18}{'A':>8}{'B':>8}"
        f"{'B - A, points [95 %]':>27}{'only A':>8}{'only B':>8}{'p':>8}"
    )
    for row in result["heads"]:
        value, low, high = (100 * row["change"][name] for name in ("value", "low", "high"))
        echo(
            f"{row['name']:<18}{100 * row['first']:8.2f}{100 * row['second']:8.2f}"
            f"{f'{value:+.2f} [{low:+.2f}, {high:+.2f}]':>27}"
            f"{row['only_first']:>8}{row['only_second']:>8}{row['p']:>8.2g}"
        )
    echo(
        "\ninterval: paired bootstrap over images; only A, only B: images that one alone gets right; "
        "p: McNemar's exact test of these"
    )
    for letter, side in (("A", "only_first"), ("B", "only_second")):
        images = result[side]
        shown = [*images[:_SHOWN], "..."] if len(images) > _SHOWN else images or ["none"]
        echo("\n  ".join([f"output right in {letter} alone", *map(printable, shown)]))
