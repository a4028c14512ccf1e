"""`mge-run`: classify images with a bundle."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mge_runtime.cli.common import (
    Number,
    Opening,
    at_most_cpus,
    batch_option,
    exit_option,
    note,
    opening_options,
    options_given,
    report,
    reports_errors,
    verbose_option,
)
from mge_runtime.errors import InputError, MGEError, printable
from mge_runtime.interrupt import interruptible

if TYPE_CHECKING:
    from mge_runtime.backends import Streams
    from mge_runtime.chain import Exit
    from mge_runtime.interrupt import Interrupt
    from mge_runtime.pipeline import Pipeline
    from mge_runtime.report import ImageFolder
    from mge_runtime.sources import ImageList

_TOP = 5
_MANY = 8  # images; from here on several are predicted at once, and a terminal gets a progress bar


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("images", nargs=-1)
@click.option("--files-from", metavar="FILE|-", help="A list of more images, one a line; -: on standard input.")
@click.option(
    "--engine", default="mge.plan", show_default=True, help="The bundle to predict with: a file, or hf://owner/name."
)
@click.option(
    "--video",
    metavar="SOURCE",
    help="Instead of IMAGES: a video file, the number of a camera (0) or a stream (rtsp://, http:// with MJPEG), whose "
    "newest frame is predicted. Needs the extra video.",
)
@click.option(
    "--smooth",
    type=Number(0, min_open=True),
    metavar="SECONDS",
    help="With --video: average over time; a frame counts half after so long.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each image.")
@click.option(
    "--csv",
    "csv_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write a CSV table; - prints it, row by row, instead of text.",
)
@click.option(
    "--save",
    "save_to",
    metavar="DIR|FILE.mp4",
    type=click.Path(path_type=Path),
    help="Also draw each prediction: boxes and heat maps on the image, classes, gate. With --video: an MP4 file.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help=f"Likeliest classes to report.  [default: {_TOP}; as text for several images: 1]",
)
@opening_options
@batch_option(1)
@click.option(
    "--streams",
    type=click.IntRange(min=1),
    callback=at_most_cpus,
    help=f"Images (or batches) computed side by side.  [default: 1; from {_MANY} images on: one for each processor]",
)
@exit_option
@verbose_option
@click.version_option(package_name="mge")
@reports_errors
def main(
    images: tuple[str, ...],
    files_from: str | None,
    video: str | None,
    smooth: float | None,
    engine: str,
    as_json: bool,
    csv_path: Path | None,
    save_to: Path | None,
    top_k: int | None,
    opening: Opening,
    batch: int,
    streams: int | None,
    exit_at: Exit,
    verbose: int,  # noqa: ARG001 - the option's callback has seen to it
) -> None:
    """Classify IMAGES: files, folders (searched deep), quoted patterns, @FILE for a list, - for one on standard input.

    An image that cannot be read is reported and passed over; the exit code is 1 then, as it is after Ctrl-C or SIGTERM.
    Files appear whole or not at all: what is printed or drawn stays after an interrupt, a CSV file does not.
    """
    if video is not None:
        _check_video_options(video, save_to, as_json=as_json)
    elif options_given("smooth"):
        raise click.UsageError("--smooth averages over the frames of --video SOURCE; name one")
    elif not images and files_from is None:
        raise click.UsageError("name images, a list of them with --files-from, or a --video")
    elif ("-" in images) + ("@-" in images) + (files_from == "-") > 1:
        raise click.UsageError("standard input holds one image (-) or one list of them (--files-from -); name one")
    with ExitStack() as stack:
        interrupt = stack.enter_context(interruptible("the run", "nothing was predicted", MGEError))
        from mge_runtime.pipeline import Pipeline
        from mge_runtime.report import image_folder, is_stdout

        if as_json and is_stdout(csv_path):
            raise click.UsageError("--json and --csv - would both be printed; name a file for the CSV table")
        listed = None if video is not None else _listed(images, files_from)
        drawn = stack.enter_context(image_folder(save_to, listed.images)) if listed and save_to else None
        default: Streams = "auto" if listed and len(listed.images) >= _MANY else 1
        pipeline = stack.enter_context(Pipeline.open(engine, streams=streams or default, exit=exit_at, **opening))
        if pipeline.choice.note and pipeline.choice.command is None:  # else opening has said it
            note(pipeline.choice.note)
        if listed is not None:
            whole = _run_images(
                pipeline, listed, drawn, csv_path, top_k, as_json=as_json, batch=batch, interrupt=interrupt
            )
        else:
            from mge_runtime.cli.video import run_video

            assert video is not None  # noqa: S101 - or images would be listed; for the type checker
            source = click.get_current_context().get_parameter_source("exit_at")
            if pipeline.calibrated.exits and source is ParameterSource.DEFAULT:
                pipeline.exit = "calibrated"  # the next frame is waiting
            whole = run_video(
                pipeline,
                video,
                as_json=as_json,
                top_k=top_k or _TOP,
                save=save_to,
                half_life=smooth,
                max_pixels=opening["max_pixels"],
                interrupt=interrupt,
            )
    if not whole:
        raise SystemExit(1)


def _check_video_options(video: str, save_to: Path | None, *, as_json: bool) -> None:
    if unused := options_given("images", "files_from", "csv_path", "batch", "streams"):
        raise click.UsageError(f"--video reads frames one after the other and cannot use {', '.join(unused)}")
    if not as_json and options_given("top_k"):
        raise click.UsageError("--video prints one class a line and cannot use --top-k; add --json")
    if save_to is not None and save_to.suffix.lower() != ".mp4":
        raise click.UsageError(f"--save {save_to}: with --video expected a file that ends with .mp4")
    if save_to is not None and os.path.realpath(save_to) == os.path.realpath(video):
        raise click.UsageError(f"--save {save_to} is the video itself; name another file")


def _listed(images: tuple[str, ...], files_from: str | None) -> ImageList:
    """The images that were named, at least one; what is not there is reported."""
    from mge_runtime.sources import find_images

    listed = find_images(images, files_from)
    for _, problem in listed.problems:
        report(problem)
    if message := listed.note():
        note(message)
    if not listed.images:
        raise SystemExit(1)
    return listed


def _run_images(
    pipeline: Pipeline,
    listed: ImageList,
    drawn: ImageFolder | None,
    csv_path: Path | None,
    top_k: int | None,
    *,
    as_json: bool,
    batch: int,
    interrupt: Interrupt,
) -> bool:
    """Predict, print, draw and tabulate the images; returns whether all of them could be read."""
    from mge_runtime.fonts import undrawable
    from mge_runtime.report import CsvTable, Lines, csv_table, is_stdout

    found, problems, manifest = listed.images, listed.problems, pipeline.manifest
    if drawn and (message := undrawable(map(printable, manifest.class_names))):
        note(message)
    text = "line" if len(found) > 1 and top_k is None else "block"
    top_k = min(top_k or _TOP, len(manifest.class_names))
    failed = len(problems)
    with ExitStack() as stack:
        csv_printed = is_stdout(csv_path)
        outputs: list[Lines | CsvTable] = [] if csv_printed else [Lines("json" if as_json else text, top_k)]
        if csv_path:
            judged = pipeline.calibrated.conformal is not None
            outputs.append(stack.enter_context(csv_table(csv_path, len(manifest.views), top_k, judged)))
        for output in outputs:
            for name, problem in problems:
                output.add_error(name, problem)
        predictions = pipeline.predict_iter((image.source() for image in found), batch=batch)
        results: Iterable[Any] = zip(found, predictions, strict=True)
        if bar := len(found) >= _MANY and sys.stderr.isatty():
            results = stack.enter_context(
                click.progressbar(results, len(found), file=sys.stderr, show_pos=True, item_show_func=_shown)
            )
        for number, (image, (source, prediction)) in enumerate(results):
            interrupt.consequence = f"{number} of {len(found)} images were done" + (
                f"; {csv_path} was not written" if csv_path and not csv_printed else ""
            )
            if bar:
                click.echo("\r\x1b[K", nl=False, err=True)  # it makes way for what is printed and comes back below
            try:
                if isinstance(prediction, InputError):
                    raise prediction
                saved = drawn.save(image, source, prediction) if drawn else None
            except InputError as error:
                failed += 1
                report(error)
                for output in outputs:
                    output.add_error(image.name, error)
                continue
            for output in outputs:
                output.add(image.name, prediction, saved)
    if failed and len(found) > 1:
        click.echo(f"{failed} of {len(found) + len(problems)} could not be read", err=True)
    return not failed


def _shown(result: Any) -> str | None:
    """The image beside the bar: the end of its name, which differs from image to image."""
    return None if result is None else printable(result[0].name[-40:])


if __name__ == "__main__":
    main(prog_name="mge-run")
