"""How much `mge-run` costs beyond the chain: wall time over a folder against computing alone on decoded frames.

    python benchmarks/run_throughput.py --engine mge.plan ../shared/data/groceries/test

All run in this process, in turn (the order changes from round to round), and medians are compared. The command's time
holds everything: opening the bundle, decoding, preprocessing, computing, printing. "Chain alone" runs the same bundle
on frames that already lie in memory: one after the other with all processors, and in streams as the command does; the
limit is held against the faster of the two. The first pass of the command is not timed but watched: its memory over
time must stay flat, and every image must be answered.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import numpy as np

from mge_runtime import Pipeline
from mge_runtime.cli.run import main as mge_run
from mge_runtime.decode import decode_picture
from mge_runtime.machine import cpu_count
from mge_runtime.pool import map_ahead
from mge_runtime.preprocess import to_frame
from mge_runtime.sources import find_images

PAGE = os.sysconf("SC_PAGE_SIZE")
GROWTH = 1.05  # of memory after the first fifth that still counts as flat


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


def command_seconds(engine: str, folder: str, options: list[str], expected: int) -> float:
    """Wall time of one `mge-run` over the folder; its output goes to a file and must hold a line for every image."""
    with tempfile.TemporaryFile("w+") as lines:
        with redirect_stdout(lines):
            start = time.perf_counter()
            mge_run(["--engine", engine, "--json", *options, folder], standalone_mode=False)
            seconds = time.perf_counter() - start
        lines.seek(0)
        if (answered := sum(1 for _ in lines)) != expected:
            raise SystemExit(f"error: mge-run answered {answered} of {expected} images")
    return seconds


def chain_seconds(pipeline: Pipeline, frames: np.ndarray, batch: int) -> float:
    """Computing time of the chain over all frames, in as many streams as the pipeline has."""
    start = time.perf_counter()
    groups = [frames[first : first + batch] for first in range(0, len(frames), batch)]
    if pipeline.streams == 1:
        for group in groups:
            pipeline.run(group)
    else:
        for _ in map_ahead(pipeline.run, groups, threads=pipeline.streams, ahead=2 * pipeline.streams):
            pass
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of images, all of them readable")
    parser.add_argument("--engine", default="mge.plan")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, help="processors to compute with (default: all)")
    parser.add_argument("--streams", type=int, help="batches computed side by side (default: as mge-run)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.15, help="exit with 1 where the ratio is above this")
    return parser.parse_args()


def main() -> int:
    """Measure and print; 1 where the ratio is above the limit or memory grows."""
    arguments = parse()
    images = find_images([arguments.folder]).whole()
    options = ["--batch", str(arguments.batch)]
    options += ["--threads", str(arguments.threads)] if arguments.threads else []
    options += ["--streams", str(arguments.streams)] if arguments.streams else []

    def command() -> float:
        return command_seconds(arguments.engine, arguments.folder, options, len(images))

    with MemoryWatch() as memory:
        command()
    peaks = [memory.part(i / 5, (i + 1) / 5) for i in range(5)]

    with ExitStack() as stack:
        start = time.perf_counter()
        streams = arguments.streams or "auto"
        many = stack.enter_context(Pipeline.open(arguments.engine, threads=arguments.threads, streams=streams))
        opening = time.perf_counter() - start
        one = stack.enter_context(Pipeline.open(arguments.engine, threads=arguments.threads))
        manifest = one.manifest
        frames = np.stack([to_frame(decode_picture(image.source()), manifest.preprocess)[0] for image in images])
        few = frames[: 4 * arguments.batch]
        steps: dict[str, Callable[[], float]] = {
            "mge-run": command,
            "chain, one by one": lambda: chain_seconds(one, frames, arguments.batch),
            f"chain, {many.streams} streams": lambda: chain_seconds(many, frames, arguments.batch),
        }
        chain_seconds(one, few, arguments.batch)  # warm up
        chain_seconds(many, few, arguments.batch)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(arguments.rounds):
            for name in list(steps) if number % 2 == 0 else reversed(steps):
                seconds[name].append(steps[name]())

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    wall = medians["mge-run"]
    ratio = wall / min(value for name, value in medians.items() if name != "mge-run")
    flat = max(peaks[1:]) <= GROWTH * peaks[1]  # the first fifth holds the opening
    size = manifest.preprocess.size
    print(f"model    {dict(manifest.model)}, {len(manifest.views)} experts at {size} px, {one.choice}")
    print(f"images   {len(images)}, batch {arguments.batch}, {cpu_count()} processors")
    for name, values in seconds.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        middle = medians[name]
        print(f"{name:18} {middle:7.2f} s  {middle / len(images) * 1e3:7.1f} ms an image  (rounds: {each})")
    print(f"ratio    {ratio:.3f} (limit {arguments.limit}); opening the bundle took {opening:.2f} s of it")
    print(f"memory   {', '.join(f'{peak:.0f}' for peak in peaks)} MB, largest in each fifth of one mge-run")
    if not flat:
        print(f"memory grew by more than {GROWTH - 1:.0%} after the first fifth")
    return int(ratio > arguments.limit or not flat)


if __name__ == "__main__":
    sys.exit(main())
