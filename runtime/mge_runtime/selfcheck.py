"""Check that a bundle runs as it should on this device: `mge-bench --selfcheck` and the tests marked `gpu`."""

from __future__ import annotations

import gc
import importlib
import traceback
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mge_runtime.backends.choice import device_index
from mge_runtime.bench_report import CheckReport, Result
from mge_runtime.bundle import EngineDescription
from mge_runtime.compare import (
    box_failures,
    chain_box_iou,
    class_failures,
    class_margins,
    finite,
    relative_difference,
    same_boxes,
)
from mge_runtime.errors import MGEError, one_line
from mge_runtime.fields import JsonValue
from mge_runtime.machine import Gpu
from mge_runtime.manifest import FRAME, Entry, Manifest
from mge_runtime.trt.engines import EngineDetails, EngineSet, why_not
from mge_runtime.trt.target import BatchRange, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.bench_subject import Images, Subject
    from mge_runtime.pipeline import Pipeline

_BATCH = 8  # the largest that is checked
_ROUNDS = 5  # of two pipelines at once
# Bytes that memory in use may grow by. Measured on the CPU, 1,000 runs move the host's by some 20 kB, the interpreter's
# own; a driver gives memory away in pages of 2 MiB, and none may go.
_LIMITS = {"host": 2**20, "device": 2**21 - 1}
_WARM_UP = 20  # runs: allocators find their size, graphs are captured
_SAMPLES = 20  # of each period
_PERIODS = 3  # at most: a heap that settles grows once or twice, a leak in every period
# Stands in where there is no GPU: descriptions decide, so no GPU is needed to see them decide.
_STAND_IN = Gpu("NVIDIA GeForce RTX 3060", "sm86", 12 * 2**30, 28)
_ELSEWHERE = (Gpu("Orin", "sm87", 32 * 2**30, 16, integrated=True), _STAND_IN)

_Tensors = Mapping[str, "NDArray[Any]"]  # by name; the first axis is the image
_Meters = Mapping[str, Callable[[], "int | None"]]  # bytes in use now, by name


def all_checks(
    frames: NDArray[np.uint8], runs: int = 1000, say: Callable[[str], None] = lambda _line: None
) -> dict[str, Callable[[Subject], Result]]:
    """Every check by name, in the order of a report; the one that takes longest comes last.

    Args:
        frames: what is checked with, [N, S, S, 3].
        runs: of the memory check.
        say: is told how far that is.
    """
    return {
        "the same outputs as ONNX Runtime on the CPU": partial(check_parity, frames=frames),
        "the same outputs in batches": partial(check_batches, frames=frames),
        "the same outputs with CUDA graphs as without": partial(check_cuda_graphs, frames=frames),
        "the same outputs from two pipelines at once": partial(check_together, frames=frames),
        "engines that do not fit are refused": check_refused,
        "no memory grows": partial(check_memory, frames=frames, runs=runs, say=say),
    }


def run_checks(
    subject: Subject,
    images: Images,
    *,
    runs: int = 1000,
    say: Callable[[str], None] = lambda _line: None,
    interrupt: Callable[[], None] = lambda: None,
) -> CheckReport:
    """Check a bundle on one backend. A check that ends in an error has failed; the others go on.

    After a `KeyboardInterrupt` the checks that are left are not run.

    Args:
        subject: what is checked.
        images: what it is checked with.
        runs: of the memory check.
        say: is told what is being done.
        interrupt: raises an interrupt that got lost.
    """
    checks = all_checks(images.frames, runs, say)
    report = CheckReport(subject, images.source, checks)
    for name, check in checks.items():
        say(name)
        try:
            interrupt()
            report.checks[name] = check(subject)
        except KeyboardInterrupt:
            report.interrupted = name
            break
        except MGEError as error:
            report.checks[name] = Result("failed", one_line(error))
        except Exception as error:  # a defect, and the other checks may tell more about it
            report.checks[name] = Result("failed", _defect(error))
    return report


def check_parity(subject: Subject, frames: NDArray[np.uint8]) -> Result:
    """The whole chain against ONNX Runtime on the CPU: classes, logits, boxes, gate."""
    if subject.reference is None:
        return Result("not run", "this is the reference")
    outputs = compared_tensors(subject.manifest)
    with closing(subject.reference()) as opened:
        reference = _run_all(opened, frames, outputs, _BATCH)
    with closing(subject.open()) as opened:
        found = _run_all(opened, frames, outputs, batch_size(opened))
    compared = _compare(found, reference, subject)
    return Result.of(compared.failures, compared.summary, compared.numbers)


