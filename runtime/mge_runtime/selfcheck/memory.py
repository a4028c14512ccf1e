"""That memory does not grow from run to run: the device's by the driver, the process's by the system."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mge_runtime.fields import JsonValue
from mge_runtime.selfcheck.answers import BATCH
from mge_runtime.selfcheck.check import Check, judged, not_run
from mge_runtime.selfcheck.subject import Opened, Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["HOST_LIMIT", "check_memory", "device_memory", "host_memory"]

HOST_LIMIT = 2**20  # bytes: measured on the CPU, 1,000 runs move it by some 20 kB, the interpreter's own
_DEVICE_LIMIT = 2**21 - 1  # bytes: the driver gives memory away in pages of 2 MiB, and none may go
_WARM_UP = 20  # runs: allocators find their size, graphs are captured
_SAMPLES = 20
_PERIODS = 3  # at most: a heap that settles grows once or twice, a leak in every period
_STATUS = Path("/proc/self/status")

Say = Callable[[str], None]
Meter = tuple[str, Callable[[], int | None], int]  # name, bytes in use now (None: unknown), growth that is allowed


def check_memory(
    subject: Subject,
    frames: NDArray[np.uint8],
    runs: int,
    *,
    say: Say = lambda _line: None,
    meters: Sequence[Meter] | None = None,
) -> Check:
    """Memory in use over many runs, mostly one frame at a time, every tenth a batch.

    Growth is the least that was in use in the second half of the runs less the least in the first half: what other
    processes take for a while does not count, and what every run leaves behind does. Where that is over the limit, the
    runs are made again, up to three times, and the least growth counts: a process's heap may settle once, and what
    leaks grows each time.

    Args:
        subject: what runs.
        frames: to run, [N, S, S, 3].
        runs: how many, at least 2.
        say: shows how far it is.
        meters: what tells the memory in use; None: those of this machine.

    Raises:
        BackendError: a run failed.
    """
    if meters is None:
        meters = [("host", host_memory, HOST_LIMIT)]
        if subject.device.startswith("cuda:"):
            index = int(subject.device.partition(":")[2])
            meters = [("device", lambda: device_memory(index), _DEVICE_LIMIT), *meters]
    name = f"no memory grows over {runs} runs"
    limits = ", ".join(f"{meter} memory grows by at most {limit} bytes" for meter, _, limit in meters)
    periods: list[dict[str, list[int]]] = []
    with _older_objects_left_alone(), closing(subject.open(True)) as opened:
        batch = frames[: min(BATCH, opened.max_batch or BATCH)]
        for _ in range(_WARM_UP):
            opened.run(frames[:1])
            opened.run(batch)
        while len(periods) < _PERIODS:
            periods.append(_period(opened, frames, batch, runs, meters, say))
            if not periods[0]:
                return not_run(name, "this system does not tell how much memory is in use", limits)
            if all(_growth(periods[-1].get(meter, [0, 0])) <= limit for meter, _, limit in meters):
                break
    failures: list[str] = []
    found: list[str] = []
    numbers: dict[str, JsonValue] = {"runs": runs, "periods": len(periods)}
    for meter, _, limit in meters:
        if meter not in periods[0]:
            found.append(f"{meter} memory is not known here")
            continue
        series = [period[meter] for period in periods if meter in period]
        growth = min(map(_growth, series))
        numbers |= {f"{meter}_growth": growth, f"{meter}_series": [value for values in series for value in values]}
        shared = " (shared with the CPU and everything that runs)" if meter == "device" and _integrated(subject) else ""
        line = f"{meter} memory{shared} grew by {growth} bytes"
        found.append(line)
        if growth > limit:
            failures.append(line)
    return judged(name, failures, ", ".join(found), limits, numbers)


@contextmanager
def _older_objects_left_alone() -> Generator[None]:
    """Collections look at what was made inside the block alone: a process full of other objects takes a second each."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _period(
    opened: Opened,
    frames: NDArray[np.uint8],
    batch: NDArray[np.uint8],
    runs: int,
    meters: Sequence[Meter],
    say: Say,
) -> dict[str, list[int]]:
    """What each meter that tells anything said, before, during and after the runs."""
    series: dict[str, list[int]] = {}
    step = max(1, runs // _SAMPLES)
    for run in range(runs + 1):
        if run % step == 0:
            gc.collect()
            for meter, used, _ in meters:
                if (value := used()) is not None:
                    series.setdefault(meter, []).append(value)
            if run % (5 * step) == 0:
                say(f"{run} of {runs} runs")
        opened.run(batch if run % 10 == 9 else frames[run % len(frames)][None])
    return series


def _growth(values: Sequence[int]) -> int:
    half = len(values) // 2
    return min(values[half:]) - min(values[:half])


def _integrated(subject: Subject) -> bool:
    index = int(subject.device.partition(":")[2] or 0)
    return index < len(subject.machine.gpus) and subject.machine.gpus[index].integrated


def host_memory() -> int | None:
    """Bytes of this process's own memory that are resident; None where the system does not say it as Linux does.

    Pages of mapped files (libraries, weights) do not count: the system takes and brings them back as it likes.
    """
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    own = [line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(map(int, own)) * 1024 if own else None


def device_memory(index: int) -> int | None:
    """Bytes in use on a GPU, by all processes; on a Jetson the memory that it shares with the CPU.

    Args:
        index: as CUDA numbers devices, from 0.

    Returns:
        None where the driver does not answer.
    """
    core: Any = importlib.import_module("cuda.core")
    driver: Any = importlib.import_module("cuda.bindings.driver")
    core.Device(index).set_current()
    status, free, total = driver.cuMemGetInfo()
    return int(total) - int(free) if int(status) == 0 else None
