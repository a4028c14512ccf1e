"""What `mge-calibrate` learns, judged on images that it did not see: temperatures, and the guarantee of early exits.

Images of another seed than the model was trained with, 2000 for thresholds and 2000 for the test:

    mge-field-guide guide --seed 1 --species 12 --train 1000 --val 2000 --test 2000
    python -m benchmarks.calibration mge.plan --data guide/train --exit-data guide/val --test-data guide/test

One folder split at random, again and again, into a share for thresholds and the rest for the test:

    python -m benchmarks.calibration mge.plan --data groceries/val \
        --exit-data groceries/test --splits 50 --epsilon 0.03

`--data` sets temperatures and the path of candidates. The rule is the runtime's: an image stops after the first graph
whose calibrated confidence reaches its threshold. Nothing is written to the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from mge_calibration.cli import SHARE
from mge_calibration.collect import ChainLogits, collect
from mge_calibration.exits import NEVER, ExitOutcome, apply_exits, learn_exits
from mge_calibration.images import list_labeled
from mge_calibration.temperature import TemperatureOutcome, learn_temperatures
from mge_runtime.bundle import Bundle
from mge_runtime.calibrated import Guarantee
from mge_runtime.cli.common import reports_errors
from mge_runtime.metrics import log_softmax, mean_interval
from mge_runtime.pipeline import Pipeline


@click.command(help=__doc__)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--exit-data", type=click.Path(path_type=Path), required=True)
@click.option("--test-data", type=click.Path(path_type=Path))
@click.option("--splits", type=click.IntRange(1), help="Split --exit-data this often instead of using --test-data.")
@click.option("--share", type=SHARE, default=0.5, show_default=True, help="Of the images of a split, for thresholds.")
@click.option("--epsilon", type=SHARE, default=0.01, show_default=True)
@click.option("--delta", type=SHARE, default=0.05, show_default=True)
@reports_errors
def main(
    engine: Path,
    data: Path,
    exit_data: Path,
    test_data: Path | None,
    splits: int | None,
    share: float,
    epsilon: float,
    delta: float,
) -> None:
    """Run the images, learn, and print what the test images say."""
    if (test_data is None) == (splits is None):
        raise click.UsageError("give either --test-data or --splits")
    with Bundle.open(engine) as bundle:
        gmacs = np.cumsum([bundle.manifest.gmacs[graph.name] for graph in bundle.manifest.graphs])
    with Pipeline.open(engine, streams="auto") as pipeline:
        folders = [data, exit_data, *([test_data] if test_data else [])]
        found = [list_labeled(folder, pipeline.manifest.class_names)[1] for folder in folders]
        parts = [collect(pipeline, images, problem=lambda e: click.echo(e, err=True)) for images in found]
    fitted, exits, tested = parts[0], parts[1], parts[-1]
    outcomes = learn_temperatures(fitted, tested, seed=0)
    print_temperatures(outcomes, fitted, tested)
    temperatures = {name: outcome.fit.temperature for name, outcome in outcomes.items()}
    guarantee = Guarantee(epsilon, delta)
    learn = partial(learn_exits, fitted, temperatures=temperatures, gmacs=gmacs.tolist(), guarantee=guarantee, seed=0)
    apply = partial(follow, temperatures=temperatures, gmacs=gmacs)
    click.echo(f"epsilon {epsilon:g}, delta {delta:g}, {gmacs[-1]:.4g} GMACs in all")
    if splits is not None:
        images = min(max(round(share * len(exits)), 1), len(exits) - 1)
        print_splits(exits, guarantee, splits, images, learn, apply)
    elif isinstance(outcome := learn(exits), str):
        click.echo(outcome)
    else:
        print_exits(outcome, apply(outcome, tested))


def print_temperatures(outcomes: Mapping[str, TemperatureOutcome], fitted: ChainLogits, tested: ChainLogits) -> None:
    """NLL and ECE on the test images, with the paired interval of the change in NLL."""
    click.echo(f"temperatures from {len(fitted)} images, judged on {len(tested)}; NLL in nats, ECE in %")
    for name, outcome in outcomes.items():
        rows = np.arange(len(tested))
        losses = [-log_softmax(tested.logits[name] / t)[rows, tested.labels] for t in (1.0, outcome.fit.temperature)]
        change = mean_interval(losses[1] - losses[0])
        before, after = outcome.before, outcome.after
        click.echo(
            f"{name:<10} T {outcome.fit.temperature:.3f}  NLL {before.nll.value:.3f} -> {after.nll.value:.3f} "
            f"({change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}])  ECE {100 * before.ece:.2f} -> "
            f"{100 * after.ece:.2f}, floor {100 * after.ece_floor:.2f} (95 %: {100 * after.ece_floor_95:.2f})"
        )


class Followed(NamedTuple):
    """What N images get with exits."""

    stopped: np.ndarray  # graph that each stopped after, from 0
    differs: np.ndarray  # whether its class is not the full chain's
    points: np.ndarray  # with exits minus without: 100, 0 or -100
    share: np.ndarray  # of the full chain's GMACs


def follow(
    outcome: ExitOutcome, tested: ChainLogits, *, temperatures: Mapping[str, float], gmacs: np.ndarray
) -> Followed:
    """Apply learned exits to images."""
    thresholds = [NEVER if t is None else t for t in outcome.thresholds.values()]
    stopped, got = apply_exits(tested, temperatures, thresholds)
    full = list(tested.logits.values())[-1].argmax(1)
    points = 100.0 * (got == tested.labels) - 100.0 * (full == tested.labels)
    return Followed(stopped, got != full, points, gmacs[stopped] / gmacs[-1])


def print_exits(outcome: ExitOutcome, found: Followed) -> None:
    """The thresholds, and what they do on the test images."""
    points, shares = mean_interval(found.points), np.bincount(found.stopped, minlength=len(outcome.stopped))
    click.echo(
        f"exits from {outcome.images} images: thresholds {dict(outcome.thresholds)}, {outcome.disagreements} "
        f"disagreed, bound {100 * outcome.bound:.2f} %\n"
        f"on {len(found.stopped)} others: {found.differs.sum()} disagree ({100 * found.differs.mean():.2f} %), "
        f"stopped after each graph {shares.tolist()}, mean cost {100 * found.share.mean():.1f} %, "
        f"top-1 {points.value:+.2f} points [{points.low:+.2f}, {points.high:+.2f}]"
    )


def print_splits(
    exits: ChainLogits,
    guarantee: Guarantee,
    splits: int,
    images: int,
    learn: Callable[[ChainLogits], ExitOutcome | str],
    apply: Callable[[ExitOutcome, ChainLogits], Followed],
) -> None:
    """Thresholds from so many random images, disagreement on the others.

    The parts of one split are not independent: what one has of a fixed set's disagreements the other lacks. Beside
    the others' share, that of the whole folder is therefore judged, too.
    """
    rows: list[tuple[float, ...]] = []
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(len(exits))
        first, second = (exits.take(part) for part in np.split(order, [images]))
        if isinstance(outcome := learn(first), str):
            rows.append((0.0, 0.0, 1.0, 0.0))  # no exits
            continue
        found = apply(outcome, second)
        whole = apply(outcome, exits).differs.mean()
        rows.append((found.differs.mean(), whole, found.share.mean(), found.points.mean()))
    other, whole, share, points = np.array(rows).T
    above = [int((shares > guarantee.epsilon).sum()) for shares in (other, whole)]
    click.echo(
        f"{splits} random splits, {images} images for thresholds and {len(exits) - images} for the test; "
        f"no exits in {int((share == 1).sum())}\n"
        f"others: disagreement {100 * other.mean():.2f} % on average, at most {100 * other.max():.2f} %, "
        f"above epsilon in {above[0]}; on the whole folder above epsilon in {above[1]}; "
        f"delta allows {guarantee.delta * splits:g} on average\n"
        f"mean cost {100 * share.mean():.1f} % of the full chain ({100 * share.min():.1f} to {100 * share.max():.1f}), "
        f"top-1 {points.mean():+.2f} points"
    )


if __name__ == "__main__":
    main()
