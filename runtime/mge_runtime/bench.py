"""Timing a bundle on this device: from image file to prediction, and from process start to the first prediction.

Nothing is compared here: baselines, other bundles and bare backbones are the business of `benchmarks/`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from mge_runtime.bench_report import BatchTimes, BenchReport
from mge_runtime.bench_subject import Images, Subject
from mge_runtime.errors import BackendError, MGEError, one_line

if TYPE_CHECKING:
    from mge_runtime.pipeline import Pipeline


NO_TIME = "no time was left; name more --seconds"  # why something was not measured
START_UP = "start-up"
_CHAIN, _FILE = "chain", "image file to prediction"

_BATCH_SHARE = 0.8  # of the time, for all batch sizes; the rest is for fresh processes
_WARM_UP = 3  # runs of a batch size that do not count: allocators find their size, a GPU captures its graphs
_MOST_RUNS, _MOST_STARTS = 1000, 7

# A fresh process: it predicts one image file ("-": on its standard input), and says how long that took since it was
# started and, on Linux, how many kB of memory it took at most.
_FRESH = """\
import json, os, sys, time
from mge_runtime import Pipeline
begin, engine, device, backend, options, image = sys.argv[1:]
with Pipeline.open(engine, device, backend, **json.loads(options)) as pipeline:
    pipeline.predict(sys.stdin.buffer.read() if image == "-" else image)
    seconds, status = time.time() - float(begin), "/proc/self/status"
    lines = open(status).readlines() if os.path.exists(status) else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    print(json.dumps([seconds, *peaks]))
"""


def run_bench(
    subject: Subject,
    images: Images,
    batches: Sequence[int],
    seconds: float,
    *,
    say: Callable[[str], None] = lambda _line: None,
    interrupt: Callable[[], None] = lambda: None,
) -> BenchReport:
    """Measure a bundle.

    The run ends with the measurement that is running when the time is over; what there was no time for is listed. A
    `KeyboardInterrupt` ends it too, and the report is then of what was measured before.

    Args:
        subject: what to measure.
        images: what to measure with.
        batches: sizes.
        seconds: for all of it.
        say: is told what is being done.
        interrupt: raises an interrupt that got lost.

    Raises:
        BackendError: a batch is larger than the engines take, or the first one fails.
    """
    end = time.perf_counter() + seconds
    with subject.open() as pipeline:
        most, largest = pipeline.max_batch, max(batches)
        if most is not None and largest > most:
            raise BackendError(
                f"asked to measure batches of {largest}; the engines were built for at most {most}: "
                f"name smaller ones, or build for more with `mge-build --batch 1,1,{largest}`"
            )
        report = BenchReport(subject, images.source)
        with suppress(KeyboardInterrupt):
            now = time.perf_counter()
            batches_end = now + _BATCH_SHARE * (end - now)
            for number, batch in enumerate(batches):
                report.interrupted = f"batch {batch}"
                interrupt()
                now = time.perf_counter()
                share = max(batches_end - now, 0.0) / (len(batches) - number)
                say(f"batch {batch}: {share:.1f} s")
                _time_batch(pipeline, images, batch, now + share, report)
            report.memory = pipeline.report()
            report.interrupted = START_UP
    if report.interrupted == START_UP:
        with suppress(KeyboardInterrupt):
            interrupt()
            say(f"{START_UP}: fresh processes")
            _time_start_up(subject, images, end, report)
            report.interrupted = None
    return report


def _time_batch(pipeline: Pipeline, images: Images, batch: int, end: float, report: BenchReport) -> None:
    """Run the chain on frames, and image files to predictions, in turn until the time is over.

    Raises:
        MGEError: it failed, and no other batch size was measured before.
    """
    times = BatchTimes(batch)
    start = time.perf_counter()
    try:
        for number in range(_WARM_UP + _MOST_RUNS):
            if start >= end:
                break
            sources, frames = images.batch(number, batch)
            start = time.perf_counter()
            steps = pipeline.run_timed(frames).times_ms
            middle = time.perf_counter()
            predictions = pipeline.predict_batch(sources)
            done = time.perf_counter()
            if number >= _WARM_UP:
                run = {_CHAIN: (middle - start) * 1e3} | {f"{_CHAIN}/{name}": ms for name, ms in steps.items()}
                run[_FILE] = (done - middle) * 1e3
                for name in ("decode", "preprocess"):
                    run[f"{_FILE}/{name}"] = sum(prediction.timings_ms[name] for prediction in predictions)
                times.runs_ms.append(run)
            start = done
    except MGEError as error:
        if not report.batches and not times.runs_ms:
            raise
        report.not_run[f"batch {batch}"] = one_line(error)
    finally:
        if times.runs_ms:
            report.batches.append(times)
    if not times.runs_ms:
        report.not_run.setdefault(f"batch {batch}", NO_TIME)


def _time_start_up(subject: Subject, images: Images, end: float, report: BenchReport) -> None:
    """Start fresh processes, one after the other; the file cache is warm."""
    file = images.files[0]
    given, image = (file, "-") if isinstance(file, bytes) else (b"", str(file))
    arguments = [str(subject.path), subject.device, subject.backend, json.dumps(subject.options), image]
    while len(report.start_up_s) < _MOST_STARTS and time.perf_counter() < end:
        command = [sys.executable, "-c", _FRESH, repr(time.time()), *arguments]
        done = subprocess.run(command, input=given, capture_output=True, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            why = said[-1][:300] if said else f"exit code {done.returncode}"
            report.not_run[START_UP] = one_line(f"a fresh process failed: {why}")
            return
        seconds, *peaks = json.loads(done.stdout)
        report.start_up_s.append(seconds)
        report.peak_bytes += [1024 * peak for peak in peaks]
    if not report.start_up_s:
        report.not_run[START_UP] = NO_TIME
