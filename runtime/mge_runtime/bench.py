"""The bench: what a bundle takes on this device, from image file to prediction and from process start to first answer.

Nothing is compared here: baselines, other bundles and bare backbones are the business of `benchmarks/`.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.bench_report import BatchTimes, BenchReport
from mge_runtime.bundle import Bundle
from mge_runtime.decode import MAX_PIXELS, decode_picture
from mge_runtime.errors import BackendError, InputError, MGEError, one_line
from mge_runtime.manifest import Preprocess
from mge_runtime.pipeline import Pipeline
from mge_runtime.preprocess import to_frame

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.backends import Choice
    from mge_runtime.decode import ImageSource
    from mge_runtime.sources import NamedImage

__all__ = ["BenchImages", "Request", "run_bench"]

NO_TIME = "no time was left; name more --seconds"  # why something was not measured
START_UP = "start-up"
_CHAIN, _FILE = "chain", "image file to prediction"

_READ_SHARE = 0.1  # of the whole time, to read the named images; one is read in any case
_BATCH_SHARE = 0.8  # of what is left then, for all batch sizes; the rest is for fresh processes
_WARM_UP_SHARE = 0.1  # of a batch size's time
_MOST_WARM_UP, _MOST_RUNS, _MOST_STARTS = 20, 1000, 7
_MOST_IMAGES = 64  # their frames stay in memory, 600 kB each at 448 pixels
_SYNTHETIC, _HEIGHT, _WIDTH = 8, 960, 1280  # images, pixels

# A fresh process: it predicts one image file ("-": on its standard input), and says how long that took since it was
# started and, on Linux, how many kB of memory it took at most.
_FRESH = """\
import json, os, sys, time
from mge_runtime import Pipeline
begin, engine, device, backend, threads, mmap, max_pixels, image = sys.argv[1:]
options = {"mmap": mmap == "True", "max_pixels": int(max_pixels)}
with Pipeline.open(engine, device, backend, int(threads) or None, **options) as pipeline:
    pipeline.predict(sys.stdin.buffer.read() if image == "-" else image)
    seconds, status = time.time() - float(begin), "/proc/self/status"
    lines = open(status).readlines() if os.path.exists(status) else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    print(json.dumps([seconds, *peaks]))
