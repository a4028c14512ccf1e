"""Class names from a text file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mge_runtime.errors import CheckpointError

__all__ = ["read_labels"]

_EXPECTED = "expected a UTF-8 text file with one class name a line"


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names, one a line, in the order of the class indices.

    Spaces around a name and empty lines at the end do not count. Where *every* line begins with its own number, counted
    from 0 or 1, as in CUB-200-2011's `classes.txt` ("1 001.Black_footed_Albatross"), the number is left out.

    Raises:
        CheckpointError: the file is missing, no file, no text or empty, or a name is empty or stands there twice.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise CheckpointError(f"cannot read the labels {path}: it is a folder, a pipe or a device; {_EXPECTED}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"cannot read the labels {path}: {error.strerror}; {_EXPECTED}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the labels {path} are not UTF-8 text; {_EXPECTED}") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    if not names or "\0" in text:
        raise CheckpointError(f"the labels {path} hold no names; {_EXPECTED}")
    names = _without_numbers(names)
    seen: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name:
            raise CheckpointError(f"the labels {path} have no name on line {line}; {_EXPECTED}")
        if name in seen:
            raise CheckpointError(
                f"the labels {path} name {name!r} on lines {seen[name]} and {line}; expected names that differ"
            )
        seen[name] = line
    return tuple(names)


def _without_numbers(names: list[str]) -> list[str]:
    pairs = [re.fullmatch(r"(\d+)\s+(.+)", name) for name in names]
    numbered = [(int(pair[1]), pair[2]) for pair in pairs if pair is not None]
    start = numbered[0][0] if numbered else 0
    counts_up = [number for number, _ in numbered] == list(range(start, start + len(names)))
    return [name for _, name in numbered] if counts_up and start in (0, 1) else names
