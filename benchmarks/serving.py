"""What `mge-serve` costs beyond the pipeline, over the loopback: requests a second and latency.

    python -m benchmarks.serving --engine mge.plan groceries/test

Clients are threads of this process, each with one connection, and ask without pause; every twentieth upload is a JPEG
cut short. In every round the bare pipeline predicts the same images from their files, one by one and in streams of
batches, while the server is idle. Then every number of clients asks once more while SIGHUP swaps the bundle in the
middle. Exit code 1 where a request is lost or has another status than it should.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import IO

import click
import numpy as np

from benchmarks.rounds import ratio
from mge_runtime import Pipeline
from mge_runtime.cli.common import reports_errors
from mge_runtime.sources import find_images

BAD_EVERY = 20
BATCH = 8  # the server's default


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str]  # of its standard error

    def cpu_seconds(self) -> float:
        """Processor time so far, of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_for(self, text: str, times: int) -> None:
        """Wait until so many lines begin with a text."""
        while sum(line.startswith(text) for line in self.lines) < times:
            if self.process.poll() is not None:
                raise SystemExit(f"error: mge-serve ended: {''.join(self.lines)}")
            time.sleep(0.01)


@dataclass(frozen=True)
class Load:
    """What clients saw."""

    seconds: float
    cpu_seconds: float  # of the server
    latencies: list[float]  # milliseconds, of good images
    wrong: int  # responses with another status than they should have, and requests without one

    def percentile(self, share: float) -> float:
        """Of the latencies, milliseconds."""
        return float(np.percentile(self.latencies, share))


@contextmanager
def serving(engine: Path, streams: int | None) -> Iterator[Server]:
    """Run the command, ready, as long as the block lasts."""
    words = [sys.executable, "-m", "mge_runtime.cli.serve", str(engine), "--port", "0", "--queue", "128"]
    words += ["--streams", str(streams)] if streams else []
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []

    def read(stream: IO[str]) -> None:
        lines.extend(iter(stream.readline, ""))

    assert process.stderr is not None
    threading.Thread(target=read, args=(process.stderr,), daemon=True).start()
    server = Server(process, 0, lines)
    try:
        server.wait_for("listening", 1)
        port = re.search(r":(\d+),", lines[0])
        assert port is not None
        server.wait_for("ready", 1)
        yield Server(process, int(port[1]), lines)
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise SystemExit(f"error: mge-serve ended with {process.returncode}: {''.join(lines)}")


def ask(server: Server, uploads: list[bytes], clients: int, *, swap: bool = False) -> Load:
    """Send each upload once, from so many clients."""
    cut = uploads[0][: len(uploads[0]) // 2]
    turns = count()
    latencies: list[float] = []
    right: list[int] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        while (turn := next(turns)) < len(uploads):
            if swap and turn == len(uploads) // 2:
                server.process.send_signal(signal.SIGHUP)
            bad = turn % BAD_EVERY == BAD_EVERY - 1
            start = time.perf_counter()
            connection.request("POST", "/predict", cut if bad else uploads[turn])
            response = connection.getresponse()
            response.read()
            if response.status == (422 if bad else 200):
                right.append(turn)
            if not bad:
                latencies.append((time.perf_counter() - start) * 1e3)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start, cpu = time.perf_counter(), server.cpu_seconds()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(time.perf_counter() - start, server.cpu_seconds() - cpu, latencies, len(uploads) - len(right))


def run_bare(pipeline: Pipeline, paths: list[Path]) -> tuple[float, float]:
    """Seconds that a pipeline takes for all images, and of processor time; in streams its batches are the server's."""
    start, cpu = time.perf_counter(), time.process_time()
    for _ in pipeline.predict_iter(paths, batch=BATCH if pipeline.streams > 1 else 1):
        pass
    return time.perf_counter() - start, time.process_time() - cpu


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--engine", type=click.Path(path_type=Path), default="mge.plan", show_default=True)
@click.option("--clients", "counts", type=int, multiple=True, default=(1, 8, 64), show_default=True)
@click.option("--images", "most", default=240, show_default=True, help="Requests of each run.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--streams", type=int, help="As for mge-serve.")
@reports_errors
def main(folder: Path, engine: Path, counts: tuple[int, ...], most: int, rounds: int, streams: int | None) -> None:
    """Measure, print and judge."""
    paths = [image.path for image in find_images([str(folder)]).whole()]
    paths = [paths[number % len(paths)] for number in range(most)]
    uploads = [path.read_bytes() for path in paths]
    loads: dict[int, list[Load]] = {clients: [] for clients in counts}
    bare: dict[str, list[tuple[float, float]]] = {"one by one": [], "streams": []}
    wrong = 0
    with (
        Pipeline.open(engine) as one,
        Pipeline.open(engine, streams="auto") as many,
        serving(engine, streams) as server,
    ):
        pipelines = {"one by one": one, "streams": many}
        for pipeline in pipelines.values():
            run_bare(pipeline, paths[:16])
        ask(server, uploads[:16], 8)
        for _ in range(rounds):
            for name, pipeline in pipelines.items():
                bare[name].append(run_bare(pipeline, paths))
            for clients in counts:
                loads[clients].append(ask(server, uploads, clients))
        for name, times in bare.items():
            seconds, cpu = (median(values) / most for values in zip(*times, strict=True))
            click.echo(f"pipeline, {name:10} {1 / seconds:7.1f} images/s, {cpu * 1e3:.0f} ms of processor time each")
        good = most - most // BAD_EVERY
        for number, clients in enumerate(counts, 1):
            found = loads[clients]
            swapped = ask(server, uploads, clients, swap=True)
            server.wait_for("ready", number + 1)
            wrong += swapped.wrong + sum(load.wrong for load in found)
            seconds = [load.seconds for load in found]
            cpu = median(load.cpu_seconds for load in found) / most
            p50, p99 = (median(load.percentile(share) for load in found) for share in (50, 99))
            click.echo(
                f"{clients:3} clients  {most / median(seconds):7.1f} requests/s, {cpu * 1e3:.0f} ms of processor "
                f"time each; p50 {p50:.0f} ms, p99 {p99:.0f} ms, with a swap {swapped.percentile(99):.0f} ms"
            )
            for name, times in bare.items():
                rate = ratio([good / most * taken for taken, _ in times], seconds)
                click.echo(f"    good images a second x pipeline, {name}: {rate}")
    total = most * len(counts) * (rounds + 1)
    click.echo(f"{wrong} of {total} requests lost or with a wrong status, {len(counts)} swaps")
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
