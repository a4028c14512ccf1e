"""The report of a self-check: what was checked, where, with what; as text, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from mge_runtime.machine import Machine
from mge_runtime.selfcheck.check import Check

__all__ = ["Report"]

_MARKS = {"passed": "passed ", "failed": "FAILED ", "not run": "not run"}


@dataclass(frozen=True)
class Report:
    """Everything that whoever reads a posted report needs to know."""

    bundle: str  # name of the file
    manifest_sha256: str
    targets: tuple[str, ...]  # that the bundle holds engines for
    precision: str  # "fp32", "fp16", or several
    backend: str  # what was checked
    device: str
    images: str  # what it was checked with
    limits: str  # where the limits come from
    machine: Machine
    checks: tuple[Check, ...]
    mge: str = ""  # version
    date: str = ""  # UTC

    @classmethod
    def now(cls, **values: Any) -> Report:
        """A report of this version of mge, at this moment."""
        return cls(**values, mge=version("mge"), date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC")

    @property
    def failed(self) -> bool:
        """Whether a check failed. What was not run has neither passed nor failed."""
        return any(check.outcome == "failed" for check in self.checks)

    @property
    def verdict(self) -> str:
        """For example "6 passed, 0 failed, 2 not run"."""
        return ", ".join(
            f"{sum(check.outcome == outcome for check in self.checks)} {outcome}"
            for outcome in ("passed", "failed", "not run")
        )

    def to_json(self) -> str:
        """All of it."""
        values = {**asdict(self), "verdict": self.verdict}
        return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_text(self) -> str:
        """For a terminal."""
        lines = [f"{name:<9}{value}" for name, value in self._facts()]
        for check in self.checks:
            lines += ["", f"{_MARKS[check.outcome]}  {check.name}", f"         {check.found}"]
            if check.outcome == "failed":
                lines.append(f"         expected: {check.expected}")
        return "\n".join([*lines, "", self.verdict, ""])

    def to_markdown(self) -> str:
        """For an issue."""
        lines = [f"### mge-bench --selfcheck: {self.verdict}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in self._facts()]
        lines += ["", "| check | outcome | found | expected |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(check.name)} | {_outcome(check)} | {_cell(check.found)} | {_cell(check.expected)} |"
            for check in self.checks
        ]
        return "\n".join([*lines, ""])

    def _facts(self) -> Sequence[tuple[str, str]]:
        machine = self.machine
        gpus = [f"cuda:{number} {gpu}, {gpu.memory / 1e9:.1f} GB" for number, gpu in enumerate(machine.gpus)]
        board = [machine.board] if machine.board else []
        driver = [f"driver for CUDA {machine.driver_cuda}"] if machine.driver_cuda else []
        libraries = [f"{name} {found}" for name, found in machine.libraries.items()]
        libraries += [f"{name} broken" for name in machine.broken]
        here = [*board, machine.platform, f"Python {machine.python}", *(gpus or ["no GPU"]), *driver]
        return (
            ("date", self.date),
            ("mge", self.mge),
            ("bundle", f"{self.bundle}, manifest {self.manifest_sha256}, {self.precision}"),
            ("engines", ", ".join(self.targets) or "none in the bundle"),
            ("checked", f"{self.backend} on {self.device}"),
            ("images", self.images),
            ("limits", self.limits),
            ("machine", ", ".join(here)),
            ("with", ", ".join(libraries)),
        )


def _outcome(check: Check) -> str:
    return "**failed**" if check.outcome == "failed" else check.outcome


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
