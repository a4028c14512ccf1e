"""`mge-bench`: measure a bundle on this device, or check that it answers as it should."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from mge_runtime.cli.common import at_most_cpus, note, reports_errors
from mge_runtime.cli.common import report as report_error
from mge_runtime.errors import MGEError
from mge_runtime.files import echo
from mge_runtime.interrupt import Interrupt, interruptible

if TYPE_CHECKING:
    from mge_runtime.bench.deadline import Deadline
    from mge_runtime.bench.inputs import Inputs
    from mge_runtime.bench.run import Request
    from mge_runtime.bundle import Bundle
    from mge_runtime.sources import NamedImage

_RUNS = 1000
_MOST_BATCH, _MOST_RUNS, _MOST_SECONDS = 4096, 1_000_000, 86_400


class _Report(Protocol):
    @property
    def failed(self) -> bool: ...
    def to_json(self) -> str: ...
    def to_text(self) -> str: ...
    def to_markdown(self) -> str: ...


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
@click.option("--selfcheck", is_flag=True, help="Check answers, memory, copies and graphs; measures no speed.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda (the first GPU), cuda:1 or 1, ...")
@click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime, tensorrt, tensorrt-rtx.")
@click.option(
    "-j",
    "--threads",
    type=click.IntRange(min=1),
    callback=at_most_cpus,
    help="Processors to compute with on the CPU.  [default: all]",
)
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
    "--seconds",
    type=click.IntRange(1, _MOST_SECONDS),
    help="Time of the whole run.  [default: 120 and 60 for each further batch size, or what --iterations takes]",
)
@click.option(
    "--iterations",
    type=click.IntRange(1, _MOST_RUNS),
    help="Runs of each contender.  [default: as many as there is time for]",
)
@click.option(
    "--warmup", type=click.IntRange(1, _MOST_RUNS), help="Runs of each before.  [default: until they are steady]"
)
@click.option(
    "--images",
    "image_count",
    type=click.IntRange(1, _MOST_RUNS),
    help="Images of the rounds of pictures to answers.  [default: as many as there is time for]",
)
@click.option(
    "--ckpt",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also measure PyTorch on this checkpoint, which the bundle was exported from.",
)
@click.option(
    "--runs",
    type=click.IntRange(2, _MOST_RUNS),
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
    seconds: int | None,
    iterations: int | None,
    warmup: int | None,
    image_count: int | None,
    ckpt: Path | None,
    runs: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure a bundle on this device, with photographs from IMAGES: files, folders or quoted patterns.

    The whole chain is timed beside its bare trunks (heads, attention and crops cut off) and, with --ckpt, beside eager
    PyTorch, in interleaved rounds: ratios are taken within a round. Without IMAGES pictures are drawn; a
    photograph that cannot be read is reported and passed over. It ends after --seconds, but for the measurement that
    runs then; what there was no time for is listed as not run.

    With --selfcheck it is checked instead, and no speed is measured. What cannot be checked here is listed as not run,
    with the reason, and counts neither way.

    The exit code is 1 if a check failed, if nothing could be measured, and after Ctrl-C or SIGTERM: the report is then
    of what was measured before, and says so.
    """
    with interruptible("the bench", "nothing was measured yet", MGEError) as interrupt:
        from mge_runtime.files import check_writable
        from mge_runtime.sources import find_images

        if out is not None:
            check_writable(out)
        listed = find_images(images)
        found = listed.images or listed.whole()
        for problem in listed.problems:
            report_error(problem)
        if remark := listed.remark():
            note(remark)
        if selfcheck:
            report = _selfcheck(found, engine, device, backend, threads, runs, interrupt)
        else:
            from mge_runtime.bench.run import Request

            path = Path(engine)
            request = Request(path, device, backend, batch, threads, iterations, warmup, image_count, ckpt, seconds)
            report = _bench(request, found, interrupt)
        interrupt.consequence = "the report is of what was measured before"
        _give(report, as_json, out)
        interrupt()
    if report.failed:
        raise SystemExit(1)


def _bench(request: Request, found: list[NamedImage], interrupt: Interrupt) -> _Report:
    from mge_runtime.bench.inputs import drawn_inputs, photograph_inputs
    from mge_runtime.bench.report import BenchReport
    from mge_runtime.bench.run import run_bench

    def inputs(bundle: Bundle, deadline: Deadline) -> Inputs:
        """Photographs, or drawn pictures where none was named."""
        spec = bundle.manifest.preprocess
        return photograph_inputs(found, spec, deadline, report_error) if found else drawn_inputs(spec)

    return BenchReport(run_bench(request, inputs, _say, interrupt))


def _selfcheck(
    found: list[NamedImage],
    engine: str,
    device: str,
    backend: str,
    threads: int | None,
    runs: int,
    interrupt: Interrupt,
) -> _Report:
    from mge_runtime.selfcheck import drawn_frames, open_subject, photograph_frames, run_checks

    subject = open_subject(engine, device, backend, threads)
    preprocess = subject.manifest.preprocess
    frames = photograph_frames(found, preprocess) if found else drawn_frames(preprocess)
    return run_checks(subject, frames, runs=runs, say=_say, interrupt=interrupt)


def _say(line: str) -> None:
    """Progress, on standard error; nobody there to read it is no reason to stop."""
    with suppress(OSError):
        click.echo(line, err=True)


def _give(report: _Report, as_json: bool, out: Path | None) -> None:
    """Print a report, and write it in the form that the file's suffix asks for."""
    from mge_runtime.files import atomic_path

    if out is not None:  # first: the reader of what is printed may be gone
        forms = {".json": report.to_json, ".md": report.to_markdown}
        with atomic_path(out) as temporary:
            temporary.write_text(forms.get(out.suffix.lower(), report.to_text)(), encoding="utf-8")
    echo(report.to_json() if as_json else report.to_text(), nl=False)


if __name__ == "__main__":
    main(prog_name="mge-bench")
