"""What a fresh process takes from its start to the first answer: time and memory, beside plain ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mge_runtime.bench import child, plain
from mge_runtime.bench.stats import Ratio
from mge_runtime.bundle import Bundle
from mge_runtime.cpus import cpu_count
from mge_runtime.errors import BackendError
from mge_runtime.fields import JsonValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.backends import Choice

__all__ = ["Fresh", "Start", "measure_fresh"]

_LEAST_PAIRS, _MOST_PAIRS = 3, 9


@dataclass(frozen=True)
class Start:
    """One fresh process."""

    seconds: float  # from its start to its first answer
    peak: int | None  # most bytes resident in it; None: unknown
    device: int | None = None  # bytes in use on the GPU, by all processes
    report: dict[str, JsonValue] | None = None  # what the executor says of its memory


@dataclass(frozen=True)
class Fresh:
    """Pairs of fresh processes, after a first that brought the files into memory and does not count."""

    bundle: tuple[Start, ...]
    files: tuple[Start, ...]  # empty where there is no reference
    no_reference: str | None = None  # why

    @property
    def seconds(self) -> float:
        """The bundle's median."""
        return median(start.seconds for start in self.bundle)

    @property
    def ratio(self) -> Ratio | None:
        """The bundle's to the plain files', pair by pair; None without a reference."""
        if not self.files:
            return None
        pairs = [start.seconds for start in self.bundle], [start.seconds for start in self.files]
        return Ratio.of("start to first answer / plain ONNX Runtime", *pairs)

    @property
    def ratio_of_medians(self) -> float | None:
        """The bundle's median to the plain files' median."""
        return self.seconds / median(start.seconds for start in self.files) if self.files else None


def measure_fresh(
    path: Path,
    choice: Choice,
    threads: int | None,
    frame: NDArray[np.uint8],
    seconds: float,
    say: Callable[[str], None] = lambda _line: None,
) -> Fresh:
    """Start processes in pairs, in alternating order.

    Args:
        path: the bundle.
        choice: what runs it.
        threads: as for `Pipeline.open`.
        frame: what is answered, uint8 [S, S, 3].
        seconds: to spend, at least three pairs.
        say: is told how far it is.

    Raises:
        BackendError: a process failed.
        OutputError: the stages cannot be extracted.
    """
    with tempfile.TemporaryDirectory(prefix="mge-bench-") as folder:
        raw = Path(folder, "frame")
        frame.tofile(raw)
        mine = [sys.executable, "-m", child.__name__, str(path), str(raw), choice.device, choice.backend]
        ways = {"bundle": [*mine, "all" if threads is None else str(threads)]}
        refusal = None if choice.backend == "onnxruntime" else f"{choice} runs engines, which plain files do not hold"
        if refusal is None:
            ways["files"] = _plain(path, Path(folder), raw, choice, threads or cpu_count())
        for command in ways.values():
            _start(command)
        starts: dict[str, list[Start]] = {way: [] for way in ways}
        begin = time.perf_counter()
        for number in range(_MOST_PAIRS):
            for way in list(ways) if number % 2 == 0 else reversed(ways):
                starts[way].append(_start(ways[way]))
            say(f"{number + 1} pairs")
            passed = time.perf_counter() - begin
            if number + 1 >= _LEAST_PAIRS and passed * (number + 2) / (number + 1) > seconds:
                break
    return Fresh(tuple(starts["bundle"]), tuple(starts.get("files", ())), refusal)


def _plain(path: Path, folder: Path, raw: Path, choice: Choice, threads: int) -> list[str]:
    with Bundle.open(path) as bundle:
        bundle.extract(folder)
        stages = [name for segment in bundle.manifest.segments for name in segment.stages]
        size = bundle.manifest.preprocess.size
    provider = "CPUExecutionProvider" if choice.device == "cpu" else "CUDAExecutionProvider"
    script = [sys.executable, str(Path(plain.__file__).resolve())]
    return [*script, str(folder / "onnx"), str(raw), str(size), str(threads), provider, *stages]


def _start(command: Sequence[str]) -> Start:
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            stdout: Any = process.stdout
            first = stdout.readline()
            seconds = time.perf_counter() - begin
            rest = stdout.read()
        if process.returncode or first.strip() != "answered":
            errors.seek(0)
            why = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise BackendError(f"a fresh process did not answer: {' '.join(why.split())[:300]}")
    facts: dict[str, Any] = json.loads(rest)
    return Start(seconds, facts["peak"], facts.get("device"), facts.get("report"))
