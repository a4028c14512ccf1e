"""What a fresh process takes from its start to the first answer: time and memory, beside plain ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mge_runtime.bench import child, plain
from mge_runtime.bench.deadline import Deadline
from mge_runtime.bench.noise import Noise, Watch
from mge_runtime.bench.rounds import shuffled
from mge_runtime.bench.stats import Ratio
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError
from mge_runtime.fields import JsonValue
from mge_runtime.files import temporary_folder
from mge_runtime.machine import cpu_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.backends import Choice

__all__ = ["BUNDLE", "PLAIN", "Fresh", "Start", "measure_fresh"]

BUNDLE, PLAIN = "from the bundle", "plain ONNX Runtime, same graphs"
_MOST_ROUNDS = 9
_SECONDS = 20.0  # where nothing bounds the run


@dataclass(frozen=True)
class Start:
    """One fresh process."""

    seconds: float  # from its start to its first answer
    peak: int | None  # most bytes resident in it; None: unknown
    device: int | None = None  # bytes in use on the GPU, by all processes
    report: dict[str, JsonValue] | None = None  # what the executor says of its memory


@dataclass(frozen=True)
class Fresh:
    """Rounds of fresh processes, one of each way, after some that brought the files into memory and do not count."""

    bundle: tuple[Start, ...]
    files: tuple[Start, ...]  # plain; empty where there is no reference
    noise: Noise
    no_reference: str | None = None  # why

    @property
    def ratio(self) -> Ratio | None:
        """The bundle's to the plain files', round by round; None without a reference."""
        if not self.files:
            return None
        above, below = ([start.seconds for start in starts] for starts in (self.bundle, self.files))
        return Ratio.of("from the bundle / plain ONNX Runtime", above, below)

    @property
    def ratio_of_medians(self) -> float | None:
        """The median of the bundle's starts to the plain files' median."""
        return _seconds(self.bundle) / _seconds(self.files) if self.files else None

    def summary(self) -> dict[str, Any]:
        """What is derived, by the names of the JSON report."""
        return {
            "start_seconds": _seconds(self.bundle),
            "start_ratio_of_medians": self.ratio_of_medians,
            "start_ratio": asdict(self.ratio) if self.ratio else None,
        }


def measure_fresh(
    path: Path,
    choice: Choice,
    threads: int | None,
    frame: NDArray[np.uint8],
    deadline: Deadline,
    say: Callable[[str], None],
    keep: Callable[[Fresh], None],
) -> None:
    """Start one process of each way in every round, in shuffled order.

    Args:
        path: the bundle.
        choice: what runs it.
        threads: as for `Pipeline.open`.
        frame: what is answered, uint8 [S, S, 3].
        deadline: looked at between two processes.
        say: is told how far it is.
        keep: is given the rounds, whatever ends them, if one of them was whole.

    Raises:
        BackendError: a process failed.
        TimeUp: the deadline has passed.
        OutputError: the temporary folder cannot be written.
    """
    with temporary_folder("bench") as folder:
        _measure(path, choice, threads, frame, deadline, say, keep, folder)


def _measure(
    path: Path,
    choice: Choice,
    threads: int | None,
    frame: NDArray[np.uint8],
    deadline: Deadline,
    say: Callable[[str], None],
    keep: Callable[[Fresh], None],
    folder: Path,
) -> None:
    raw = folder / "frame"
    frame.tofile(raw)
    mine = [sys.executable, "-m", child.__name__, str(path), str(raw), choice.device, choice.backend]
    mine.append("all" if threads is None else str(threads))
    engines = choice.backend != "onnxruntime"
    ways: dict[str, Callable[[], Start]] = {BUNDLE: partial(_start, mine)}
    if not engines:
        ways[PLAIN] = partial(_start, _plain(path, folder, raw, choice, threads or cpu_count()))
    for start in ways.values():
        deadline.check()
        start()
    starts: dict[str, list[Start]] = {way: [] for way in ways}
    begin, watch, seconds = time.perf_counter(), Watch(), deadline.seconds(_SECONDS)
    orders = shuffled(list(ways), apart=False)
    try:
        for number in range(_MOST_ROUNDS):
            for way in next(orders):
                deadline.check()
                starts[way].append(ways[way]())
            say(f"{number + 1} rounds")
            if (time.perf_counter() - begin) * (number + 2) / (number + 1) > seconds:
                break
    finally:
        if whole := min(map(len, starts.values())):
            bundle, files = (tuple(starts.get(way, ())[:whole]) for way in (BUNDLE, PLAIN))
            reference = bundle if engines else files
            noise = watch.stop(BUNDLE if engines else PLAIN, [start.seconds * 1e3 for start in reference])
            reason = f"{choice} runs engines, which plain files do not hold" if engines else None
            keep(Fresh(bundle, files, noise, reason))


def _seconds(starts: Sequence[Start]) -> float:
    return median(start.seconds for start in starts)


def _plain(path: Path, folder: Path, raw: Path, choice: Choice, threads: int) -> list[str]:
    with Bundle.open(path) as bundle:
        bundle.extract(folder)
        graphs = [graph.name for graph in bundle.manifest.graphs]
        size = bundle.manifest.preprocess.size
    provider = "CPUExecutionProvider" if choice.device == "cpu" else "CUDAExecutionProvider"
    script = [sys.executable, str(Path(plain.__file__).resolve())]
    return [*script, str(folder / "onnx"), str(raw), str(size), str(threads), provider, *graphs]


def _start(command: Sequence[str]) -> Start:
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            try:
                stdout: Any = process.stdout
                first = stdout.readline()
                seconds = time.perf_counter() - begin
                rest = stdout.read()
            except BaseException:  # a signal: it is not left behind
                process.kill()
                raise
        if process.returncode or first.strip() != "answered":
            errors.seek(0)
            why = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise BackendError(f"a fresh process did not answer: {' '.join(why.split())[:300]}")
    facts: dict[str, Any] = json.loads(rest)
    return Start(seconds, facts["peak"], facts.get("device"), facts.get("report"))
