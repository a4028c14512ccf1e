"""What `examples/ray_bulk.py` loses and costs: workers on this machine against one process, and one worker killed.

    RAY_worker_niceness=0 python -m benchmarks.bulk --engine mge.plan groceries/test

The photographs are repeated under names of their own; every hundredth is a JPEG cut short. One process predicts them
with all processors, then workers of Ray do, then once more, and a worker is killed (SIGKILL) when its first rows are
there. Exit code 1 where a row is missing, doubled or another than that of the one process. Ray's workers have a low
priority (15) unless `RAY_worker_niceness` says otherwise, which beside other work is not comparable.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from examples import ray_bulk
from mge_runtime.cli.common import reports_errors
from mge_runtime.machine import cpu_count
from mge_runtime.sources import find_images

BAD_EVERY = 100
COLUMNS = ["path", "class_name", "error"]


def write_images(photographs: Iterable[Path], count: int, folder: Path) -> Path:
    """Write a table of images and links to them beside it; its path."""
    names = [f"{number}.jpg" for number in range(count)]
    for number, (name, source) in enumerate(zip(names, cycle(photographs), strict=False)):
        if number % BAD_EVERY:
            (folder / name).symlink_to(source.resolve())
        else:
            data = source.read_bytes()
            (folder / name).write_bytes(data[: len(data) // 2])
    pq.write_table(pa.table({"path": names}), folder / "images.parquet")
    return folder / "images.parquet"


def actors_of(process: int) -> dict[int, int]:
    """The processes of Ray that predict, among those that a process has started; processor seconds of each."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,cputimes,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in lines.splitlines()[1:]]
    family = {str(process)}
    for pid, parent, _, _ in sorted(rows, key=lambda row: int(row[0])):
        if parent in family:
            family.add(pid)
    return {int(pid): int(time) for pid, _, time, name in rows if pid in family and name.startswith("ray::MapWorker")}


def run_workers(words: list[str], *, kill: bool) -> tuple[float, float, int]:
    """Run the example.

    Returns:
        Seconds until its first rows are written; images a second from there on; processor seconds of all workers.
    """
    command = [sys.executable, "-m", "examples.ray_bulk", *words]
    start, written, cpu = time.perf_counter(), list[tuple[float, int]](), dict[int, int]()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        log = list[str]()
        for line in process.stderr:
            log.append(line)
            if not line.endswith(" images\n"):
                continue
            written.append((time.perf_counter() - start, int(line.split()[0])))
            cpu.update(found := actors_of(process.pid))
            if len(written) == 1 and kill:
                os.kill(min(found), signal.SIGKILL)
    if process.returncode or len(written) < 2:
        raise SystemExit(f"error: the example ended with {process.returncode}: {''.join(log)}")
    first, last = written[0][0], written[-1][0]
    return first, sum(rows for _, rows in written[1:]) / (last - first), sum(cpu.values())


@click.command(help=__doc__)
@click.argument("photographs", nargs=-1, required=True)
@click.option("--engine", required=True, type=click.Path(path_type=Path))
@click.option("--images", type=click.IntRange(min=2), default=5000, show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=100, show_default=True)
@reports_errors
def main(photographs: tuple[str, ...], engine: Path, images: int, workers: int, rows: int) -> None:
    """Measure, check and print."""
    with TemporaryDirectory(prefix="mge-bulk-") as temporary:
        folder = Path(temporary)
        found = [image.path for image in find_images(photographs).whole()]
        table = write_images(islice(found, images), images, folder)
        predictor = ray_bulk.Predictor(str(engine), str(folder), threads=cpu_count())
        start, begun = time.perf_counter(), time.process_time()
        expected = predictor(pq.read_table(table)).select(COLUMNS).sort_by("path")
        rate, cpu = images / (time.perf_counter() - start), time.process_time() - begun
        click.echo(f"one process: {rate:.1f} images a second, {cpu / images * 1e3:.0f} ms of a processor each")
        del predictor
        for kill in (False, True):
            out = folder / f"out-{kill}"
            words = ["--engine", str(engine.resolve()), "--workers", str(workers), "--rows", str(rows)]
            first, rate, cpu = run_workers([*words, str(table), str(out)], kill=kill)
            what = f"{workers} workers" + kill * ", one killed"
            click.echo(
                f"{what}: {rate:.1f} images a second after the first rows, which took {first:.0f} s; "
                f"{cpu / images * 1e3:.0f} ms of a processor each, starting included"
            )
            got = ds.dataset(out).to_table(COLUMNS).sort_by("path")
            if not got.equals(expected):
                raise SystemExit(f"error: {what}: {len(got)} rows, not the {len(expected)} of one process")
        click.echo(f"{images} rows each, {expected['error'].length() - expected['error'].null_count} with an error")


if __name__ == "__main__":
    main()
