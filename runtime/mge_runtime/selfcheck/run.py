"""All checks, in turn."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mge_runtime.bundle import Bundle
from mge_runtime.errors import MGEError, one_line
from mge_runtime.selfcheck.answers import check_batches, check_graphs, check_parity
from mge_runtime.selfcheck.check import Check, not_run
from mge_runtime.selfcheck.copies import check_copies, check_graph_copies
from mge_runtime.selfcheck.engines import check_attested, check_refused
from mge_runtime.selfcheck.memory import check_memory
from mge_runtime.selfcheck.report import Report
from mge_runtime.selfcheck.together import check_together

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.selfcheck.pictures import Frames
    from mge_runtime.selfcheck.subject import Subject

__all__ = ["RUNS", "all_checks", "run_checks"]

RUNS = 1000  # of the memory check


def all_checks(
    frames: NDArray[np.uint8], runs: int = RUNS, say: Callable[[str], None] = lambda _line: None
) -> list[tuple[str, Callable[[Subject], Check]]]:
    """Every check by name, in the order of a report; the one that takes longest comes last.

    Args:
        frames: what is checked with, [N, S, S, 3].
        runs: of the memory check.
        say: is told how far that is.
    """
    return [
        ("the same answers as ONNX Runtime on the CPU", lambda subject: check_parity(subject, frames)),
        ("the same answers in batches", lambda subject: check_batches(subject, frames)),
        ("the same answers with CUDA graphs as without", lambda subject: check_graphs(subject, frames)),
        ("one copy in, one out for each wanted tensor", lambda subject: check_copies(subject, frames)),
        ("no copy to or from the host between graphs", lambda subject: check_graph_copies(subject, frames)),
        ("two pipelines in one process", lambda subject: check_together(subject, frames)),
        ("engines that do not fit are refused", check_refused),
        ("the precision of every engine is attested", check_attested),
        (
            "no memory grows",
            lambda subject: check_memory(subject, frames, runs, say=lambda line: say(f"memory: {line}")),
        ),
    ]


def run_checks(
    subject: Subject,
    frames: Frames,
    *,
    runs: int = RUNS,
    say: Callable[[str], None] = lambda _line: None,
    interrupt: Callable[[], None] = lambda: None,
) -> Report:
    """Check a bundle on one backend. A check that ends in an error has failed; the others go on.

    After a `KeyboardInterrupt` the checks that are left are not run.

    Args:
        subject: what is checked.
        frames: what it is checked with.
        runs: of the memory check.
        say: is told what is being done.
        interrupt: raises an interrupt that got lost.

    Raises:
        BundleError: the bundle has been replaced by something else meanwhile.
    """
    checks: list[Check] = []
    to_do = all_checks(frames.frames, runs, say)
    for number, (name, check) in enumerate(to_do):
        say(name)
        try:
            interrupt()
            checks.append(check(subject))
        except KeyboardInterrupt:
            checks += [not_run(left, "interrupted", "the whole check") for left, _ in to_do[number:]]
            break
        except MGEError as error:
            checks.append(Check(name, "failed", one_line(error), "no error"))
        except Exception as error:  # a defect, and the other checks may tell more about it
            checks.append(Check(name, "failed", _defect(error), "no error"))
    with Bundle.open(subject.path) as bundle:
        targets = bundle.targets
    kinds = {str(plan.get("type", "unknown")) for plan in subject.manifest.precision.values()}
    return Report.now(
        bundle=subject.path.name,
        manifest_sha256=subject.manifest_sha256,
        targets=targets,
        precision=" and ".join(sorted(kinds)) or "unknown precision",
        backend=subject.backend,
        device=subject.device,
        images=frames.source,
        limits=subject.limits.source,
        machine=subject.machine,
        checks=tuple(checks),
    )


def _defect(error: Exception) -> str:
    """The error and where it was raised, without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
