"""That two pipelines in one process do not mix: each opened, used and closed in a thread of its own."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.errors import MGEError
from mge_runtime.fields import JsonValue
from mge_runtime.selfcheck.answers import BATCH
from mge_runtime.selfcheck.check import Check, judged
from mge_runtime.selfcheck.compare import compare, compared_tensors, expectation
from mge_runtime.selfcheck.subject import Subject, run_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["check_together"]

_ROUNDS = 5
_PATIENCE = 600.0  # seconds that one pipeline waits for the other


def check_together(subject: Subject, frames: NDArray[np.uint8]) -> Check:
    """Two pipelines at once, each with frames in another order and in other batches, against one alone.

    Raises:
        BackendError: a run failed.
    """
    name = "two pipelines in one process answer as one alone"
    outputs = compared_tensors(subject.manifest)
    with closing(subject.open(True)) as opened:
        alone = run_all(opened, frames, outputs, 1)
    orders = [np.arange(len(frames)), np.arange(len(frames))[::-1]]
    meeting = threading.Barrier(len(orders))
    answers: list[list[dict[str, NDArray[np.float32]]]] = [[] for _ in orders]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with closing(subject.open(True)) as opened:
                batch = (1, min(BATCH, opened.max_batch or BATCH))[number]
                for _ in range(_ROUNDS):
                    meeting.wait(_PATIENCE)  # so that their runs overlap
                    answers[number].append(run_all(opened, frames[orders[number]], outputs, batch))
        except threading.BrokenBarrierError:
            pass  # the other one failed, and said why
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=work, args=(number,), name=f"mge-selfcheck-{number}") for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, MGEError):
            raise error
    failures = [str(error) for error in errors]
    numbers: dict[str, JsonValue] = {"pipelines": len(orders), "rounds": _ROUNDS}
    summary = ""
    for number, order in enumerate(orders):
        wanted = {key: array[order] for key, array in alone.items()}
        for found in answers[number]:
            compared = compare(found, wanted, subject.manifest, subject.limits)
            failures += [f"pipeline {number + 1}: {failure}" for failure in compared.failures]
            summary = compared.summary
            numbers[f"identical_{number + 1}"] = bool(numbers.get(f"identical_{number + 1}", True)) and bool(
                compared.numbers["identical"]
            )
    found_line = f"{_ROUNDS} rounds at once: {summary}"
    return judged(name, list(dict.fromkeys(failures)), found_line, expectation(subject.limits), numbers)
