"""Check what the chain gives: against the CPU, in batches, with CUDA graphs, in two pipelines; and what it copies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mge_runtime.bench_report import Result
from mge_runtime.compare import (
    box_failures,
    chain_box_iou,
    class_failures,
    class_margins,
    finite,
    relative_difference,
    same_boxes,
)
from mge_runtime.fields import JsonValue
from mge_runtime.manifest import FRAME, Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.bench_subject import Subject
    from mge_runtime.pipeline import Pipeline


_BATCH = 8  # the largest that is checked
_ROUNDS = 5  # of two pipelines at once
_ON_CPU = "the chain runs on the CPU, which has no CUDA graphs and copies nothing"

_Tensors = Mapping[str, "NDArray[Any]"]  # by name; the first axis is the image


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
            return Result("not run", _ON_CPU)
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


def check_copies(subject: Subject, frames: NDArray[np.uint8]) -> Result:
    """What the device layer copies: the frames in, each wanted tensor out, nothing between graphs."""
    outputs = compared_tensors(subject.manifest)
    failures: list[str] = []
    numbers: dict[str, int] = {}
    with closing(subject.open()) as opened:
        if not opened.report():
            return Result("not run", _ON_CPU)
        for run in range(4):  # plain, captured, launched, and once more
            frame = frames[run % len(frames)][None]
            before = cast("Mapping[str, int]", opened.report()["copies"])
            tensors = opened.run(frame, outputs=outputs)
            after = cast("Mapping[str, int]", opened.report()["copies"])
            numbers = {key: after[key] - before[key] for key in after}
            wanted = {
                "host_to_device": 1,
                "host_to_device_bytes": frame.nbytes,
                "device_to_host": len(outputs),
                "device_to_host_bytes": sum(int(array.nbytes) for array in tensors.values()),
            }
            if numbers != wanted:
                failures.append(f"run {run + 1} copied {_line(numbers)}; expected {_line(wanted)}")
    return Result.of(failures, f"each run copied {_line(numbers)}", numbers)


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


def _line(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in counts.items())
