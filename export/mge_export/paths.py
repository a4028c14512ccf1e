"""The files and folders that an export is given, checked before PyTorch is loaded, which takes seconds."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mge_runtime.errors import InputError, OutputError
from mge_runtime.files import check_writable
from mge_runtime.sources import is_folder

__all__ = ["check_folder", "check_output"]


def check_folder(folder: Path, option: str) -> None:
    """Refuse what is no folder.

    Raises:
        InputError: it is missing or a file.
    """
    if not is_folder(folder):
        found = (
            f"{folder} is a file, expected a folder" if os.path.lexists(folder) else f"no folder {folder}; expected one"
        )
        raise InputError(f"{found} of images such as .jpg: name another with {option}")


def check_output(path: Path) -> None:
    """Find out before the work, not after it, that a place cannot be written.

    Raises:
        OutputError: it cannot.
    """
    folder = path.parent
    with suppress(OSError):  # check_writable says it
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder; expected a file name, such as {path / 'mge.plan'}")
        if folder.is_file():
            raise OutputError(f"cannot write {path}: {folder} is a file, expected a folder; name another with -o")
        if not folder.is_dir():
            raise OutputError(f"cannot write {path}: no folder {folder}; make it or name another place with -o")
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write {path}: it is a device or a pipe; expected a file name")
    check_writable(path)
