"""Run all checks and report what they found: as text, as Markdown to post in an issue, as JSON."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.errors import MGEError
from mge_runtime.files import temporary_folder
from mge_runtime.machine import Gpu, Machine
from mge_runtime.selfcheck.memory import check_memory
from mge_runtime.selfcheck.outputs import check_batches, check_copies, check_graphs, check_parity, check_together
from mge_runtime.selfcheck.subject import Result, Subject
from mge_runtime.trt.engines import EngineDetails, find_engines
from mge_runtime.trt.target import BatchRange, Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.fields import JsonValue
    from mge_runtime.selfcheck.subject import Frames

__all__ = ["RUNS", "Report", "all_checks", "check_refused", "run_checks"]

RUNS = 1000  # of the memory check
# Stands in where there is no GPU: descriptions decide, so no GPU is needed to see them decide.
_STAND_IN = Gpu("NVIDIA GeForce RTX 3060", "sm86", 12 * 2**30, 28)
_ELSEWHERE = (Gpu("Orin", "sm87", 32 * 2**30, 16, integrated=True), _STAND_IN)


@dataclass(frozen=True)
class Report:
    """Everything that whoever reads a posted report needs to know."""

    date: str  # UTC
    mge: str  # version
    bundle: str  # name of the file
    manifest_sha256: str
    precision: str  # "fp32", "fp16", "int8": its tolerances are those of the export
    targets: tuple[str, ...]  # that the bundle holds engines for
    backend: str  # what was checked
    device: str
    images: str  # what it was checked with
    machine: Machine
    checks: Mapping[str, Result]  # by name

    @property
    def failed(self) -> bool:
        """Whether a check failed. What was not run has neither passed nor failed."""
        return any(check.outcome == "failed" for check in self.checks.values())

    @property
    def verdict(self) -> str:
        """For example "6 passed, 0 failed, 2 not run"."""
        outcomes = [check.outcome for check in self.checks.values()]
        return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "not run"))

    def to_json(self) -> str:
        """All of it."""
        values = {**asdict(self), "verdict": self.verdict}
        return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_text(self) -> str:
        """For a terminal."""
        lines = [f"{name:<9}{value}" for name, value in self._facts().items()]
        for name, check in self.checks.items():
            mark = "FAILED" if check.outcome == "failed" else check.outcome
            lines += ["", f"{mark:<7}  {name}", f"         {check.found}"]
        return "\n".join([*lines, "", self.verdict, ""])

    def to_markdown(self) -> str:
        """For an issue."""
        lines = [f"### mge-bench --selfcheck: {self.verdict}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in self._facts().items()]
        lines += ["", "| check | outcome | found |", "|---|---|---|"]
        for name, check in self.checks.items():
            outcome = "**failed**" if check.outcome == "failed" else check.outcome
            lines.append(f"| {_cell(name)} | {outcome} | {_cell(check.found)} |")
        return "\n".join([*lines, ""])

    def _facts(self) -> dict[str, str]:
        return {
            "date": self.date,
            "mge": self.mge,
            "bundle": f"{self.bundle}, manifest {self.manifest_sha256}, {self.precision}",
            "engines": ", ".join(self.targets) or "none in the bundle",
            "checked": f"{self.backend} on {self.device}",
            "images": self.images,
            "machine": self.machine.summary,
        }


def all_checks(
    frames: NDArray[np.uint8], runs: int = RUNS, say: Callable[[str], None] = lambda _line: None
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
        "the same outputs with CUDA graphs as without": partial(check_graphs, frames=frames),
        "one copy in, one out for each wanted tensor": partial(check_copies, frames=frames),
        "the same outputs from two pipelines at once": partial(check_together, frames=frames),
        "engines that do not fit are refused": check_refused,
        "no memory grows": partial(check_memory, frames=frames, runs=runs, say=say),
    }


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
    """
    to_do = all_checks(frames.frames, runs, say)
    checks = dict.fromkeys(to_do, Result("not run", "interrupted"))
    for name, check in to_do.items():
        say(name)
        try:
            interrupt()
            checks[name] = check(subject)
        except KeyboardInterrupt:
            break
        except MGEError as error:
            checks[name] = Result("failed", " ".join(str(error).split()))
        except Exception as error:  # a defect, and the other checks may tell more about it
            checks[name] = Result("failed", _defect(error))
    return Report(
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        mge=version("mge"),
        bundle=subject.path.name,
        manifest_sha256=subject.manifest_sha256,
        precision=subject.precision,
        targets=subject.targets,
        backend=subject.backend,
        device=subject.device,
        images=frames.source,
        machine=subject.machine,
        checks=checks,
    )


def check_refused(subject: Subject) -> Result:
    """Engines for another GPU, version and operating system, put into a copy of the bundle, are refused here.

    Their descriptions decide: the engines themselves are a few bytes that nobody could load.
    """
    machine, index = subject.machine, int(subject.device.partition(":")[2] or 0)
    gpu = machine.gpus[index] if index < len(machine.gpus) else _STAND_IN
    backend = subject.backend if subject.backend.startswith("tensorrt") else "tensorrt"
    installed = machine.libraries.get(backend, "10.3.0")
    machine = replace(machine, gpus=machine.gpus or (gpu,), libraries={**machine.libraries, backend: installed})
    elsewhere = next(other for other in _ELSEWHERE if other.capability != gpu.capability)
    short = ".".join(installed.split(".")[:2])
    here = machine.system, machine.arch
    system = "windows" if machine.system == "linux" else "linux"
    misfits = {
        "another GPU": (elsewhere, installed, Target(backend, short, (elsewhere.capability,), *here)),
        "another version": (gpu, "9.9.9", Target(backend, "9.9", (gpu.capability,), *here)),
        "another system": (gpu, installed, Target(backend, short, (gpu.capability,), system, machine.arch)),
    }
    with temporary_folder("selfcheck") as folder:
        copy = Path(shutil.copyfile(subject.path, folder / subject.path.name))
        for built_on, built_by, target in misfits.values():
            details = EngineDetails(built_by, built_on, BatchRange(), {}, {}, "mge-bench --selfcheck")
            plans = {graph.name: b"no engine" for graph in subject.manifest.graphs}
            add_engine(copy, target.name, plans, details.to_dict(), manifest_sha256=subject.manifest_sha256)
        with Bundle.open(copy) as bundle:
            problems = {found.target: found.problem for found in find_engines(bundle, machine, gpu, cache=False)}
    lines: dict[str, JsonValue] = {what: problems[target.name] for what, (*_, target) in misfits.items()}
    failures = [f"engines for {what} are not refused" for what, line in lines.items() if line is None]
    where = "" if subject.machine.gpus else f"on {gpu}, a stand-in where there is no GPU: "
    return Result.of(failures, where + "; ".join(f"{what}: {line}" for what, line in lines.items()), lines)


def _defect(error: Exception) -> str:
    """The error and where it was raised, without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
