"""How much `mge-run` costs beyond the chain: wall time over a folder against computing alone on decoded frames.

    python benchmarks/run_throughput.py --engine mge.plan ../shared/data/groceries/test

Both run in this process, in turn (the order changes from round to round), and medians are compared. The command's time
holds everything: opening the bundle, decoding, preprocessing, computing, printing. "Chain alone" runs the same bundle
on frames that already lie in memory. The first pass of the command is not timed but watched: its memory over time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from mge_runtime import Pipeline
from mge_runtime.cli.run import main as mge_run
from mge_runtime.decode import decode_image
from mge_runtime.preprocess import to_frame
from mge_runtime.sources import find_images

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


class MemoryWatch:
    """Samples the resident memory while a block runs."""

    def __init__(self, interval: float = 0.05) -> None:
        self.samples: list[float] = []
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.samples.append(resident())

    def part(self, start: float, end: float) -> float:
        """Largest sample between two fractions of the time, in MB."""
        count = len(self.samples)
        return max(self.samples[int(start * count) : max(int(end * count), int(start * count) + 1)])


def command_seconds(engine: str, folder: str, options: list[str]) -> float:
    """Wall time of one `mge-run` over the folder, output thrown away."""
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
        start = time.perf_counter()
        mge_run(["--engine", engine, "--json", *options, folder], standalone_mode=False)
        return time.perf_counter() - start


def chain_seconds(pipeline: Pipeline, frames: np.ndarray, batch: int) -> float:
    """Computing time of the chain over all frames."""
    start = time.perf_counter()
    for first in range(0, len(frames), batch):
        pipeline.run(frames[first : first + batch])
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of images, all of them readable")
    parser.add_argument("--engine", default="mge.plan")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, help="processors to compute with (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.15, help="exit with 1 where the ratio is above this")
    return parser.parse_args()


def main() -> int:
    """Measure and print; 1 where the ratio is above the limit."""
    arguments = parse()
    images, problems = find_images([arguments.folder])
    if problems:
        print(f"error: {problems[0]}", file=sys.stderr)
        return 1
    options = ["--batch", str(arguments.batch)]
    options += ["--threads", str(arguments.threads)] if arguments.threads else []

    with MemoryWatch() as memory:
        command_seconds(arguments.engine, arguments.folder, options)
    peaks = [memory.part(i / 5, (i + 1) / 5) for i in range(5)]

    commands: list[float] = []
    chains: list[float] = []
    start = time.perf_counter()
    with Pipeline.open(arguments.engine, threads=arguments.threads) as pipeline:
        opening = time.perf_counter() - start
        manifest = pipeline.manifest
        frames = np.stack([to_frame(decode_image(image.source()), manifest.preprocess)[0] for image in images])
        chain_seconds(pipeline, frames[: 2 * arguments.batch], arguments.batch)  # warm up

        def command() -> None:
            commands.append(command_seconds(arguments.engine, arguments.folder, options))

        def chain() -> None:
            chains.append(chain_seconds(pipeline, frames, arguments.batch))

        for number in range(arguments.rounds):
            for step in (command, chain) if number % 2 == 0 else (chain, command):
                step()

    wall, computing = statistics.median(commands), statistics.median(chains)
    ratio = wall / computing
    size = manifest.preprocess.size
    print(f"model    {dict(manifest.model)}, {len(manifest.views)} experts at {size} px, {pipeline.choice}")
    print(f"images   {len(images)}, batch {arguments.batch}, {len(os.sched_getaffinity(0))} processors")
    for name, seconds in (("mge-run", commands), ("chain alone", chains)):
        middle = statistics.median(seconds)
        each = ", ".join(f"{value:.2f}" for value in seconds)
        print(f"{name:12} {middle:8.2f} s  {middle / len(images) * 1e3:7.1f} ms an image  (rounds: {each})")
    print(f"ratio    {ratio:.3f} (limit {arguments.limit}); opening the bundle took {opening:.2f} s of it")
    print(f"memory   {', '.join(f'{peak:.0f}' for peak in peaks)} MB, largest in each fifth of one mge-run")
    return int(ratio > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
