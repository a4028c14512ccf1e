"""What a fresh process takes from its start to the first answer: time and memory, beside plain ONNX Runtime.

A bundle is hashed at its first start; a file that was hashed before and not touched since is held by its CRC-32
(`mge_runtime.bundle.untouched`). Both are measured: each first start has an empty cache folder, later starts share one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mge_runtime.bench import child, plain
from mge_runtime.bench.noise import Noise, Watch
from mge_runtime.bench.rounds import shuffled
from mge_runtime.bench.stats import Ratio
from mge_runtime.bundle import Bundle
from mge_runtime.cache import cache_folder
from mge_runtime.cpus import cpu_count
from mge_runtime.errors import BackendError, OutputError
from mge_runtime.fields import JsonValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.backends import Choice

__all__ = ["FIRST", "LATER", "PLAIN", "Fresh", "Start", "measure_fresh"]

FIRST, LATER, PLAIN = "first start (hashed)", "later starts", "plain ONNX Runtime, same stages"
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 9
_SETTLED = 2.5  # seconds since a bundle's last change, above those that `untouched` asks for
_HASHED = "hashed"  # the folder of the cache that says which files were hashed


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

    first: tuple[Start, ...]  # from the bundle, hashed: nothing says that it was before
    later: tuple[Start, ...]  # from the bundle, which was hashed before; empty for engines, always hashed
    files: tuple[Start, ...]  # plain; empty where there is no reference
    noise: Noise
    no_reference: str | None = None  # why

    @property
    def first_ratio(self) -> Ratio | None:
        """A first start's to the plain files', round by round; None without a reference."""
        return _ratio(f"{FIRST} / plain ONNX Runtime", self.first, self.files)

    @property
    def later_ratio(self) -> Ratio | None:
        """A later start's to the plain files', round by round; None without a reference."""
        return _ratio(f"{LATER} / plain ONNX Runtime", self.later, self.files)

    @property
    def first_ratio_of_medians(self) -> float | None:
        """The median of the first starts to the plain files' median."""
        return _seconds(self.first) / _seconds(self.files) if self.files else None

    @property
    def later_ratio_of_medians(self) -> float | None:
        """The median of the later starts to the plain files' median."""
        return _seconds(self.later) / _seconds(self.files) if self.files else None

    def summary(self) -> dict[str, Any]:
        """What is derived, by the names of the JSON report."""
        return {
            "first_start_seconds": _seconds(self.first),
            "first_start_ratio_of_medians": self.first_ratio_of_medians,
            "first_start_ratio": asdict(self.first_ratio) if self.first_ratio else None,
            "later_starts_seconds": _seconds(self.later) if self.later else None,
            "later_starts_ratio_of_medians": self.later_ratio_of_medians,
            "later_starts_ratio": asdict(self.later_ratio) if self.later_ratio else None,
        }


