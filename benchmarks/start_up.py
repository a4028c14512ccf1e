"""From process start to the first outputs: a bundle against plain ONNX Runtime on the same graphs from files.

    python -m benchmarks.start_up mge.plan [--rounds 9] [--threads 2]

Every start is a fresh process that runs one frame, the two ways in turn; the file cache is warm for both. The plain
script imports nothing but NumPy and ONNX Runtime, checks nothing, and wires the graphs by the names of their tensors.
Checking the weights runs beside ONNX Runtime on another processor, so the figures want a machine with two idle ones.
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

from benchmarks.rounds import ratio
from mge_runtime.bundle import Bundle
from mge_runtime.cli.common import reports_errors
from mge_runtime.extract import extract_bundle
from mge_runtime.machine import cpu_count

TIME_LIMIT = 1.15  # times plain ONNX Runtime's own
MEMORY_FACTOR, MEMORY_EXTRA = 2, 300  # times the weights, plus MB

_REPORT = """
import json, time
seconds = time.time() - float(sys.argv[1])
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1000
print(json.dumps([seconds, peak]))
"""
_BUNDLE = """
import sys
from mge_runtime import Pipeline
size, threads, path = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
pipeline = Pipeline.open(path, device="cpu", threads=threads)
import numpy
pipeline.run(numpy.zeros((1, size, size, 3), numpy.uint8))
"""
_PLAIN = """
import sys
import numpy, onnxruntime
size, threads, paths = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
sessions = []
for path in paths:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
tensors = {"frame": numpy.zeros((1, size, size, 3), numpy.uint8)}
for session in sessions:
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {tensor.name: tensors[tensor.name] for tensor in session.get_inputs()})
    tensors.update(zip(names, values))
"""


def start(program: str, *arguments: str) -> tuple[float, float]:
    """Run one process: seconds to its first outputs, and its peak memory in MB."""
    command = [sys.executable, "-c", program + _REPORT, repr(time.time()), *arguments]
    environment = {"ORT_DISABLE_TELEMETRY": "1", **os.environ}  # which the runtime sees to by itself
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


@click.command(help=__doc__)
@click.argument("engine", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--rounds", default=9, show_default=True)
@click.option("--threads", default=cpu_count(), show_default="all processors", help="Of each session.")
@click.option("--limit", default=TIME_LIMIT, show_default=True, help="Most that it may take, x plain ONNX Runtime.")
@reports_errors
def main(engine: Path, rounds: int, threads: int, limit: float) -> None:
    """Measure and judge."""
    with TemporaryDirectory() as folder:
        with Bundle.open(engine) as bundle:
            extract_bundle(bundle, folder)
            manifest = bundle.manifest
            names = [graph.name for graph in manifest.graphs]
            weights = sum(size for name, size in bundle.sizes.items() if name.endswith(".weights")) / 1e6
        common = [str(manifest.preprocess.size), str(threads)]
        files = [str(Path(folder, "onnx", f"{name}.onnx")) for name in names]
        ways = {"bundle": (_BUNDLE, *common, str(engine)), "plain": (_PLAIN, *common, *files)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name in list(ways) if number % 2 else reversed(ways):
                found = start(*ways[name])
                if number:  # the first round brings the files into the cache
                    taken[name].append(found)
    seconds = {name: [one for one, _ in found] for name, found in taken.items()}
    peaks = {name: max(peak for _, peak in found) for name, found in taken.items()}
    times, memory_limit = ratio(seconds["bundle"], seconds["plain"]), MEMORY_FACTOR * weights + MEMORY_EXTRA
    click.echo(f"weights {weights:.0f} MB, {threads} threads")
    for name in ways:
        click.echo(f"{name:<7} {median(seconds[name]):.3f} s   peak {peaks[name]:.0f} MB")
    click.echo(f"time    {times} x plain ONNX Runtime (limit {limit})")
    click.echo(f"memory  {peaks['bundle']:.0f} MB (limit for FP32 weights {memory_limit:.0f} MB)")
    sys.exit(int(times.median > limit or peaks["bundle"] > memory_limit))


if __name__ == "__main__":
    main()
