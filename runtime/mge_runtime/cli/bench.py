"""`mge-bench`: check a bundle on this device, and report what was found."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mge_runtime.cli.common import reports_errors

_RUNS = 1000


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("images", nargs=-1)
@click.option("--engine", default="mge.plan", show_default=True, help="The bundle to check.")
@click.option("--selfcheck", is_flag=True, help="Check answers, memory, copies and graphs; measures no speed.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
@click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime, tensorrt, tensorrt-rtx.")
@click.option("--runs", type=click.IntRange(min=2), default=_RUNS, show_default=True, help="Runs of the memory check.")
@click.option("--threads", type=click.IntRange(min=1), help="Processors to compute with on the CPU.  [default: all]")
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
    runs: int,
    threads: int | None,
    as_json: bool,
    out: Path | None,
) -> None:
    """Check a bundle on this device, with photographs from IMAGES: files, folders or quoted patterns.

    Without IMAGES it is checked with drawn pictures. The exit code is 1 if a check failed; what cannot be checked here
    is listed as not run, with the reason, and counts neither way.
    """
    if not selfcheck:
        raise click.UsageError("measuring speed is not built yet; expected --selfcheck")
    from mge_runtime.errors import InputError
    from mge_runtime.files import atomic_path
    from mge_runtime.selfcheck.pictures import drawn_frames, photograph_frames
    from mge_runtime.selfcheck.run import run_checks
    from mge_runtime.selfcheck.subject import open_subject
    from mge_runtime.sources import find_images

    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")
    found, problems = find_images(images)
    if problems:
        raise problems[0]
    if images and not found:
        raise InputError("no image was found; name photographs, or none to check with drawn pictures")
    subject = open_subject(engine, device, backend, threads)
    preprocess = subject.manifest.preprocess
    frames = photograph_frames(found, preprocess) if found else drawn_frames(preprocess)
    report = run_checks(subject, frames, runs=runs, say=lambda line: click.echo(line, err=True))
    click.echo(report.to_json() if as_json else report.to_text(), nl=False)
    if out is not None:
        forms = {".json": report.to_json, ".md": report.to_markdown}
        with atomic_path(out) as temporary:
            temporary.write_text(forms.get(out.suffix.lower(), report.to_text)(), encoding="utf-8")
    if report.failed:
        raise SystemExit(1)
