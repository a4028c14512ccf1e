"""What `mge-bench` prints: text, Markdown for an issue, and JSON with every number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mge_runtime.bench.report_tables import report_tables
from mge_runtime.bench.results import Results
from mge_runtime.bench.tables import markdown_row

__all__ = ["BenchReport"]


class BenchReport:
    """The report of one run."""

    def __init__(self, results: Results) -> None:
        self.results = results

    @property
    def failed(self) -> bool:
        """Whether nothing was measured."""
        return not self.results.batches

    @property
    def warnings(self) -> list[str]:
        """Why some figures are not to be trusted, by section."""
        found = self.results
        sections = [(f"batch {batch.batch}", batch.noise) for batch in found.batches]
        sections += [("pipelined", found.pipelined.noise)] if found.pipelined is not None else []
        sections += [("fresh processes", found.fresh.noise)] if found.fresh is not None else []
        return [f"{section}: {noise.warning}" for section, noise in sections if noise.warning]

    def to_json(self) -> str:
        """All of it, for scripts; see docs/performance.md for what each name means."""
        values: dict[str, Any] = asdict(self.results)
        if (pipelined := self.results.pipelined) is not None:
            values["pipelined"] |= {"ratio": asdict(pipelined.ratio), "total_ratio": pipelined.total_ratio}
        if (fresh := self.results.fresh) is not None:
            values["fresh"] |= fresh.summary()
        if (energy := self.results.energy) is not None:
            values["energy"]["joules_per_image"] = energy.joules_per_image
        values["warnings"] = self.warnings
        return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"

    def to_text(self) -> str:
        """For a terminal."""
        lines = [f"{name:<9}{value}" for name, value in self._facts()]
        for table in report_tables(self.results):
            lines += ["", *table.text()]
        lines += ["", *(f"WARNING: {warning}" for warning in self.warnings)] if self.warnings else []
        return "\n".join([*lines, ""])

    def to_markdown(self) -> str:
        """For an issue."""
        lines = [f"### mge-bench: {self.results.bundle.arch}, {self._where()}", "", "| | |", "|---|---|"]
        lines += [markdown_row(fact) for fact in self._facts()]
        lines += ["", *(f"**{warning}**" for warning in self.warnings), ""] if self.warnings else [""]
        for table in report_tables(self.results):
            lines += table.markdown()
        return "\n".join(lines)

    def _where(self) -> str:
        return f"{self.results.backend} on {self.results.device}"

    def _facts(self) -> Sequence[tuple[str, str]]:
        found = self.results
        bundle, cpu = found.bundle, found.cpu
        computing = f", {found.threads} threads" if found.threads is not None else ""
        speed = f", {cpu.mhz:.0f} MHz now" if cpu.mhz is not None else ""
        governor = f", governor {cpu.governor}" if cpu.governor else ", governor unknown"
        stopped = f"it was interrupted during {found.interrupted}; what was measured before is here"
        calibrated = "; the bundle is calibrated, exits are not taken" if bundle.calibrated else ""
        return (
            *([] if found.interrupted is None else [("PARTIAL", stopped)]),
            ("date", found.date),
            ("mge", found.mge),
            ("bundle", f"{bundle.name}, manifest {bundle.manifest_sha256}, {bundle.precision}"),
            (
                "model",
                f"{bundle.arch}, {bundle.experts} experts, {bundle.image_size} px, {bundle.classes} classes",
            ),
            ("ran", f"{self._where()} {found.library}{computing}; the whole chain (exit never){calibrated}"),
            ("images", found.images),
            ("cpu", f"{cpu.model or 'unknown'}, processors for this process: {cpu.processors}{speed}{governor}"),
            ("machine", found.machine.summary),
            ("with", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        )


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return value.name
    raise TypeError(f"{type(value).__name__} is no plain value")