def check_batches(subject: Subject, frames: NDArray[np.uint8]) -> Result:
    """Every frame alone, against batches of eight with a smaller one at the end."""
    outputs = compared_tensors(subject.manifest)
    with closing(subject.open()) as opened:
        batch = batch_size(opened)
        if batch == 1:
            return Result("not run", "the engines were built for a batch of 1 alone")
        remainder = (batch + 1) // 2  # of more than one image: those alone are in batches of one already
        count = batch * max(1, -(-(len(frames) - remainder) // batch)) + remainder
        every = frames[np.arange(count) % len(frames)]
        alone, together = (_run_all(opened, every, outputs, size) for size in (1, batch))
    compared = _compare(together, alone, subject)
    found = f"batches of {batch} and {remainder}: {compared.summary}"
    return Result.of(compared.failures, found, {**compared.numbers, "batch": batch})


def check_cuda_graphs(subject: Subject, frames: NDArray[np.uint8]) -> Result:
    """CUDA graphs against the plain chain, with other frames at every launch; and that a graph was really used."""
    outputs = compared_tensors(subject.manifest)
    failures: list[str] = []
    found: list[str] = []
    numbers: dict[str, JsonValue] = {}
    with closing(subject.open()) as opened, closing(subject.open(cuda_graphs=False)) as plain:
        if not opened.report():
            return Result("not run", "the chain runs on the CPU, which has no CUDA graphs")
        for batch in dict.fromkeys((1, min(batch_size(opened), len(frames)))):
            whole = frames[: len(frames) // batch * batch]  # one batch size, so that one graph serves
            # The first run of a batch size is plain, the second is captured.
            for _ in range(2):
                opened.run(whole[-batch:], outputs=outputs)
            launched, wanted = (_run_all(way, whole, outputs, batch) for way in (opened, plain))
            compared = _compare(launched, wanted, subject)
            ran = [program for program in _programs(opened) if program.get("batch") == batch]
            problems = [f"no CUDA graph: {program.get('why')}" for program in ran if not program.get("cuda_graph")]
            problems += [] if ran else ["no run was reported"]
            if any(program.get("cuda_graph") for program in _programs(plain)):
                problems.append("a CUDA graph was used where they were turned off")
            failures += [f"batch {batch}: {problem}" for problem in [*problems, *compared.failures]]
            numbers |= {f"batch_{batch}_{key}": value for key, value in compared.numbers.items()}
            found.append(f"batch {batch}: {compared.summary}")
        numbers["opened"] = opened.report().get("opened", {})  # layouts, and why not others
    return Result.of(failures, "; ".join(found), numbers)


def check_together(subject: Subject, frames: NDArray[np.uint8]) -> Result:
    """Two pipelines in two threads, each with frames in another order and in other batches, against one alone."""
    outputs = compared_tensors(subject.manifest)
    with closing(subject.open()) as opened:
        alone = _run_all(opened, frames, outputs, 1)

    def compare_rounds(order: NDArray[np.intp], batch: int) -> list[_Comparison]:
        wanted = {name: array[order] for name, array in alone.items()}
        with closing(subject.open()) as opened:
            size = min(batch, batch_size(opened))
            found = [_run_all(opened, frames[order], outputs, size) for _ in range(_ROUNDS)]
        return [_compare(tensors, wanted, subject) for tensors in found]

    forwards = np.arange(len(frames))
    with ThreadPoolExecutor(2, "mge-selfcheck") as threads:
        compared = list(threads.map(compare_rounds, (forwards, forwards[::-1]), (1, _BATCH)))
    failures = [
        f"pipeline {number}: {failure}"
        for number, rounds in enumerate(compared, 1)
        for failure in dict.fromkeys(line for one in rounds for line in one.failures)
    ]
    last = compared[0][-1]
    return Result.of(failures, f"{_ROUNDS} rounds at once: {last.summary}", last.numbers)


def check_refused(subject: Subject) -> Result:
    """Engines for another GPU, another version and another operating system are refused here by their descriptions."""
    machine, index = subject.machine, device_index(subject.device)
    gpu = machine.gpus[index] if index < len(machine.gpus) else _STAND_IN
    backend = subject.backend if subject.backend.startswith("tensorrt") else "tensorrt"
    installed = machine.libraries.get(backend, "10.3.0")
    machine = replace(machine, gpus=machine.gpus or (gpu,), libraries={**machine.libraries, backend: installed})
    elsewhere = next(other for other in _ELSEWHERE if other.capability != gpu.capability)
    short = ".".join(installed.split(".")[:2])
    here = Target(backend, short, (gpu.capability,), machine.system, machine.arch)
    misfits = {
        "another GPU": (elsewhere, installed, replace(here, capabilities=(elsewhere.capability,))),
        "another version": (gpu, "9.9.9", replace(here, version="9.9")),
        "another system": (gpu, installed, replace(here, system="windows" if here.system == "linux" else "linux")),
    }
    plans = {graph.name: Entry("0" * 64, 1) for graph in subject.manifest.graphs}
    problems: dict[str, str | None] = {}
    for what, (built_on, built_by, target) in misfits.items():
        details = EngineDetails(built_by, built_on, BatchRange(), {}, {}, "mge-bench --selfcheck").to_dict()
        description = EngineDescription(subject.manifest_sha256, target.name, plans, details)
        problems[what] = why_not(
            EngineSet(description, "nowhere", lambda _: memoryview(b"")), machine, gpu, subject.manifest
        )
    failures = [f"engines for {what} are not refused" for what, problem in problems.items() if problem is None]
    where = "" if subject.machine.gpus else f"on {gpu}, a stand-in where there is no GPU: "
    return Result.of(failures, where + "; ".join(f"{what}: {why}" for what, why in problems.items()), problems)


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


@dataclass(frozen=True)
class _Comparison:
    """How two runs over the same frames differ."""

    failures: list[str]  # everything out of tolerance, one line each
    numbers: dict[str, JsonValue]
    summary: str  # "12 images, 0 change their class, logits_1 differs by 1.2e-06 of its largest value"


def compared_tensors(manifest: Manifest) -> list[str]:
    """Names of the tensors that are compared: the chain's logits, every expert's logits and box, the gate."""
    names = [manifest.logits, *(view.logits for view in manifest.views), *_boxes(manifest)]
    return list(dict.fromkeys([*names, *([] if manifest.gate is None else [manifest.gate])]))


def _compare(found: _Tensors, reference: _Tensors, subject: Subject) -> _Comparison:
    """Compare one run with another, both of `compared_tensors`.

    What depends on the frame alone (the first expert's logits, the first box, a gate that sees the frame) is checked on
    every image. An image cropped by another box is another image, so the chain's logits are checked where all boxes are
    the same; its class is checked on every image.
    """
    manifest, tolerances = subject.manifest, subject.tolerances
    names, boxes = compared_tensors(manifest), _boxes(manifest)
    failures = [f"{name} holds numbers that are not finite" for name in names if not np.isfinite(found[name]).all()]
    logits, wanted = found[manifest.logits], reference[manifest.logits]
    everywhere = np.ones(len(wanted), bool)
    same_crops = everywhere.copy()
    for name in boxes:
        same_crops &= same_boxes(found[name], reference[name])
    changed = logits.argmax(1) != wanted.argmax(1)
    identical = all(np.array_equal(found[name], reference[name]) for name in names)
    numbers: dict[str, JsonValue] = {
        "images": len(wanted),
        "identical": identical,
        "same_crops": int(same_crops.sum()),
        "class_changes": int(changed.sum()),
    }
    summary = [f"{len(wanted)} images, {changed.sum()} change their class"]
    failures += class_failures("the chain", changed.tolist(), class_margins(logits, wanted).tolist(), tolerances)
    checked = {manifest.views[0].logits: everywhere, manifest.logits: same_crops}
    if manifest.gate is not None:
        sees_frame = any(tensor.name == FRAME for tensor in manifest.graphs[-1].inputs)
        checked[manifest.gate] = everywhere if sees_frame else same_crops
    for name, where in checked.items():
        if where.any():
            relative = relative_difference(found[name][where], reference[name][where])
            largest = numbers[f"{name}_relative"] = finite(relative.max())
            summary.append(f"{name} differs by {largest} of its largest value")
            if beyond := int((~(relative <= tolerances.relative)).sum()):
                failures.append(
                    f"{name} differs by {relative.max():.1e} of its largest value on {beyond} of {len(relative)} "
                    f"images; expected at most {tolerances.relative:g}"
                )
    for number, (name, ious) in enumerate(chain_box_iou(boxes, found, reference, manifest.crops).items()):
        numbers[f"{name}_iou_median"], numbers[f"{name}_iou_least"] = finite(np.median(ious)), finite(ious.min())
        summary.append(f"least IoU of {name} {finite(ious.min())}")
        if number == 0 or tolerances.chain_boxes:
            failures += box_failures(name, ious.tolist(), tolerances)
    return _Comparison(failures, numbers, f"{summary[0]}, identical" if identical else ", ".join(summary))


def batch_size(opened: Pipeline) -> int:
    """The largest batch that is checked: eight, or what engines were built for."""
    return min(_BATCH, opened.max_batch or _BATCH)


def _run_all(opened: Pipeline, frames: NDArray[np.uint8], outputs: Collection[str], batch: int) -> _Tensors:
    """Run any number of frames in groups of `batch`; the last group may be smaller."""
    runs = [opened.run(frames[start : start + batch], outputs=outputs) for start in range(0, len(frames), batch)]
    return {name: np.concatenate([tensors[name] for tensors in runs]) for name in outputs}


def _boxes(manifest: Manifest) -> list[str]:
    return [view.box for view in manifest.views if view.box is not None]


def _programs(opened: Pipeline) -> list[Mapping[str, Any]]:
    """What the device layer says of each batch size that ran."""
    return cast("list[Mapping[str, Any]]", opened.report().get("programs", []))


def _defect(error: Exception) -> str:
    """The error and where it was raised, without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return one_line(f"{type(error).__name__}: {error}{where}")