"""


@dataclass(frozen=True)
class Request:
    """What to measure."""

    path: Path
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None  # None: all processors
    batches: tuple[int, ...] = (1,)
    seconds: float = 60.0  # of the whole run
    mmap: bool = True  # as for `Pipeline.open`
    max_pixels: int = MAX_PIXELS  # likewise

    def open(self) -> Pipeline:
        """Open what is measured."""
        return Pipeline.open(
            self.path, self.device, self.backend, self.threads, mmap=self.mmap, max_pixels=self.max_pixels
        )


def run_bench(
    request: Request,
    named: Sequence[NamedImage] = (),
    *,
    say: Callable[[str], None] = lambda _line: None,
    problem: Callable[[InputError], None] = lambda _error: None,
    interrupt: Callable[[], None] = lambda: None,
) -> BenchReport:
    """Measure a bundle.

    The run ends with the measurement that is running when the time is over; what there was no time for is listed. A
    `KeyboardInterrupt` ends it too, and the report is then of what was measured before.

    Args:
        request: what to measure.
        named: images to measure with; none: synthetic ones.
        say: is told what is being done.
        problem: is told of each named image that cannot be read; it is left out.
        interrupt: raises an interrupt that got lost.

    Raises:
        BundleError: the bundle is missing or damaged.
        InputError: no named image can be read.
        BackendError: nothing can run the bundle here, or not in the first batch size.
    """
    start = time.perf_counter()
    end, read_end = start + request.seconds, start + _READ_SHARE * request.seconds
    say(f"this takes {request.seconds:.0f} s at most; --seconds names another time")
    with request.open() as pipeline:
        most, largest = pipeline.max_batch, max(request.batches)
        if most is not None and largest > most:
            raise BackendError(
                f"asked to measure batches of {largest}; the engines were built for at most {most}: "
                f"name smaller ones, or build for more with `mge-build --batch 1,1,{largest}`"
            )
        preprocess = pipeline.manifest.preprocess
        if named:
            images = BenchImages.read(named, preprocess, request.max_pixels, read_end, problem)
        else:
            images = BenchImages.synthetic(preprocess)
        with Bundle.open(request.path) as bundle:
            report = BenchReport.of(bundle, pipeline, request.threads, images.source)
        with suppress(KeyboardInterrupt):
            now = time.perf_counter()
            batches_end = now + _BATCH_SHARE * (end - now)
            for number, batch in enumerate(request.batches):
                report.interrupted = f"batch {batch}"
                interrupt()
                now = time.perf_counter()
                seconds = max(batches_end - now, 0.0) / (len(request.batches) - number)
                say(f"batch {batch}: {seconds:.1f} s")
                _time_batch(pipeline, images, batch, now + seconds, report)
            report.memory = pipeline.report()
            report.interrupted = START_UP
    if report.interrupted == START_UP:
        with suppress(KeyboardInterrupt):
            interrupt()
            say(f"{START_UP}: fresh processes")
            _time_start_up(request, pipeline.choice, images, end, report)
            report.interrupted = None
    return report


def _time_batch(pipeline: Pipeline, images: BenchImages, batch: int, end: float, report: BenchReport) -> None:
    """Run the chain on frames, and image files to predictions, in turn until the time is over.

    Raises:
        MGEError: it failed, and no other batch size was measured before.
    """
    times = BatchTimes(batch)
    start = time.perf_counter()
    warm = start + _WARM_UP_SHARE * (end - start)
    try:
        for number in count():
            if start >= end or len(times.runs_ms) == _MOST_RUNS:
                break
            sources, frames = images.batch(number, batch)
            start = time.perf_counter()
            steps = pipeline.run_timed(frames).step_ms
            middle = time.perf_counter()
            predictions = pipeline.predict_batch(sources)
            done = time.perf_counter()
            if times.runs_ms or (number and (start >= warm or number >= _MOST_WARM_UP)):
                run = {_CHAIN: (middle - start) * 1e3} | {f"{_CHAIN}/{name}": ms for name, ms in steps.items()}
                run[_FILE] = (done - middle) * 1e3
                for name in ("decode", "preprocess"):
                    run[f"{_FILE}/{name}"] = sum(prediction.timings_ms[name] for prediction in predictions)
                times.runs_ms.append(run)
            else:
                times.warm_up += 1
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


def _time_start_up(request: Request, choice: Choice, images: BenchImages, end: float, report: BenchReport) -> None:
    """Start fresh processes, one after the other; the file cache is warm."""
    file = images.files[0]
    given, image = (file, "-") if isinstance(file, bytes) else (b"", str(file))
    arguments = [str(request.path), choice.device, choice.backend, str(request.threads or 0)]
    arguments += [str(request.mmap), str(request.max_pixels), image]
    try:
        while len(report.start_up_s) < _MOST_STARTS and time.perf_counter() < end:
            command = [sys.executable, "-c", _FRESH, repr(time.time()), *arguments]
            done = subprocess.run(command, input=given, capture_output=True, check=False)
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip().splitlines()
                why = said[-1][:300] if said else f"exit code {done.returncode}"
                raise BackendError(f"a fresh process did not answer: {why}")
            seconds, *peaks = json.loads(done.stdout)
            report.start_up_s.append(seconds)
            report.peak_bytes += [1024 * peak for peak in peaks]
    except MGEError as error:
        report.not_run[START_UP] = one_line(error)
    if not report.start_up_s:
        report.not_run.setdefault(START_UP, NO_TIME)


@dataclass(frozen=True)
class BenchImages:
    """Images as files and as frames."""

    files: tuple[ImageSource, ...]
    frames: NDArray[np.uint8]  # [N, S, S, 3], RGB, of the same images
    source: str  # for people

    @classmethod
    def read(
        cls,
        named: Sequence[NamedImage],
        spec: Preprocess,
        max_pixels: int,
        end: float,
        problem: Callable[[InputError], None],
    ) -> BenchImages:
        """The first 64 images that can be read, fewer where the time is over: at least one.

        Raises:
            InputError: none can be read.
        """
        files: list[ImageSource] = []
        frames: list[NDArray[np.uint8]] = []
        problems: list[InputError] = []
        for image in named:
            if frames and (time.perf_counter() >= end or len(frames) == _MOST_IMAGES):
                break
            try:
                source = image.source()
                frames.append(to_frame(decode_picture(source, max_pixels), spec)[0])
                files.append(source)
            except InputError as error:
                problems.append(error)
        if not frames:
            raise problems[0]
        for error in problems:
            problem(error)
        count = f"{len(files)}" if len(files) == len(named) else f"{len(files)} of {len(named)}"
        return cls(tuple(files), np.stack(frames), f"{count} named images")

    @classmethod
    def synthetic(cls, spec: Preprocess) -> BenchImages:
        """Soft color fields with some grain as JPEG files, the same at every call."""
        from PIL import Image

        rng = np.random.default_rng(2019)
        files: list[bytes] = []
        for _ in range(_SYNTHETIC):
            cells = Image.fromarray(rng.integers(0, 256, (*rng.integers(3, 9, 2), 3), np.uint8))
            field = np.asarray(cells.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC))
            pixels = np.clip(field + rng.normal(0, 6, (_HEIGHT, _WIDTH, 1)), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        frames = np.stack([to_frame(decode_picture(file), spec)[0] for file in files])
        source = f"{_SYNTHETIC} synthetic JPEG files of {_WIDTH} x {_HEIGHT} pixels; name images to measure with them"
        return cls(tuple(files), frames, source)

    def batch(self, number: int, size: int) -> tuple[list[ImageSource], NDArray[np.uint8]]:
        """The images of one run, in turn and again from the start."""
        places = [(number * size + place) % len(self.files) for place in range(size)]
        return [self.files[place] for place in places], self.frames[places]
