"""What one check says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mge_runtime.fields import JsonValue

__all__ = ["Check", "Outcome", "judged", "not_run"]

Outcome: TypeAlias = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Check:
    """One check: what was found, and what was expected."""

    name: str
    outcome: Outcome  # "not run" is neither passed nor failed; `found` is the reason then
    found: str
    expected: str
    numbers: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])  # what was measured


def judged(
    name: str, failures: list[str], found: str, expected: str, numbers: Mapping[str, JsonValue] | None = None
) -> Check:
    """A check that ran: passed if nothing failed.

    Args:
        name: of the check.
        failures: everything that is not as expected, one line each.
        found: what was found, for a check that passed.
        expected: what was expected.
        numbers: what was measured.
    """
    return Check(name, "failed" if failures else "passed", "; ".join(failures) or found, expected, numbers or {})


def not_run(name: str, reason: str, expected: str) -> Check:
    """A check that did not run."""
    return Check(name, "not run", reason, expected)
