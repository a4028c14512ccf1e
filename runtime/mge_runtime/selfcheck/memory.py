"""Check that memory does not grow from run to run: the device's by the driver, the process's by the system."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mge_runtime.backends.choice import device_index
from mge_runtime.bench_report import Result
from mge_runtime.fields import JsonValue
from mge_runtime.selfcheck.outputs import batch_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.bench_subject import Subject
    from mge_runtime.pipeline import Pipeline


# Bytes that memory in use may grow by. Measured on the CPU, 1,000 runs move the host's by some 20 kB, the interpreter's
# own; a driver gives memory away in pages of 2 MiB, and none may go.
_LIMITS = {"host": 2**20, "device": 2**21 - 1}
_WARM_UP = 20  # runs: allocators find their size, graphs are captured
_SAMPLES = 20  # of each period
_PERIODS = 3  # at most: a heap that settles grows once or twice, a leak in every period

_Meters = Mapping[str, Callable[[], "int | None"]]  # bytes in use now, by name


def check_memory(
    subject: Subject, frames: NDArray[np.uint8], runs: int, say: Callable[[str], None] = lambda _line: None
) -> Result:
    """Memory in use over many runs, mostly one frame at a time, every tenth a batch.

    Growth is the least that was in use in the second half of the runs less the least in the first half: what other
    processes take for a while does not count, and what every run leaves behind does. Where that is over the limit, the
    runs are made again, up to three times, and the least growth counts.

    Args:
        subject: what runs.
        frames: to run, [N, S, S, 3].
        runs: how many, at least 2.
        say: shows how far it is.
    """
    meters: dict[str, Callable[[], int | None]] = {"host": host_memory}
    if subject.device.startswith("cuda:"):
        index = device_index(subject.device)
        meters = {"device": lambda: device_memory(index), **meters}
    meters = {name: meter for name, meter in meters.items() if meter() is not None}
    if not meters:
        return Result("not run", "this system does not tell how much memory is in use")
    series: dict[str, list[int]] = {name: [] for name in meters}
    growth: dict[str, list[int]] = {name: [] for name in meters}  # of each period
    with ExitStack() as stack:
        gc.collect()
        gc.freeze()  # collections look at what is made from here on: others' objects take a second each
        stack.callback(gc.unfreeze)
        opened = stack.enter_context(closing(subject.open()))
        batch = frames[: batch_size(opened)]
        for _ in range(_WARM_UP):
            opened.run(frames[:1])
            opened.run(batch)
        for _ in range(_PERIODS):
            for name, values in _period(opened, frames, batch, runs, meters, say).items():
                half = len(values) // 2
                growth[name].append(min(values[half:]) - min(values[:half]))
                series[name] += values
            if all(growth[name][-1] <= _LIMITS[name] for name in meters):
                break
    least = {name: min(values) for name, values in growth.items()}
    lines = {name: f"{name} memory grew by {value} bytes over {runs} runs" for name, value in least.items()}
    failures = [
        f"{line}; expected at most {_LIMITS[name]}" for name, line in lines.items() if least[name] > _LIMITS[name]
    ]
    numbers: dict[str, JsonValue] = {"runs": runs}
    for name in meters:
        numbers |= {f"{name}_growth": least[name], f"{name}_series": series[name]}
    return Result.of(failures, ", ".join(lines.values()), numbers)


def _period(
    opened: Pipeline,
    frames: NDArray[np.uint8],
    batch: NDArray[np.uint8],
    runs: int,
    meters: _Meters,
    say: Callable[[str], None],
) -> dict[str, list[int]]:
    """What each meter said before, during and after the runs."""
    series: dict[str, list[int]] = {name: [] for name in meters}
    step = max(1, runs // _SAMPLES)
    for run in range(runs + 1):
        if run % step == 0:
            gc.collect()
            for name, used in meters.items():
                series[name].append(used() or 0)
            if run % (5 * step) == 0:
                say(f"memory: {run} of {runs} runs")
        opened.run(batch if run % 10 == 9 else frames[run % len(frames)][None])
    return series


def host_memory() -> int | None:
    """Bytes of this process's own memory that are resident; None where the system does not say it as Linux does.

    Pages of mapped files (libraries, weights) do not count: the system takes and brings them back as it likes.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    own = [line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(map(int, own)) * 1024 if own else None


def device_memory(index: int) -> int | None:
    """Bytes in use on a GPU (counted from 0), by all processes; on a Jetson the memory that it shares with the CPU.

    None where the driver does not say it.
    """
    core: Any = importlib.import_module("cuda.core")
    driver: Any = importlib.import_module("cuda.bindings.driver")
    core.Device(index).set_current()
    status, free, total = driver.cuMemGetInfo()
    return int(total) - int(free) if int(status) == 0 else None
