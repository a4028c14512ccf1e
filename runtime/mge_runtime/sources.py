"""From what the user names on the command line to the list of images."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mge_runtime.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "SAVED_SUFFIX", "STDIN", "NamedImage", "find_images"]

STDIN = "-"
_STDIN_NAME = "standard input"
SAVED_SUFFIX = ".mge.png"  # of the pictures that `mge-run --save` draws; in a folder these are no images to answer

# What counts as an image inside a folder. HEIC is not decoded, but said to be so rather than passed over.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".webp", ".tif", ".tiff", ".jp2"}
    | {".avif", ".heic", ".heif"}
)


class _StandardInput(bytes):
    """The bytes of one picture; decoding errors call them by this name."""

    name = _STDIN_NAME


@dataclass(frozen=True)
class NamedImage:
    """One image to answer."""

    name: str  # as shown to the user
    path: Path | None  # None: the bytes of one picture on standard input

    def source(self) -> Path | bytes:
        """What `decode_image` takes; reads standard input to its end where that is the image.

        Raises:
            InputError: standard input is closed or cannot be read.
        """
        if self.path is not None:
            return self.path
        _require_stdin()
        try:
            return _StandardInput(sys.stdin.buffer.read())
        except OSError as error:  # a stream open for writing alone, for example
            raise InputError(
                f"cannot read {_STDIN_NAME}: {error.strerror}; expected the bytes of one picture"
            ) from error


def _require_stdin() -> None:
    stdin: object = sys.stdin  # None where the process was started without one
    if stdin is None or sys.stdin.closed:
        raise InputError(f"cannot read {_STDIN_NAME}: it is closed; expected the bytes of one picture, pipe them in")


def find_images(names: Iterable[str]) -> tuple[list[NamedImage], list[InputError]]:
    """List the images behind files, folders, glob patterns and `-`.

    A file is taken whatever its suffix, and even if it is missing (decoding then says so). A folder is searched with
    its subfolders, links followed, for `IMAGE_SUFFIXES`; what begins with "." or ends with `SAVED_SUFFIX` is passed
    over. A pattern that the shell left alone (`*`, `?`, `[`, `**`) is expanded here. `-` is one picture's bytes on
    standard input. Folders and patterns are sorted as people count (2 before 10); an image named twice is taken once.

    Returns:
        The images in the order named, and one error for each name behind which there is nothing.
    """
    images: dict[str, NamedImage] = {}
    problems: list[InputError] = []
    for name in names:
        try:
            found = _expand(name)
        except InputError as problem:
            problems.append(problem)
            continue
        for image in found:
            images.setdefault(STDIN if image.path is None else os.path.normpath(image.path.absolute()), image)
    return list(images.values()), problems


def _expand(name: str) -> list[NamedImage]:
    if name == STDIN:
        _require_stdin()
        return [NamedImage(_STDIN_NAME, None)]
    path = Path(name)
    if path.is_dir():
        found, others = _search(path)
        if not found:
            held = f"{others} other file{'s' * (others != 1)}" if others else "nothing"
            raise InputError(f"no image in the folder {path}: it holds {held}; expected files such as .jpg or .png")
        return found
    if glob.has_magic(name) and not os.path.lexists(path):
        found = _match(name)
        if not found:
            raise InputError(f"no image matches {name}; expected a pattern such as 'photos/*.jpg', check the path")
        return found
    return [NamedImage(name, path)]


def _match(pattern: str) -> list[NamedImage]:
    """Expand a pattern; like the shell it may match folders, which are searched unless the pattern itself goes deep."""
    found: list[NamedImage] = []
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
    for path in map(Path, sorted(matches, key=_natural)):
        if path.is_file():
            found.append(NamedImage(str(path), path))
        elif "**" not in pattern:
            found += _search(path)[0]
    return found


def _search(folder: Path) -> tuple[list[NamedImage], int]:
    """Find the images of a folder and its subfolders; also count the other files."""
    files: list[Path] = []
    others = 0
    entered: set[str] = set()

    def fail(error: OSError) -> None:
        raise InputError(
            f"cannot list the folder {error.filename}: {error.strerror}; expected one that may be read"
        ) from error

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in entered:  # a link that leads back up
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".") and not name.endswith(SAVED_SUFFIX)]
        images = [Path(parent, name) for name in visible if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        others += len(visible) - len(images)
        files += images
    return [NamedImage(str(path), path) for path in sorted(files, key=lambda path: _natural(str(path)))], others


def _natural(path: str) -> list[tuple[list[tuple[int, str]], str]]:
    """Sort key: folder by folder, numbers by value, letters without case."""
    return [
        ([(int(part), "") if part.isdecimal() else (-1, part.casefold()) for part in re.split(r"(\d+)", name)], name)
        for name in Path(path).parts
    ]
