"""The progress of a build on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mge_runtime.interrupt import Interrupt

if TYPE_CHECKING:
    from mge_runtime.trt.build import GraphProgress

__all__ = ["shown_progress"]


def shown_progress(interrupt: Interrupt) -> GraphProgress:
    """What shows the progress of a build on a terminal, and stops the build where a signal asks for it."""
    terminal = sys.stderr.isatty()
    shown = ""

    def progress(graph: str, share: float, phase: str) -> bool:
        nonlocal shown
        text = f"{graph}: {share:4.0%} {phase}"[:79]
        if terminal and text != shown:
            shown = text
            click.echo(f"\r\x1b[K{text}\r", nl=False, err=True)
        return not interrupt.requested

    return progress
