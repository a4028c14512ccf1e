"""Where mge keeps what can be made again: engines, measured kernels."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """$MGE_CACHE_DIR, else the user's cache folder."""
    if chosen := os.environ.get("MGE_CACHE_DIR"):
        return Path(chosen)
    if chosen := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(chosen) / "mge"
    try:
        return Path.home() / ".cache" / "mge"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"mge-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
