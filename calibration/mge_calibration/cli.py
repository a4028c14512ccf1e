"""`mge-calibrate`: temperatures, early exits and rejection of a bundle, learned from labeled images."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from mge_runtime.cli.common import (
    Number,
    Opening,
    opening_options,
    report,
    reports_errors,
    say,
)
from mge_runtime.errors import MGEError, OutputError
from mge_runtime.files import echo

_REPORT = "calibration.json"
_RELIABILITY = "reliability.png"


SHARE = Number(1e-6, 1, max_open=True)  # below one in a million no number of images would do
_REJECT, _COVERAGE = 0.05, 0.95


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", default="mge.plan", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Labeled images that the model was not trained on: DIR/<class>/*.jpg, DIR/val/<class>/*.jpg, a downloaded "
    "data set or a table of paths (the validation split; CUB_200_2011/test names another). For exits they must be new "
    "to every choice: no validation images, which chose the checkpoint.",
)
@click.option(
    "--exit-data",
    type=click.Path(path_type=Path),
    help="Other images for the exits, which no choice has seen; --data may be validation images then.  "
    "[default: two thirds of --data]",
)
@click.option(
    "--epsilon",
    type=SHARE,
    default=0.01,
    show_default=True,
    help="Share of images whose class may differ from the full chain's.",
)
@click.option(
    "--delta",
    type=SHARE,
    default=0.05,
    show_default=True,
    help="Probability that this guarantee fails.",
)
@click.option(
    "--reject",
    type=SHARE,
    help="Learn to reject what is of no class, and at most this share of known images with it.  "
    f"[default with --reject-data: {_REJECT}]",
)
@click.option(
    "--reject-data",
    type=click.Path(path_type=Path),
    help="Images of no class, in a folder: report how many of them are rejected.",
)
@click.option(
    "--coverage",
    type=Number(1e-6, 1 - 1e-6),
    help="Learn sets of classes that hold the right one for this share of images; with --hierarchy "
    f"also the share of coarser classes.  [default of that: {_COVERAGE}]",
)
@click.option(
    "--hierarchy",
    metavar="CSV",
    type=click.Path(path_type=Path),
    help="Columns label and parent: predict what lies above a class, too, right for the share of --coverage.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the split of --data and of the intervals.",
)
@click.option(
    "--report",
    "report_to",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help=f"Also write {_REPORT} and {_RELIABILITY} here.",
)
@opening_options
@click.option("--json", "as_json", is_flag=True, help="Print what was written to the bundle.")
@click.version_option(package_name="mge")
@reports_errors
def main(
    bundle: Path,
    data: Path,
    exit_data: Path | None,
    epsilon: float,
    delta: float,
    reject: float | None,
    reject_data: Path | None,
    coverage: float | None,
    hierarchy: Path | None,
    seed: int,
    report_to: Path | None,
    opening: Opening,
    as_json: bool,
) -> None:
    """Calibrate BUNDLE (default: mge.plan): its probabilities, where its chain may stop early, and what it rejects.

    One temperature after each graph makes probabilities mean what they say. Thresholds on them say when an expert
    suffices: with probability 1 - delta at most a share epsilon of new images from the same source then gets another
    class than from the full chain, run by the same backend on the same kind of device. Images for this are others than
    those that set the temperatures or taught INT8, and independent draws from their source: of a burst of frames or of
    several images of one object take one. Half of them set rejection, sets and coarser classes instead, where those are
    asked for. All goes into the bundle, in place of an earlier calibration; if anything fails the bundle stays as it
    was.

    An image that cannot be read is reported and passed over; the exit code is 1 then.
    """
    from mge_runtime.interrupt import interruptible

    with interruptible("the calibration", f"{bundle} is as it was; run it again", MGEError):
        for name in ("scipy", "onnx", *(["matplotlib"] if report_to else [])):
            importlib.import_module(name)  # now, not after the images: `reports_errors` says which extra brings it
        from mge_calibration.calibrate import Request, learn, publish
        from mge_calibration.conformal import ConformalRequest
        from mge_calibration.report import as_text, as_values, save_reliability
        from mge_runtime.bundle.attachments import Calibration
        from mge_runtime.calibrated import Guarantee
        from mge_runtime.files import atomic_path

        guarantee = Guarantee(epsilon, delta)
        missed = None if coverage is None else round(1 - coverage, 12)
        conformal = ConformalRequest(
            reject or (_REJECT if reject_data else None),
            sets=missed,
            coarse=(round(1 - _COVERAGE, 12) if missed is None else missed) if hierarchy else None,
            hierarchy=hierarchy,
            unknown=reject_data,
        )
        request = Request(bundle, data, exit_data, guarantee, seed, opening, conformal)
        if report_to is not None:
            _make_folder(report_to)
        learned = learn(request, say=say, problem=report, progress=_progress)
        values = as_values(learned)
        if report_to is not None:
            save_reliability(report_to / _RELIABILITY, learned.temperatures)
            with atomic_path(report_to / _REPORT) as part:
                part.write_bytes(Calibration(learned.manifest_sha256, values).to_json())
        publish(learned, values)  # last: where a report cannot be written the bundle stays as it was
    written = json.dumps(values, indent=1)  # in ASCII: every locale can print it
    echo(written if as_json else as_text(learned) + f"\n{bundle}: calibrated")
    if learned.unreadable:
        click.echo(f"{learned.unreadable} images could not be read", err=True)
        raise SystemExit(1)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {path}: {error.strerror}; name another for --report") from error


def _progress(images: int) -> AbstractContextManager[Any]:
    """A bar, on a terminal alone."""
    return click.progressbar(length=images, label="images", file=sys.stderr, hidden=not sys.stderr.isatty())