def measure_fresh(
    path: Path,
    choice: Choice,
    threads: int | None,
    frame: NDArray[np.uint8],
    seconds: float,
    say: Callable[[str], None] = lambda _line: None,
) -> Fresh:
    """Start one process of each way in every round, in shuffled order.

    Args:
        path: the bundle.
        choice: what runs it.
        threads: as for `Pipeline.open`.
        frame: what is answered, uint8 [S, S, 3].
        seconds: to spend, at least three rounds.
        say: is told how far it is.

    Raises:
        BackendError: a process failed, or what should have been hashed was not, or the other way round.
        OutputError: the temporary folder cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="mge-bench-") as folder:
            return _measure(path, choice, threads, frame, seconds, say, Path(folder))
    except OSError as error:
        raise OutputError(
            f"cannot use the temporary folder: {error.strerror or error}; "
            "expected room for the bundle's stages in it: set TMPDIR to another place"
        ) from error


def _measure(
    path: Path,
    choice: Choice,
    threads: int | None,
    frame: NDArray[np.uint8],
    seconds: float,
    say: Callable[[str], None],
    folder: Path,
) -> Fresh:
    raw = folder / "frame"
    frame.tofile(raw)
    mine = [sys.executable, "-m", child.__name__, str(path), str(raw), choice.device, choice.backend]
    mine.append("all" if threads is None else str(threads))
    engines = choice.backend != "onnxruntime"
    _settle(path)
    stamped = _cache(folder / "later", engines)
    ways: dict[str, Callable[[], Start]] = {FIRST: partial(_first, mine, folder, engines)}
    if not engines:
        ways[LATER] = partial(_start, mine, {"MGE_CACHE_DIR": str(stamped)})
        ways[PLAIN] = partial(_start, _plain(path, folder, raw, choice, threads or cpu_count()))
    for start in ways.values():
        start()
    stamps = _stamps(stamped)
    if not stamps and not engines:
        raise BackendError(
            f"{path} was not remembered as hashed, later starts cannot be measured; expected a file that nothing "
            "changes and whose time of change is past: touch it"
        )
    starts: dict[str, list[Start]] = {way: [] for way in ways}
    begin, watch = time.perf_counter(), Watch()
    orders = shuffled(list(ways), apart=False)
    for number in range(_MOST_ROUNDS):
        for way in next(orders):
            starts[way].append(ways[way]())
        say(f"{number + 1} rounds")
        passed = time.perf_counter() - begin
        if number + 1 >= _LEAST_ROUNDS and passed * (number + 2) / (number + 1) > seconds:
            break
    if _stamps(stamped) != stamps:
        raise BackendError(f"a later start hashed {path} again; expected a file that nothing changes meanwhile")
    reference = FIRST if engines else PLAIN
    noise = watch.stop(reference, [start.seconds * 1e3 for start in starts[reference]])
    first, later, files = (tuple(starts.get(way, ())) for way in (FIRST, LATER, PLAIN))
    return Fresh(
        first, later, files, noise, f"{choice} runs engines, which plain files do not hold" if engines else None
    )


def _first(command: Sequence[str], folder: Path, engines: bool) -> Start:
    """A start that finds an empty cache, and has to hash."""
    with tempfile.TemporaryDirectory(prefix="first-", dir=folder) as name:
        start = _start(command, {"MGE_CACHE_DIR": str(_cache(Path(name), engines))})
        if not engines and not _stamps(Path(name)):
            raise BackendError("a first start did not hash the bundle; expected a file that nothing changes meanwhile")
    return start


def _cache(folder: Path, engines: bool) -> Path:
    """A cache of its own, where nothing was hashed; engines, which take minutes to make, are those of the user's."""
    folder.mkdir(exist_ok=True)
    theirs = cache_folder()
    for kept in theirs.iterdir() if engines and theirs.is_dir() else ():
        if kept.name != _HASHED:
            (folder / kept.name).symlink_to(kept.resolve())
    return folder


def _stamps(cache: Path) -> dict[str, int]:
    """When each file was remembered as hashed, by name; hashing again touches it."""
    folder = cache / _HASHED
    return {stamp.name: stamp.stat().st_mtime_ns for stamp in folder.iterdir()} if folder.is_dir() else {}


def _settle(path: Path) -> None:
    """Wait until a bundle that was just written can be remembered."""
    status = path.stat()
    time.sleep(min(_SETTLED, max(0.0, _SETTLED - (time.time() - max(status.st_mtime, status.st_ctime)))))


def _seconds(starts: Sequence[Start]) -> float:
    return median(start.seconds for start in starts)


def _ratio(name: str, above: Sequence[Start], below: Sequence[Start]) -> Ratio | None:
    if not below:
        return None
    return Ratio.of(name, [start.seconds for start in above], [start.seconds for start in below])


def _plain(path: Path, folder: Path, raw: Path, choice: Choice, threads: int) -> list[str]:
    with Bundle.open(path) as bundle:
        bundle.extract(folder)
        stages = [name for segment in bundle.manifest.segments for name in segment.stages]
        size = bundle.manifest.preprocess.size
    provider = "CPUExecutionProvider" if choice.device == "cpu" else "CUDAExecutionProvider"
    script = [sys.executable, str(Path(plain.__file__).resolve())]
    return [*script, str(folder / "onnx"), str(raw), str(size), str(threads), provider, *stages]


def _start(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Start:
    environment = {**os.environ, **(variables or {})}
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
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
