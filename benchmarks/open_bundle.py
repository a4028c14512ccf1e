"""How long a bundle takes to open and how much memory at most, against ONNX Runtime opening the same graphs from files.

    python benchmarks/open_bundle.py mge.plan [--repeats 5] [--threads 2] [--json]

Every opening is a fresh process, the two ways in turn; the file cache is warm for both, as the graphs are extracted
first. Hashing runs beside ONNX Runtime on another processor, so the figures want a machine with two idle ones: where
others keep it busy, wall time tends to the sum of processor times. Reported are the medians; exit code 1 where a limit
is not met: time at most 1.5 x ONNX Runtime's own, peak memory at most 2 x the weights + 300 MB (of an FP32 bundle).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from mge_runtime.bundle import Bundle
from mge_runtime.cli.common import reports_errors

TIME_LIMIT = 1.5  # times ONNX Runtime's own
MEMORY_FACTOR, MEMORY_EXTRA = 2, 300  # times the weights, plus MB

# Both children import everything first, then measure the opening alone. Peak memory is that of the whole process.
_REPORT = """
import json, time
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1000
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak}))
"""
_BUNDLE = """
import sys, time
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.pipeline import Pipeline
load_onnxruntime()
threads = int(sys.argv[2])
start, cpu_start = time.perf_counter(), time.process_time()
pipeline = Pipeline.open(sys.argv[1], device="cpu", threads=threads)
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
"""
_FILES = """
import sys, time
import mge_runtime.pipeline
from mge_runtime.backends.onnxruntime import load_onnxruntime
onnxruntime = load_onnxruntime()
threads = int(sys.argv[2])
start, cpu_start = time.perf_counter(), time.process_time()
sessions = []
for path in sys.argv[3:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
"""


def measure(program: str, *arguments: str) -> dict[str, float]:
    """Run one child and read its report."""
    command = [sys.executable, "-c", program + _REPORT, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@click.command()
@click.argument("bundle")
@click.option("--repeats", default=5, show_default=True, help="Openings of each kind.")
@click.option("--threads", default=2, show_default=True, help="Threads of each session.")
@click.option("--json", "as_json", is_flag=True)
@click.option(
    "--limit", default=TIME_LIMIT, show_default=True, help="Most that opening may take, x ONNX Runtime's own."
)
@reports_errors
def main(bundle: str, repeats: int, threads: int, as_json: bool, limit: float) -> None:
    """Measure the opening of BUNDLE."""
    with tempfile.TemporaryDirectory() as folder:
        with Bundle.open(bundle) as opened:
            opened.extract(folder)
            graphs = [str(Path(folder, "onnx", f"{graph.name}.onnx")) for graph in opened.manifest.graphs]
            weights = sum(size for name, size in opened.sizes.items() if name.endswith(".weights")) / 1e6
        rows: dict[str, list[dict[str, float]]] = {"bundle": [], "files": []}
        for _ in range(repeats):
            rows["bundle"].append(measure(_BUNDLE, bundle, str(threads)))
            rows["files"].append(measure(_FILES, bundle, str(threads), *graphs))
    medians = {
        way: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds", "peak_mb")}
        for way, runs in rows.items()
    }
    ratio = medians["bundle"]["seconds"] / medians["files"]["seconds"]
    memory, memory_limit = medians["bundle"]["peak_mb"], MEMORY_FACTOR * weights + MEMORY_EXTRA
    met = ratio <= limit and memory <= memory_limit
    if as_json:
        limits = {"time_limit": limit, "memory_limit_mb": memory_limit, "met": met}
        click.echo(json.dumps({"weights_mb": weights, **medians, "time_ratio": ratio, **limits}))
        sys.exit(int(not met))
    click.echo(f"weights {weights:.0f} MB, {threads} threads, medians of {repeats} openings, interleaved")
    for way, values in medians.items():
        times = f"{values['seconds']:.3f} s   processor {values['cpu_seconds']:.3f} s"
        click.echo(f"{way:<7} {times}   peak {values['peak_mb']:.0f} MB")
    click.echo(f"time    {ratio:.2f} x ONNX Runtime's own (limit {limit})")
    click.echo(f"memory  {memory:.0f} MB (limit for FP32 weights {memory_limit:.0f} MB)")
    sys.exit(int(not met))


if __name__ == "__main__":
    main()
