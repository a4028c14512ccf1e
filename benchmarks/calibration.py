"""What `mge-calibrate` learns, held to images that it did not see: temperatures, and the promise of early exits.

Images of another seed than the model was trained with, 2000 for thresholds and 2000 for the test:

    mge-field-guide guide --seed 1 --species 12 --train 1000 --val 2000 --test 2000
    python -m benchmarks.calibration mge.plan --data guide/train --exit-data guide/val --test-data guide/test

Random halves of one folder, one for thresholds and one for the test:

    python -m benchmarks.calibration mge.plan --data groceries/val \
        --exit-data groceries/test --halves 50 --epsilon 0.03

`--data` sets temperatures and the path of candidates. The rule is the runtime's: an image stops at the first answer
whose calibrated confidence reaches its threshold. Nothing is written to the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np

from mge_calibration.cli import SHARE
from mge_calibration.collect import ChainLogits, collect
from mge_calibration.exits import ExitOutcome, apply_exits, learn_exits
from mge_calibration.images import list_labeled
from mge_calibration.quality import TemperatureOutcome, learn_temperatures, mean_interval
from mge_runtime.bundle import Bundle
from mge_runtime.calibrated import Promise
from mge_runtime.cli.common import reports_errors
from mge_runtime.metrics import log_softmax
from mge_runtime.pipeline import Pipeline


@click.command(help=__doc__)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--exit-data", type=click.Path(path_type=Path), required=True)
@click.option("--test-data", type=click.Path(path_type=Path))
@click.option("--halves", type=click.IntRange(1), help="Split --exit-data this often instead of using --test-data.")
@click.option("--epsilon", type=SHARE, default=0.01, show_default=True)
@click.option("--delta", type=SHARE, default=0.05, show_default=True)
@reports_errors
def main(
    engine: Path,
    data: Path,
    exit_data: Path,
    test_data: Path | None,
    halves: int | None,
    epsilon: float,
    delta: float,
) -> None:
    """Collect the answers, learn, and print what the test images say."""
    if (test_data is None) == (halves is None):
        raise click.UsageError("give either --test-data or --halves")
    promise = Promise(epsilon, delta)
    with Bundle.open(engine) as bundle:
        gmacs = np.cumsum([bundle.manifest.gmacs[graph.name] for graph in bundle.manifest.graphs])
    with Pipeline.open(engine, streams="auto") as pipeline:
        folders = [data, exit_data, *([test_data] if test_data else [])]
        found = [list_labeled(folder, pipeline.manifest.class_names)[1] for folder in folders]
        answers = [collect(pipeline, images, problem=lambda e: click.echo(e, err=True)) for images in found]
    fitted, exits = answers[:2]
    outcomes = learn_temperatures(fitted, answers[-1], seed=0)
    print_temperatures(outcomes, fitted, answers[-1])
    temperatures = {name: outcome.fit.temperature for name, outcome in outcomes.items()}
    if test_data is not None:
        outcome = learn_exits(fitted, exits, temperatures, gmacs.tolist(), promise, seed=0)
        click.echo(outcome if isinstance(outcome, str) else describe(outcome, answers[2], temperatures, gmacs, promise))
    elif halves is not None:
        print_halves(fitted, exits, temperatures, gmacs, promise, halves)


def print_temperatures(outcomes: Mapping[str, TemperatureOutcome], fitted: ChainLogits, tested: ChainLogits) -> None:
    """NLL and ECE on the test images, with the paired interval of the change in NLL."""
    click.echo(f"temperatures from {len(fitted)} images, judged on {len(tested)}; NLL in nats, ECE in %")
    for name, outcome in outcomes.items():
        rows = np.arange(len(tested))
        losses = [-log_softmax(tested.logits[name] / t)[rows, tested.labels] for t in (1.0, outcome.fit.temperature)]
        change = mean_interval(losses[1] - losses[0])
        before, after = outcome.before, outcome.after
        ece = [100 * v for v in (before.ece.value, after.ece.value, after.ece.low, after.ece.high)]
        click.echo(
            f"{name:<10} T {outcome.fit.temperature:.3f}  NLL {before.nll.value:.3f} -> {after.nll.value:.3f} "
            f"({change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}])  "
            f"ECE {ece[0]:.2f} -> {ece[1]:.2f} [{ece[2]:.2f}, {ece[3]:.2f}], "
            f"floor {100 * after.ece_floor:.2f} (95 %: {100 * after.ece_floor_95:.2f})"
        )


def apply(
    outcome: ExitOutcome, tested: ChainLogits, temperatures: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each of N images stops, whether its class is not the full chain's, and the change in being right."""
    stopped, got = apply_exits(tested, temperatures, outcome.thresholds)
    full = list(tested.logits.values())[-1].argmax(1)
    return stopped, got != full, (got == tested.labels).astype(float) - (full == tested.labels)


