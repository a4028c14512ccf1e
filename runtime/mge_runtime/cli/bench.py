"""`mge-bench`: measure a bundle on this device, or check that it answers as it should."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from mge_runtime.cli.common import reports_errors

if TYPE_CHECKING:
    from mge_runtime.bench.inputs import Inputs
    from mge_runtime.bundle import Bundle
    from mge_runtime.sources import NamedImage

_RUNS = 1000
_MOST_BATCH = 4096


class _Report(Protocol):
    def to_json(self) -> str: ...
    def to_text(self) -> str: ...
    def to_markdown(self) -> str: ...


def _batches(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Read "1,8"."""
    sizes = [part.strip() for part in value.split(",")]
    for size in sizes:
        if not size.isdecimal() or not 1 <= int(size) <= _MOST_BATCH:
            raise click.BadParameter(
                f"{size!r} is no batch size; expected numbers from 1 to {_MOST_BATCH}, such as 1,8", context, parameter
            )
    return tuple(dict.fromkeys(map(int, sizes)))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("images", nargs=-1)
@click.option("--engine", default="mge.plan", show_default=True, help="The bundle to measure or check.")
@click.option("--selfcheck", is_flag=True, help="Check answers, memory, copies and graphs; measures no speed.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
@click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime, tensorrt, tensorrt-rtx.")
@click.option("--threads", type=click.IntRange(min=1), help="Processors to compute with on the CPU.  [default: all]")
@click.option(
    "--batch", default="1", show_default=True, callback=_batches, metavar="N,N,...", help="Batch sizes to measure."
)
@click.option(
    "--iterations", type=click.IntRange(min=1), help="Runs of each contender.  [default: as many as fit 40 s]"
)
@click.option("--warmup", type=click.IntRange(min=1), help="Runs of each before.  [default: until they are steady]")
@click.option(
    "--images",
    "image_count",
    type=click.IntRange(min=1),
    help="Images of the rounds of pictures to answers.  [default: as many as fit 20 s]",
)
@click.option(
    "--ckpt",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also measure PyTorch on this checkpoint, which the bundle was exported from.",
)
@click.option("--quick", is_flag=True, help="A fifth of the time, for a first look.")
@click.option(
    "--runs",
    type=click.IntRange(min=2),
    default=_RUNS,
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
    device: str,
    backend: str,
    threads: int | None,
    batch: tuple[int, ...],
    iterations: int | None,
    warmup: int | None,
    image_count: int | None,
    ckpt: Path | None,
    quick: bool,
    runs: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure a bundle on this device, with photographs from IMAGES: files, folders or quoted patterns.

    The whole chain is timed beside its bare trunks (heads, attention and crops cut off) and, with --ckpt, beside eager
    PyTorch, in interleaved rounds: ratios are taken within a round. Without IMAGES pictures are drawn.

    With --selfcheck it is checked instead, and no speed is measured. The exit code is 1 then if a check failed; what
    cannot be checked here is listed as not run, with the reason, and counts neither way.
    """
    from mge_runtime.errors import InputError
    from mge_runtime.sources import find_images

    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")
    if out is not None:
        _check_writable(out)
    found = find_images(images).whole()
    if images and not found:
        work = "check" if selfcheck else "measure"
        raise InputError(f"no image was found; name photographs, or none to {work} with drawn pictures")
    if selfcheck:
        _selfcheck(found, engine, device, backend, threads, runs, as_json, out)
        return
    from mge_runtime.bench.report import BenchReport
    from mge_runtime.bench.run import Request, run_bench

    path = Path(engine)
    request = Request(path, device, backend, batch, threads, iterations, warmup, image_count, ckpt, quick)
    results = run_bench(request, lambda bundle: _inputs(found, bundle), lambda line: click.echo(line, err=True))
    _give(BenchReport(results), as_json, out)


def _inputs(found: list[NamedImage], bundle: Bundle) -> Inputs:
    """Photographs, or drawn pictures where none was named."""
    from mge_runtime.bench.inputs import drawn_inputs, photograph_inputs

    spec = bundle.manifest.preprocess
    return photograph_inputs(found, spec) if found else drawn_inputs(spec)


def _selfcheck(
    found: list[NamedImage],
    engine: str,
    device: str,
    backend: str,
    threads: int | None,
    runs: int,
    as_json: bool,
    out: Path | None,
) -> None:
    from mge_runtime.selfcheck.pictures import drawn_frames, photograph_frames
    from mge_runtime.selfcheck.run import run_checks
    from mge_runtime.selfcheck.subject import open_subject

    subject = open_subject(engine, device, backend, threads)
    preprocess = subject.manifest.preprocess
    frames = photograph_frames(found, preprocess) if found else drawn_frames(preprocess)
    report = run_checks(subject, frames, runs=runs, say=lambda line: click.echo(line, err=True))
    _give(report, as_json, out)
    if report.failed:
        raise SystemExit(1)


def _check_writable(out: Path) -> None:
    """That the report can be written, before minutes of work for it."""
    import tempfile

    from mge_runtime.errors import OutputError

    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror}; expected a writable folder, name another place"
        ) from error


def _give(report: _Report, as_json: bool, out: Path | None) -> None:
    """Print a report, and write it in the form that the file's suffix asks for."""
    from mge_runtime.files import atomic_path

    click.echo(report.to_json() if as_json else report.to_text(), nl=False)
    if out is not None:
        forms = {".json": report.to_json, ".md": report.to_markdown}
        with atomic_path(out) as temporary:
            temporary.write_text(forms.get(out.suffix.lower(), report.to_text)(), encoding="utf-8")
