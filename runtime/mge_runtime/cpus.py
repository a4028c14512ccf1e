"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpu_count"]


def cpu_count() -> int:
    """Processors this process may use: its affinity, capped by the control group's quota (Linux, version 2)."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return count
