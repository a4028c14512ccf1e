"""Fresh processes, from their start to the first outputs, and one run after that: a bundle against plain ONNX Runtime.

    python -m benchmarks.start_up mge.plan [--rounds 9] [--threads 2]
    python -m benchmarks.start_up mge.plan --other old.plan --runtime ../old/runtime --runs 30    # and another checkout

Every start is a process of its own that runs one frame, and as many more as --runs says; the ways take turns, and the
file cache is warm for all. The plain script imports nothing but NumPy and ONNX Runtime, checks nothing, and wires the
graphs by the names of their tensors. Checking the weights runs beside ONNX Runtime on another processor, so the figures
want a machine with two idle ones. With `--other` a second bundle runs too, on the runtime of another checkout
(`git worktree add ../old TAG`): old against new.

Exit code 1 where a limit is missed: time at most 1.15 x plain ONNX Runtime's, peak memory at most 2 x the weights +
300 MB (of an FP32 bundle). The limit is for a model of ResNet-50's size: what the runtime imports costs the same
however small a model is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click

import mge_runtime
from benchmarks.rounds import ratio
from mge_runtime.bundle import Bundle
from mge_runtime.cli.common import reports_errors
from mge_runtime.errors import BackendError
from mge_runtime.machine import cpu_count

TIME_LIMIT = 1.15  # times plain ONNX Runtime's own
MEMORY_FACTOR, MEMORY_EXTRA = 2, 300  # times the weights, plus MB
RUNTIME = Path(mge_runtime.__file__).parents[1]

_BUNDLE = """
import sys
from mge_runtime import Pipeline
size, threads, path = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
pipeline = Pipeline.open(path, device="cpu", threads=threads)
import numpy
frame = numpy.zeros((1, size, size, 3), numpy.uint8)
run = lambda: pipeline.run(frame)
"""
_PLAIN = """
import sys
import numpy, onnxruntime
size, threads, paths = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
sessions = []
for path in paths:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads = threads
    sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
frame = numpy.zeros((1, size, size, 3), numpy.uint8)
def run():
    tensors = {"frame": frame}
    for session in sessions:
        names = [output.name for output in session.get_outputs()]
        values = session.run(names, {tensor.name: tensors[tensor.name] for tensor in session.get_inputs()})
        tensors.update(zip(names, values))
"""
_REPORT = """
import json, time
run()
seconds = time.time() - float(sys.argv[1])
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1000
times = []
for _ in range(int(sys.argv[2])):
    begin = time.perf_counter()
    run()
    times.append(1000 * (time.perf_counter() - begin))
print(json.dumps([seconds, min(times), peak]))
"""


def start(program: str, runs: int, runtime: Path, *arguments: str) -> tuple[float, float, float]:
    """Run one process: seconds to its first outputs, the least milliseconds of a later run, and peak memory in MB."""
    command = [sys.executable, "-c", program + _REPORT, repr(time.time()), str(runs), *arguments]
    # The runtime sees to telemetry by itself.
    environment = {"ORT_DISABLE_TELEMETRY": "1", **os.environ, "PYTHONPATH": str(runtime)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise BackendError(f"a fresh process failed: {done.stderr.strip().splitlines()[-1]}")
    seconds, run, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, run, peak


@click.command(help=__doc__)
@click.argument("engine", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--other", type=click.Path(path_type=Path, dir_okay=False), help="Another bundle of the same size.")
@click.option("--runtime", type=click.Path(path_type=Path), default=RUNTIME, help="That runs it.  [default: this one]")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Of each process after its first.")
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.option("--threads", default=cpu_count(), show_default="all processors", help="Of each session.")
@click.option("--limit", default=TIME_LIMIT, show_default=True, help="Most that it may take, x plain ONNX Runtime.")
@reports_errors
def main(engine: Path, other: Path | None, runtime: Path, runs: int, rounds: int, threads: int, limit: float) -> None:
    """Measure and judge."""
    with TemporaryDirectory() as folder:
        with Bundle.open(engine) as bundle:
            bundle.extract(folder)
            manifest = bundle.manifest
            names = [graph.name for graph in manifest.graphs]
            weights = sum(size for name, size in bundle.sizes.items() if name.endswith(".weights")) / 1e6
        common = [str(manifest.preprocess.size), str(threads)]
        files = [str(Path(folder, "onnx", f"{name}.onnx")) for name in names]
        ways = {
            "bundle": (_BUNDLE, runs, RUNTIME, *common, str(engine)),
            "plain": (_PLAIN, runs, RUNTIME, *common, *files),
        }
        if other is not None:
            ways["other"] = (_BUNDLE, runs, runtime, *common, str(other))
        taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name in list(ways) if number % 2 else reversed(ways):
                found = start(*ways[name])
                if number:  # the first round brings the files into the cache
                    taken[name].append(found)
    columns = {name: list(zip(*found, strict=True)) for name, found in taken.items()}
    click.echo(f"weights {weights:.0f} MB, {threads} threads")
    for name, (seconds, times, peaks) in columns.items():
        click.echo(f"{name:<7} {median(seconds):.3f} s   a run {median(times):.2f} ms   peak {max(peaks):.0f} MB")
    for name in list(ways)[1:]:
        started, ran = (ratio(columns["bundle"][part], columns[name][part]) for part in range(2))
        click.echo(f"bundle / {name}: start {started}, a run {ran}")
    begun, memory = ratio(columns["bundle"][0], columns["plain"][0]).median, max(columns["bundle"][2])
    memory_limit = MEMORY_FACTOR * weights + MEMORY_EXTRA
    click.echo(f"limits: start {limit:g} x plain, memory of FP32 weights {memory_limit:.0f} MB")
    sys.exit(int(begun > limit or memory > memory_limit))


if __name__ == "__main__":
    main()
