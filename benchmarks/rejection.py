"""What `mge-calibrate` rejects, its sets and coarser classes, judged on images that did not set the thresholds.

    python -m benchmarks.rejection mge.plan --data groceries/val --test-data groceries/test \
        --unknown distractors/test --hierarchy labels.csv --epsilon 0.02

`--data` sets the temperatures. A seeded third of `--test-data` sets the exits; the others are split at random, again
and again, into one half that sets thresholds and one that judges them. Where the (k + 1)-th smallest of n scores is the
threshold, the share of the other half that fails has the mean (k + 1) / (n + 1), less ties. How often it is above what
was asked for is printed, too. Scores are compared on all of `--test-data`.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from mge_calibration.cli import SHARE
from mge_calibration.collect import ChainLogits, collect
from mge_calibration.conformal import astray, auroc, order_statistic, read_parents, ways_to_run
from mge_calibration.exits import learn_exits
from mge_calibration.images import LabeledImage, list_labeled, list_unknown
from mge_calibration.temperature import learn_temperatures
from mge_runtime.bundle import Bundle
from mge_runtime.calibrated import Guarantee
from mge_runtime.cli.common import reports_errors
from mge_runtime.conformal import Hierarchy, energy
from mge_runtime.pipeline import Pipeline
from mge_runtime.prediction import softmax

KEPT = 0.95  # of known images, where scores are compared


@click.command(help=__doc__)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--test-data", type=click.Path(path_type=Path), required=True)
@click.option("--unknown", type=click.Path(path_type=Path), required=True)
@click.option("--hierarchy", type=click.Path(path_type=Path), required=True)
@click.option("--splits", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--share", type=SHARE, default=0.05, show_default=True, help="That may fail.")
@click.option("--epsilon", type=SHARE, default=0.01, show_default=True, help="Of the exits.")
@click.option("--delta", type=SHARE, default=0.05, show_default=True)
@reports_errors
def main(
    engine: Path,
    data: Path,
    test_data: Path,
    unknown: Path,
    hierarchy: Path,
    splits: int,
    share: float,
    epsilon: float,
    delta: float,
) -> None:
    """Run the images, compare the scores, split again and again."""
    with Bundle.open(engine) as bundle:
        manifest = bundle.manifest
    gmacs = np.cumsum([manifest.gmacs[graph.name] for graph in manifest.graphs]).tolist()
    nodes = Hierarchy(read_parents(hierarchy, manifest.class_names), manifest.class_names)
    images = [list_labeled(folder, manifest.class_names)[1] for folder in (data, test_data)] + [list_unknown(unknown)]
    with Pipeline.open(engine, streams="auto", calibration=False) as pipeline:

        def run(some: list[LabeledImage]) -> ChainLogits:
            return collect(pipeline, some, problem=lambda error: click.echo(error, err=True))

        fitted, tested, others = map(run, images)
    temperatures = {n: o.fit.temperature for n, o in learn_temperatures(fitted, fitted, seed=0).items()}
    compare_scores(tested, others, temperatures)
    exiting, rest = tested.split(frozenset(), 0)
    exits = learn_exits(fitted, exiting, temperatures, gmacs, Guarantee(epsilon, delta), seed=0)
    click.echo(exits if isinstance(exits, str) else f"exits from {exits.images} images: {dict(exits.thresholds)}")
    thresholds = None if isinstance(exits, str) else exits.thresholds
    strangers = ways_to_run(others, temperatures, thresholds)
    for way, scaled in ways_to_run(rest, temperatures, thresholds).items():
        likely = softmax(scaled)
        judge_splits(f"{way}: rejection", energy(scaled), share, delta, splits, energy(strangers[way]))
        judge_splits(f"{way}: sets", likely[np.arange(len(rest)), rest.labels], share, delta, splits, sets=likely)
        judge_splits(f"{way}: coarser", -astray(likely, rest.labels, nodes), share, delta, splits)


def compare_scores(known: ChainLogits, unknown: ChainLogits, temperatures: dict[str, float]) -> None:
    """AUROC, and the share of unknown images that are rejected where `KEPT` of the known ones are kept."""

    def entropy(scaled: np.ndarray) -> np.ndarray:
        likely = softmax(scaled)
        return (likely * np.log(np.maximum(likely, 1e-300))).sum(-1)

    scores = {
        "probability": lambda scaled: softmax(scaled).max(-1),
        "entropy": entropy,
        "largest logit": lambda scaled: scaled.max(-1),
        "energy": energy,
    }
    click.echo(f"{len(known)} known and {len(unknown)} unknown images; AUROC, rejected where {100 * KEPT:g} % are kept")
    for way, rows in ways_to_run(known, temperatures, None).items():
        others, right = ways_to_run(unknown, temperatures, None)[way], rows.argmax(1) == known.labels
        click.echo(f"{way}: top-1 {100 * right.mean():.2f} %")
        for name, score in scores.items():
            a, b = score(rows), score(others)
            click.echo(f"  {name:<14} {auroc(a, b):.3f}  {100 * np.mean(b < np.quantile(a, 1 - KEPT)):5.1f} %")


def judge_splits(
    what: str,
    scores: np.ndarray,
    share: float,
    delta: float,
    splits: int,
    unknown: np.ndarray | None = None,
    sets: np.ndarray | None = None,
) -> None:
    """Thresholds from one half, failures in the other."""
    found: list[tuple[float, ...]] = []
    half = len(scores) // 2
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(len(scores))
        threshold = order_statistic(scores[order[:half]], share, delta)
        judged = scores[order[half:]] < threshold
        beside = 0.0 if unknown is None else np.mean(unknown < threshold)
        if sets is not None:  # the likeliest class is always in its set
            judged &= scores[order[half:]] < sets[order[half:]].max(-1)
            beside = np.maximum((sets >= threshold).sum(-1), 1).mean()
        found.append((float(judged.mean()), float(beside)))
    shares, beside = np.array(found).T
    more = f", unknown rejected {100 * beside.mean():.1f} %" if unknown is not None else ""
    more = f", {beside.mean():.2f} classes in a set" if sets is not None else more
    click.echo(
        f"{what:<26} {half} + {len(scores) - half} images: fail {100 * np.mean(shares):.2f} % "
        f"(at most {100 * np.max(shares):.1f} %), above {100 * share:g} % in {100 * np.mean(shares > share):.1f} % of "
        f"splits{more}"
    )


if __name__ == "__main__":
    main()
