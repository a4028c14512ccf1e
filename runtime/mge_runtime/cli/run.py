"""`mge-run`: classify images with a bundle."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mge_runtime.cli.common import (
    at_most_cpus,
    backend_option,
    batch_option,
    device_option,
    max_pixels_option,
    no_mmap_option,
    note,
    report,
    reports_errors,
    threads_option,
    verbose_option,
)
from mge_runtime.errors import InputError, MGEError, printable
from mge_runtime.files import echo
from mge_runtime.interrupt import interruptible

if TYPE_CHECKING:
    from collections.abc import Callable

    from mge_runtime.chain import Exit
    from mge_runtime.report import Form
    from mge_runtime.sources import NamedImage

_TOP = 5
_MANY = 8  # images; from here on several are predicted at once, and a terminal gets a progress bar


def _exit(context: click.Context, parameter: click.Parameter, value: str) -> Exit:
    """Read "calibrated", "never" or the number of a graph."""
    if value == "never" or value == "calibrated":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(
            f'{value!r} is neither "calibrated" nor "never" nor a number from 1 on', context, parameter
        )
    return int(value)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("images", nargs=-1)
@click.option("--files-from", metavar="FILE|-", help="A list of more images, one a line; -: on standard input.")
@click.option("--engine", default="mge.plan", show_default=True, help="The bundle to predict with.")
@max_pixels_option
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
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Also draw each prediction: boxes and heat maps on the image, classes, gate.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help=f"Likeliest classes to report.  [default: {_TOP}; as text for several images: 1]",
)
@device_option
@backend_option
@batch_option(1)
@threads_option
@click.option(
    "--streams",
    type=click.IntRange(min=1),
    callback=at_most_cpus,
    help=f"Images (or batches) computed side by side.  [default: 1; from {_MANY} images on: one for each processor]",
)
@click.option(
    "--exit",
    "exit_at",
    callback=_exit,
    default="never",
    show_default=True,
    metavar="calibrated|never|N",
    help="Stop early: as soon as it is confident enough (mge-calibrate learns when), or after expert N.",
)
@no_mmap_option
@verbose_option
@click.version_option(package_name="mge")
@reports_errors
def main(
    images: tuple[str, ...],
    files_from: str | None,
    max_pixels: int,
    engine: str,
    as_json: bool,
    csv_path: Path | None,
    save_to: Path | None,
    top_k: int | None,
    device: str,
    backend: str,
    batch: int,
    threads: int | None,
    streams: int | None,
    exit_at: Exit,
    no_mmap: bool,
    verbose: int,  # noqa: ARG001 - the option's callback has seen to it
) -> None:
    """Classify IMAGES: files, folders (searched deep), quoted patterns, @FILE for a list, - for one on standard input.

    An image that cannot be read is reported and passed over; the exit code is 1 then, as it is after Ctrl-C or SIGTERM.
    Files appear whole or not at all: what is printed or drawn stays after an interrupt, a CSV file does not.
    """
    if not images and files_from is None:
        raise click.UsageError("name images, or a list of them with --files-from")
    if ("-" in images) + ("@-" in images) + (files_from == "-") > 1:
        raise click.UsageError("standard input holds one image (-) or one list of them (--files-from -); name one")
    with ExitStack() as stack:
        interrupt = stack.enter_context(interruptible("the run", "nothing was predicted", MGEError))
        from mge_runtime.fonts import undrawable
        from mge_runtime.pipeline import Pipeline
        from mge_runtime.report import csv_table, image_folder, is_stdout, shown, shown_error
        from mge_runtime.sources import find_images

        csv_printed = is_stdout(csv_path)
        if csv_printed and as_json:
            raise click.UsageError("--json and --csv - would both be printed; name a file for the CSV table")
        listed = find_images(images, files_from)
        found, problems = listed.images, listed.problems
        for problem in problems:
            report(problem)
        if remark := listed.remark():
            note(remark)
        if not found:
            raise SystemExit(1)
        failed = len(problems)
        one_each = len(found) > 1 and top_k is None
        form: Form = "nothing" if csv_printed else "json" if as_json else "line" if one_each else "block"
        drawn = stack.enter_context(image_folder(save_to, found))
        pipeline = stack.enter_context(
            Pipeline.open(
                engine,
                device,
                backend,
                threads,
                streams or (1 if len(found) < _MANY else "auto"),
                exit=exit_at,
                mmap=not no_mmap,
                max_pixels=max_pixels,
            )
        )
        if pipeline.choice.note and pipeline.choice.command is None:  # else opening has said it
            note(pipeline.choice.note)
        manifest = pipeline.manifest
        if drawn and (remark := undrawable(map(printable, manifest.class_names))):
            note(remark)
        top_k = min(top_k or _TOP, len(manifest.class_names))
        table = stack.enter_context(csv_table(csv_path, len(manifest.views), top_k))
        for name, problem in zip(listed.named, problems, strict=True):
            if text := shown_error(form, name, problem):
                echo(text)
            if table:
                table.add_error(name, problem)
        show = stack.enter_context(_progress(found))
        predictions = pipeline.predict_iter((image.source() for image in found), batch=batch)
        for number, (image, (source, prediction)) in enumerate(zip(found, predictions, strict=True)):
            interrupt.consequence = f"{number} of {len(found)} images were done" + (
                f"; {csv_path} was not written" if csv_path and not csv_printed else ""
            )
            try:
                if isinstance(prediction, InputError):
                    raise prediction
                saved = drawn.save(image, source, prediction) if drawn else None
            except InputError as error:
                failed += 1
                show(image, shown_error(form, image.name, error))
                report(error)
                if table:
                    table.add_error(image.name, error)
                continue
            show(image, shown(form, image.name, prediction, top_k, saved))
            if table:
                table.add(image.name, prediction)
    if failed:
        if len(found) > 1:
            click.echo(f"{failed} of {len(found) + len(problems)} could not be read", err=True)
        raise SystemExit(1)


@contextmanager
def _progress(images: list[NamedImage]) -> Generator[Callable[[NamedImage, str | None], None], None, None]:
    """Yield what prints the text of an image; many images get a bar on standard error where that is a terminal."""
    if len(images) < _MANY or not sys.stderr.isatty():
        yield lambda _, text: None if text is None else echo(text)
        return
    with click.progressbar(length=len(images), file=sys.stderr, show_pos=True, item_show_func=_shown) as bar:

        def step(image: NamedImage, text: str | None) -> None:
            click.echo("\r\x1b[K", nl=False, err=True)  # the bar makes way for the line and comes back below it
            if text is not None:
                echo(text)
            bar.update(1, image)

        yield step


def _shown(image: NamedImage | None) -> str | None:
    """The name beside the bar: the end of it, which differs from image to image."""
    return None if image is None else printable(image.name[-40:])


if __name__ == "__main__":
    main(prog_name="mge-run")
