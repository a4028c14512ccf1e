"""`mge-bench`: measure a bundle on this device, or check that it predicts as it should."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mge_runtime.cli.common import (
    Opening,
    note,
    opening_options,
    options_given,
    reports_errors,
    say,
)
from mge_runtime.cli.common import report as report_error
from mge_runtime.errors import MGEError
from mge_runtime.files import echo
from mge_runtime.interrupt import interruptible

if TYPE_CHECKING:
    from mge_runtime.bench_report import Report

_MEASURING = ("batch", "seconds")  # of no use to --selfcheck
_MOST_BATCH, _MOST_RUNS, _MOST_SECONDS = 4096, 1_000_000, 86_400
_READ_SHARE = 0.1  # of the time, to read the named images; one is read in any case


def _batches(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Read "1,8"."""
    sizes = [part.strip() for part in value.split(",")]
    for size in sizes:
        if not size.isdecimal() or len(size) > 9 or not 1 <= int(size) <= _MOST_BATCH:
            raise click.BadParameter(
                f"{size!r} is no batch size; expected numbers from 1 to {_MOST_BATCH}, such as 1,8", context, parameter
            )
    return tuple(dict.fromkeys(map(int, sizes)))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("images", nargs=-1)
@click.option("--engine", default="mge.plan", show_default=True, help="The bundle to measure or check.")
@click.option("--selfcheck", is_flag=True, help="Check predictions, memory and CUDA graphs; measures no speed.")
@opening_options
@click.option(
    "-b",
    "--batch",
    default="1",
    show_default=True,
    callback=_batches,
    metavar="N,N,...",
    help="Batch sizes to measure.",
)
@click.option(
    "--seconds", type=click.IntRange(1, _MOST_SECONDS), default=60, show_default=True, help="Time of the whole run."
)
@click.option(
    "--runs",
    type=click.IntRange(2, _MOST_RUNS),
    default=1000,
    show_default=True,
    help="With --selfcheck: runs of the memory check.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, with every number that was measured.")
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the report: .json, .md (to post in an issue) or text.",
)
@click.version_option(package_name="mge")
@reports_errors
def main(
    images: tuple[str, ...],
    engine: str,
    selfcheck: bool,
    opening: Opening,
    batch: tuple[int, ...],
    seconds: int,
    runs: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure a bundle on this device with IMAGES: files, folders or quoted patterns.

    Timed are the chain, each of its graphs, image files to predictions, and a fresh process from its start to its first
    prediction. Without IMAGES synthetic ones are used; an image that cannot be read is reported and passed over. The
    run ends after --seconds, but for the measurement that runs then; what there was no time for is listed as not run.

    With --selfcheck it is checked instead, and no speed is measured. What cannot be checked here is listed as not run,
    with the reason, and counts neither way.

    The exit code is 1 if a check failed, if nothing could be measured, and after Ctrl-C or SIGTERM: the report is then
    of what was measured before, and says so.
    """
    if unused := options_given(*(_MEASURING if selfcheck else ("runs",))):
        what = "--selfcheck measures no speed" if selfcheck else "without --selfcheck nothing is checked"
        raise click.UsageError(f"{what}, so it cannot use {', '.join(unused)}; leave that out")
    with interruptible("the bench", "nothing was measured yet", MGEError) as interrupt:
        from mge_runtime.files import check_writable
        from mge_runtime.sources import find_images

        if out is not None:
            check_writable(out)
        listed = find_images(images)
        found = listed.images or listed.whole()
        for _, problem in listed.problems:
            report_error(problem)
        if message := listed.note():
            note(message)
        from mge_runtime.bench_subject import Images, open_subject

        subject = open_subject(engine, **opening)
        if selfcheck:
            from mge_runtime.selfcheck import run_checks

            read = Images.read(found, subject, problem=report_error)
            report: Report = run_checks(subject, read, runs=runs, say=say, interrupt=interrupt)
        else:
            from mge_runtime.bench import run_bench

            say(f"this takes {seconds} s at most; --seconds names another time")
            reading = _READ_SHARE * seconds
            read = Images.read(found, subject, problem=report_error, seconds=reading)
            report = run_bench(subject, read, batch, seconds - reading, say=say, interrupt=interrupt)
        interrupt.consequence = "the report is of what was measured before"
        _write(report, as_json, out)
        interrupt()
    if report.failed:
        raise SystemExit(1)


def _write(report: Report, as_json: bool, out: Path | None) -> None:
    """Print a report, and write it in the form that the file's suffix asks for."""
    from mge_runtime.files import atomic_path

    if out is not None:  # first: the reader of what is printed may be gone
        forms = {".json": report.to_json, ".md": report.to_markdown}
        with atomic_path(out) as temporary:
            temporary.write_text(forms.get(out.suffix.lower(), report.to_text)(), encoding="utf-8")
    echo(report.to_json() if as_json else report.to_text(), nl=False)
