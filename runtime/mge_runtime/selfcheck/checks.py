"""All checks by name, run one after the other; and the one that looks at engines which do not fit."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mge_runtime.backends.choice import device_index
from mge_runtime.bench_report import CheckReport, Result
from mge_runtime.bundle import EngineDescription
from mge_runtime.errors import MGEError, one_line
from mge_runtime.machine import Gpu
from mge_runtime.manifest import Entry
from mge_runtime.selfcheck.memory import check_memory
from mge_runtime.selfcheck.outputs import check_batches, check_copies, check_cuda_graphs, check_parity, check_together
from mge_runtime.trt.engines import EngineDetails, EngineSet, why_not
from mge_runtime.trt.target import BatchRange, Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.bench_subject import Images, Subject


# Stands in where there is no GPU: descriptions decide, so no GPU is needed to see them decide.
_STAND_IN = Gpu("NVIDIA GeForce RTX 3060", "sm86", 12 * 2**30, 28)
_ELSEWHERE = (Gpu("Orin", "sm87", 32 * 2**30, 16, integrated=True), _STAND_IN)


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
        "one copy in, one out for each wanted tensor": partial(check_copies, frames=frames),
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


def _defect(error: Exception) -> str:
    """The error and where it was raised, without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return one_line(f"{type(error).__name__}: {error}{where}")
