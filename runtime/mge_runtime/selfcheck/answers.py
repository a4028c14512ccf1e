"""Checks that hold one way of running the chain to another: backends, batch sizes, graphs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mge_runtime.fields import JsonValue
from mge_runtime.selfcheck.check import Check, judged, not_run
from mge_runtime.selfcheck.compare import compare, compared_tensors, expectation
from mge_runtime.selfcheck.subject import Opened, Subject, run_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BATCH", "check_batches", "check_graphs", "check_parity", "programs"]

BATCH = 8


def check_parity(subject: Subject, frames: NDArray[np.uint8]) -> Check:
    """The whole chain against ONNX Runtime on the CPU: classes, logits, boxes, gate.

    Raises:
        BackendError: a run failed.
    """
    name, expected = "the same answers as ONNX Runtime on the CPU", expectation(subject.limits)
    if subject.reference is None:
        return not_run(name, "this is the reference", expected)
    outputs = compared_tensors(subject.manifest)
    with closing(subject.reference()) as opened:
        reference = run_all(opened, frames, outputs, BATCH)
    with closing(subject.open(True)) as opened:
        found = run_all(opened, frames, outputs, _batch(opened))
    compared = compare(found, reference, subject.manifest, subject.limits)
    return judged(name, compared.failures, compared.summary, expected, compared.numbers)


def check_batches(subject: Subject, frames: NDArray[np.uint8]) -> Check:
    """Every frame alone, against batches of eight with a smaller one at the end.

    Raises:
        BackendError: a run failed.
    """
    name, expected = f"the same answers in batches of 1 and {BATCH}", expectation(subject.limits)
    outputs = compared_tensors(subject.manifest)
    with closing(subject.open(True)) as opened:
        batch = _batch(opened)
        if batch == 1:
            return not_run(name, "the engines were built for a batch of 1 alone", expected)
        remainder = (batch + 1) // 2  # of more than one image: those alone are in batches of one already
        count = batch * max(1, -(-(len(frames) - remainder) // batch)) + remainder
        every = frames[np.arange(count) % len(frames)]
        alone = run_all(opened, every, outputs, 1)
        together = run_all(opened, every, outputs, batch)
    compared = compare(together, alone, subject.manifest, subject.limits)
    found = f"batches of {batch} and {count % batch}: {compared.summary}"
    return judged(name, compared.failures, found, expected, {**compared.numbers, "batch": batch})


def check_graphs(subject: Subject, frames: NDArray[np.uint8]) -> Check:
    """CUDA graphs against the plain chain, with other frames at every launch; and that a graph was really used.

    Raises:
        BackendError: a run failed.
    """
    name = "the same answers with CUDA graphs as without"
    expected = f"a graph from the second run on; {expectation(subject.limits)}"
    outputs = compared_tensors(subject.manifest)
    with closing(subject.open(True)) as opened, ExitStack() as stack:
        if not opened.report():
            return not_run(name, "the chain runs on the CPU, which has no CUDA graphs", expected)
        plain = stack.enter_context(closing(subject.open(False)))
        failures: list[str] = []
        numbers: dict[str, JsonValue] = {}
        found: list[str] = []
        for batch in dict.fromkeys((1, min(_batch(opened), len(frames)))):
            whole = frames[: len(frames) // batch * batch]  # one batch size, so that one graph serves
            # The first run of a batch size is plain, the second is captured.
            for _ in range(2):
                opened.run(whole[-batch:], outputs=outputs)
            compared = compare(
                run_all(opened, whole, outputs, batch),
                run_all(plain, whole, outputs, batch),
                subject.manifest,
                subject.limits,
            )
            used = [program for program in programs(opened) if program.get("batch") == batch]
            failures += [
                f"batch {batch}: no graph: {program.get('why')}" for program in used if not program.get("graph")
            ]
            failures += [f"batch {batch}: no run was reported"] if not used else []
            if any(program.get("graph") for program in programs(plain)):
                failures.append(f"batch {batch}: a graph was used where graphs were turned off")
            failures += [f"batch {batch}: {failure}" for failure in compared.failures]
            numbers |= {f"batch_{batch}_{key}": value for key, value in compared.numbers.items()}
            found.append(f"batch {batch}: {compared.summary}")
        numbers["opened"] = opened.report().get("opened", {})  # layouts, and why not others
    return judged(name, failures, "; ".join(found), expected, numbers)


def programs(opened: Opened) -> list[Mapping[str, Any]]:
    """What the device layer says of each batch size that ran; empty on a CPU."""
    return cast("list[Mapping[str, Any]]", opened.report().get("programs", []))


def _batch(opened: Opened) -> int:
    return min(BATCH, opened.max_batch or BATCH)
