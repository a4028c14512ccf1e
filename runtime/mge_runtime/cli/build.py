"""`mge-build`: add TensorRT engines to a bundle, or build those of this device into its cache. Needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mge_runtime.cli.common import GPU_STATUS, engine_batch_option, reports_errors, say, verbose_option
from mge_runtime.errors import BackendError, BuildError
from mge_runtime.files import echo
from mge_runtime.interrupt import interruptible

if TYPE_CHECKING:
    from mge_runtime.trt.build import GraphProgress


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("bundle", default="mge.plan", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("native",),
    show_default=True,
    help="native: this machine's GPU. rtx:sm86,sm89,sm120: ahead of time with TensorRT-RTX, no GPU needed. Repeatable.",
)
@click.option("--into-bundle", is_flag=True, help="Keep the engines in the bundle, beside those of other targets.")
@engine_batch_option
@click.option("--opt-level", type=click.IntRange(0, 5), help="0 builds quickest, 5 runs quickest.  [default: 3]")
@click.option(
    "--workspace",
    type=click.IntRange(1, 1_000_000),
    metavar="MB",
    help="Scratch memory a layer may use.  [default: all; on a Jetson a quarter of what is available]",
)
@click.option("--backend", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto", show_default=True)
@click.option("--device", default="cuda:0", show_default=True, help="The GPU to build for.")
@verbose_option
@click.version_option(package_name="mge")
@reports_errors
def main(
    bundle: Path,
    targets: tuple[str, ...],
    into_bundle: bool,
    batch: str,
    opt_level: int | None,
    workspace: int | None,
    backend: str,
    device: str,
    verbose: int,
) -> None:
    """Build the TensorRT engines of BUNDLE (default: mge.plan).

    For this machine's GPU they go into a cache, where mge-run finds them; with --into-bundle they travel in the file. A
    build that is stopped leaves the bundle as it was.
    """
    with interruptible("the build", f"{bundle} is as it was; run it again", BuildError) as interrupt:
        from mge_runtime.trt.build import build_targets
        from mge_runtime.trt.builder import BuildOptions
        from mge_runtime.trt.target import BatchRange, parse_request

        requests = [parse_request(text) for text in dict.fromkeys(targets)]
        if any(requests) and not into_bundle:
            raise BackendError(
                "engines that are built ahead of time are for other machines, so they are kept in the bundle; add "
                "--into-bundle"
            )
        scratch = None if workspace is None else workspace * 1_000_000  # bytes
        options = BuildOptions(BatchRange.parse(batch), opt_level, scratch)

        def kept(target: str, place: str) -> None:
            echo(f"{target}: {place}")
            interrupt.consequence = "it is finished for the targets that were printed; run it again for the others"

        build_targets(
            bundle,
            requests,
            into_bundle=into_bundle,
            backend=backend,
            device=device,
            options=options,
            interrupt=interrupt,
            verbose=bool(verbose),
            say=say,
            progress=shown_progress(),
            kept=kept,
        )
    click.echo(
        f"TensorRT execution is {GPU_STATUS['tensorrt']}; mge-bench --selfcheck checks it on the device", err=True
    )


def shown_progress() -> GraphProgress:
    """Show the progress of a build on a terminal."""
    terminal = sys.stderr.isatty()
    shown = ""

    def progress(graph: str, share: float, phase: str) -> None:
        nonlocal shown
        text = f"{graph}: {share:4.0%} {phase}"[:79]
        if terminal and text != shown:
            shown = text
            click.echo(f"\r\x1b[K{text}\r", nl=False, err=True)

    return progress
