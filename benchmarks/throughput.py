"""What `mge-run` costs beyond the chain: wall time over a folder against computing alone on decoded frames.

    python -m benchmarks.throughput --engine mge.plan groceries/test

All run in this process, in turn, and medians are compared. The command's time holds everything: opening the bundle,
decoding, preprocessing, computing, printing. "Chain" runs the same bundle on frames that already lie in memory: one
after the other with all processors, and in streams as the command does; the limit is for the faster of the two. Of the
command's first pass memory is watched: it must stay flat, and every image must be predicted. Exit code 1 where a limit
is missed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.rounds import ratio, time_rounds
from mge_runtime import Pipeline
from mge_runtime.batching import prefetch
from mge_runtime.cli.common import reports_errors
from mge_runtime.cli.run import main as mge_run
from mge_runtime.decode import open_image
from mge_runtime.preprocess import to_frame
from mge_runtime.sources import find_images

PAGE = os.sysconf("SC_PAGE_SIZE")
GROWTH = 1.05  # of memory after the first fifth that still counts as flat


@contextmanager
def sampled_memory(interval: float = 0.05) -> Iterator[list[float]]:
    """Yield a list that gets the resident memory of this process, MB, as long as the block runs."""
    samples: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            samples.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def run_command(engine: Path, folder: Path, batch: int, expected: int) -> None:
    """One `mge-run` over the folder; its output goes to a file and must hold a line for every image."""
    with tempfile.TemporaryFile("w+") as lines:
        with redirect_stdout(lines):
            mge_run(["--engine", str(engine), "--json", "--batch", str(batch), str(folder)], standalone_mode=False)
        lines.seek(0)
        if (count := sum(1 for _ in lines)) != expected:
            raise SystemExit(f"error: mge-run predicted {count} of {expected} images")


def run_chain(pipeline: Pipeline, frames: np.ndarray, batch: int) -> None:
    """The chain over all frames, in as many streams as the pipeline has."""
    groups = [frames[first : first + batch] for first in range(0, len(frames), batch)]
    for _ in prefetch(pipeline.run, groups, threads=pipeline.streams, ahead=2 * pipeline.streams):
        pass


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--engine", type=click.Path(path_type=Path), default="mge.plan", show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--limit", default=1.15, show_default=True, help="Most that mge-run may take, x the chain.")
@reports_errors
def main(folder: Path, engine: Path, batch: int, rounds: int, limit: float) -> None:
    """Measure, print and judge."""
    images = find_images([str(folder)]).whole()
    with sampled_memory() as memory:
        run_command(engine, folder, batch, len(images))
    peaks = [float(part.max()) for part in np.array_split(np.array(memory), 5) if len(part)]
    with ExitStack() as stack:
        many = stack.enter_context(Pipeline.open(engine, streams="auto"))
        one = stack.enter_context(Pipeline.open(engine))
        frames = np.stack([to_frame(open_image(image.source()), one.manifest.preprocess)[0] for image in images])
        ways = {
            "mge-run": lambda: run_command(engine, folder, batch, len(images)),
            "chain, one by one": lambda: [one.run(frames[n : n + batch]) for n in range(0, len(frames), batch)],
            f"chain, {many.streams} streams": lambda: run_chain(many, frames, batch),
        }
        taken = time_rounds(ways, rounds)
    for name, times in taken.items():
        click.echo(f"{name:18} {median(times) / 1e3:7.2f} s  {median(times) / len(images):7.1f} ms an image")
    quickest = min((name for name in taken if name != "mge-run"), key=lambda name: median(taken[name]))
    found = ratio(taken["mge-run"], taken[quickest])
    flat = len(peaks) < 2 or max(peaks[1:]) <= GROWTH * peaks[1]  # the first fifth holds the opening
    click.echo(f"{len(images)} images, batch {batch}: mge-run / {quickest} {found} (limit {limit})")
    click.echo(f"memory   {', '.join(f'{peak:.0f}' for peak in peaks)} MB, largest in each fifth of one mge-run")
    if not flat:
        click.echo(f"memory grew by more than {GROWTH - 1:.0%} after the first fifth")
    sys.exit(int(found.median > limit or not flat))


if __name__ == "__main__":
    main()