def describe(
    outcome: ExitOutcome, tested: ChainLogits, temperatures: Mapping[str, float], gmacs: np.ndarray, promise: Promise
) -> str:
    """The exits on the test images."""
    stopped, differs, change = apply(outcome, tested, temperatures)
    shares = np.bincount(stopped, minlength=len(gmacs)) / len(stopped)
    costs = gmacs[stopped]
    top1 = (list(tested.logits.values())[-1].argmax(1) == tested.labels).mean()
    points = mean_interval(100 * change)
    return (
        f"exits from {outcome.images} images, epsilon {promise.epsilon:g}, delta {promise.delta:g}: "
        f"thresholds {dict(outcome.thresholds)}, {outcome.disagreements} disagreed, bound {100 * outcome.bound:.2f} %\n"
        f"on {len(tested)} others: {differs.sum()} disagree ({100 * differs.mean():.2f} %), stops % "
        f"{' '.join(f'{100 * share:.1f}' for share in shares)}, mean cost {costs.mean():.4g} of {gmacs[-1]:.4g} "
        f"GMACs ({100 * costs.mean() / gmacs[-1]:.1f} %), top-1 {100 * top1:.2f} % without exits, with them "
        f"{points.value:+.2f} points [{points.low:+.2f}, {points.high:+.2f}]"
    )


def print_halves(
    fitted: ChainLogits,
    exits: ChainLogits,
    temperatures: Mapping[str, float],
    gmacs: np.ndarray,
    promise: Promise,
    halves: int,
) -> None:
    """Thresholds from one random half, disagreement on the other.

    The halves of one split are not independent: what one has of a fixed set's disagreements the other lacks. Beside
    the other half's share, that of the whole folder is therefore judged, too.
    """
    rows: list[tuple[float, float, float, float]] = []
    none = 0
    for seed in range(halves):
        order = np.random.default_rng(seed).permutation(len(exits))
        first, second = (exits.take(part) for part in np.array_split(order, 2))
        outcome = learn_exits(fitted, first, temperatures, gmacs.tolist(), promise, seed=0)
        if isinstance(outcome, str):
            none += 1
            rows.append((0.0, 0.0, 1.0, 0.0))
            continue
        stopped, differs, change = apply(outcome, second, temperatures)
        whole = apply(outcome, exits, temperatures)[1].mean()
        share = gmacs[stopped].mean() / gmacs[-1]
        rows.append((float(differs.mean()), float(whole), float(share), float(change.mean())))
    other, whole, share, change = np.array(rows).T
    above = [int((shares > promise.epsilon).sum()) for shares in (other, whole)]
    test = len(exits) // 2
    click.echo(
        f"{halves} random halves, {len(exits) - test} images for thresholds and {test} for the test, "
        f"epsilon {promise.epsilon:g}, delta {promise.delta:g}; no exits in {none}\n"
        f"other half: disagreement {100 * other.mean():.2f} % on average, at most {100 * other.max():.2f} %, "
        f"above epsilon in {above[0]}; on the whole folder above epsilon in {above[1]}; "
        f"delta allows {promise.delta * halves:g} on average\n"
        f"mean cost {100 * share.mean():.1f} % of the full chain ({100 * share.min():.1f} to {100 * share.max():.1f}), "
        f"top-1 {100 * change.mean():+.2f} points"
    )


if __name__ == "__main__":
    main()
