"""`mge-calibrate`: temperatures and early exits of a bundle, learned from labelled images."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mge_runtime.cli.common import at_most_cpus, report, reports_errors
from mge_runtime.errors import MGEError, OutputError
from mge_runtime.files import echo

if TYPE_CHECKING:
    from mge_calibration.calibrate import Learned

__all__ = ["SHARE", "main"]

_REPORT = "calibration.json"
_RELIABILITY = "reliability.png"
_EXITS = "exits.png"


class _Share(click.FloatRange):
    """A share or a probability; below one in a million no number of images would do."""

    def __init__(self) -> None:
        super().__init__(1e-6, 1, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if number != number:  # NaN passes every comparison with a bound
            self.fail(f"{value} is no number from {self.min:g} to 1.", param, ctx)
        return number


SHARE = _Share()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", default="mge.plan", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Labelled images that the model was not trained on: DIR/<class>/*.jpg, or DIR/val/<class>/*.jpg. For exits "
    "they must be new to every choice: no validation images, which chose the checkpoint.",
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
    help="Share of answers that may differ from the full chain's.",
)
@click.option(
    "--delta",
    type=SHARE,
    default=0.05,
    show_default=True,
    help="Probability that this promise fails.",
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
    help=f"Also write {_REPORT}, {_RELIABILITY} and {_EXITS} here.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda (the first GPU), cuda:1 or 1, ...")
@click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime, tensorrt, tensorrt-rtx.")
@click.option(
    "-j",
    "--threads",
    type=click.IntRange(min=1),
    callback=at_most_cpus,
    help="Processors to compute with.  [default: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written to the bundle.")
@click.version_option(package_name="mge")
@reports_errors
def main(
    bundle: Path,
    data: Path,
    exit_data: Path | None,
    epsilon: float,
    delta: float,
    seed: int,
    report_to: Path | None,
    device: str,
    backend: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Calibrate BUNDLE (default: mge.plan): its probabilities, and where its chain may stop early.

    One temperature for each answer makes probabilities mean what they say. Thresholds on them say when an expert
    suffices: with probability 1 - delta at most a share epsilon of answers then differs from the full chain's on new
    images from the same source, answered by the same backend on the same kind of device. Images for this are others
    than those that set the temperatures or taught INT8, and independent draws from their source: of a burst of frames
    or of several pictures of one object take one. Both go into the bundle, in place of an earlier calibration; if
    anything fails the bundle stays as it was.

    An image that cannot be read is reported and passed over; the exit code is 1 then.
    """
    from mge_runtime.interrupt import interruptible

    _require_libraries()
    with interruptible("the calibration", f"{bundle} is as it was; run it again", MGEError):
        from mge_calibration.calibrate import Request, bundle_values, learn, publish
        from mge_calibration.report import as_text, as_values
        from mge_runtime.bundle.attachments import Calibration
        from mge_runtime.calibrated import Promise
        from mge_runtime.files import atomic_path

        request = Request(bundle, data, exit_data, Promise(epsilon, delta), seed, device, backend, threads)
        if report_to is not None:
            _make_folder(report_to)
        learned = learn(request, say=lambda line: click.echo(line, err=True), problem=report, progress=_progress)
        values = bundle_values(learned, as_values(learned))
        if report_to is not None:
            _draw(learned, report_to)
            with atomic_path(report_to / _REPORT) as part:
                part.write_bytes(Calibration(learned.manifest_sha256, values).to_json())
        publish(learned, values)  # last: where a report cannot be written the bundle stays as it was
    written = json.dumps(values, indent=1)  # in ASCII: every locale can print it
    echo(written if as_json else as_text(learned) + f"\n{bundle}: calibrated")
    if learned.unreadable:
        click.echo(f"{learned.unreadable} images could not be read", err=True)
        raise SystemExit(1)


def _require_libraries() -> None:
    """Say what is missing before the images are answered rather than after."""
    for name in ("scipy", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)  # `reports_errors` says which extra brings it


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}; name another for --report") from error


def _draw(learned: Learned, folder: Path) -> None:
    from mge_calibration.plots import save_exits, save_reliability

    judged = learned.exit_part or learned.temperature_part
    save_reliability(folder / _RELIABILITY, learned.temperatures, judged.images)
    if not isinstance(learned.exits, str):
        save_exits(folder / _EXITS, learned.exits, learned.request.promise)
    else:
        _remove(folder / _EXITS)  # of an earlier calibration


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot remove {path}: {error.strerror}; expected the picture of an earlier calibration: move it away"
        ) from error


def _progress(images: int) -> Callable[[], None]:
    """What shows one more image on a terminal."""
    if not sys.stderr.isatty():
        return lambda: None
    done = itertools.count(1)

    def step() -> None:
        number = next(done)
        click.echo(
            f"\r\x1b[K{number} of {images} images" + ("\r\x1b[K" if number == images else ""), nl=False, err=True
        )

    return step


if __name__ == "__main__":
    main()
