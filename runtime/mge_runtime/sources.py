"""The one lister of images, for inference, training and calibration alike: from what the user names to files."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from mge_runtime.errors import InputError

STDIN = "-"
_STDIN_NAME, _STDIN_PATH = "standard input", Path("/dev/stdin")
SAVED_SUFFIX = ".mge.png"  # of what `mge-run --save` draws; in a folder these are no images to predict
VALIDATION_FOLDERS = ("val", "valid", "validation")
MAX_BYTES = 1_000_000_000  # of what is read from a stream, or looked at as a whole
MAX_PIXELS = 65_000_000  # an image of the costliest kind, 30 bytes a pixel, is decoded within 2 GB

# What counts as an image inside a folder. HEIC and JPEG 2000 are not decoded, but said to be so, not passed over.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".webp", ".tif", ".tiff", ".jp2"}
    | {".avif", ".heic", ".heif"}
)
# Folders of copies that macOS (in ZIP archives) and Synology keep beside images; no more visible there than a dot file.
_HIDDEN_FOLDERS = frozenset({"__MACOSX", "@eaDir"})


class _StandardInput(bytes):
    """The bytes of one image; decoding errors call them by this name."""

    name = _STDIN_NAME


@dataclass(frozen=True)
class NamedImage:
    """One image to predict."""

    name: str  # as shown to the user
    path: Path  # `_STDIN_PATH`: the bytes of one image on standard input

    def source(self) -> Path | bytes:
        """What `decode_image` takes; reads standard input to its end where that is the image.

        Raises:
            InputError: standard input is closed, cannot be read or holds more than `MAX_BYTES`.
        """
        return _StandardInput(_read_stdin("the bytes of one image")) if self.path == _STDIN_PATH else self.path


@dataclass
class ImageList:
    """Images, what could not be listed, and how much was passed over."""

    images: list[NamedImage] = field(default_factory=list["NamedImage"])
    # A name or a folder, and why there is nothing behind it.
    problems: list[tuple[str, InputError]] = field(default_factory=list[tuple[str, InputError]])
    passed_over: Counter[str] = field(default_factory=Counter[str])  # by reason, as "hidden"

    def add(self, other: ImageList) -> None:
        """Take over what another list holds."""
        self.images += other.images
        self.problems += other.problems
        self.passed_over += other.passed_over

    def whole(self) -> list[NamedImage]:
        """The images, where nothing stood in the way.

        Raises:
            InputError: the first of `problems`.
        """
        if self.problems:
            raise self.problems[0][1]
        return self.images

    def note(self) -> str | None:
        """One line about what was passed over; None where that was nothing."""
        total = sum(self.passed_over.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.passed_over.items()))
        return f"passed over {total} file{'s' * (total != 1)}: {reasons}" if total else None


def find_images(names: Iterable[str], files_from: str | None = None) -> ImageList:
    """List the images behind files, folders, glob patterns, lists of paths and `-`.

    A file is taken whatever its suffix, and even if it is missing (decoding then says so); a folder is searched by
    `list_folder`. A pattern that the shell left alone (`*`, `?`, `[`, `**`) is expanded here, and sorted as people
    count (2 before 10). `@FILE` names a list of files and folders, one a line, or ended by NUL as `find -print0` does.
    `-` is one image's bytes on standard input. An image named twice is taken once.

    Args:
        names: what the user named.
        files_from: one more list; "-": on standard input.

    Returns:
        The images in the order named, and one problem for each name behind which there is nothing.
    """
    found = _gather(names, _expand)
    if files_from is not None:
        found.add(_gather([files_from], _expand_list))
    images: dict[str, NamedImage] = {}
    for image in found.images:
        images.setdefault(os.path.normpath(image.path.absolute()), image)
    found.images = list(images.values())
    return found


def _gather(names: Iterable[str], expand: Callable[[str], ImageList]) -> ImageList:
    """What is found behind each name; a problem with one costs no image of the others."""
    total = ImageList()
    for name in names:
        try:
            total.add(expand(name))
        except InputError as problem:
            total.problems.append((name, problem))
    return total


def list_folder(folder: Path) -> ImageList:
    """List the images of a folder and its subfolders: regular files with one of `IMAGE_SUFFIXES` in any case.

    Links are followed, and a folder is entered once, so that loops end. Passed over and counted is what is hidden (a
    leading dot, `__MACOSX`, `@eaDir`), has another suffix, was drawn by `mge-run --save`, is a pipe, socket or device,
    or a link to nothing. A subfolder that cannot be listed is a problem; the rest is listed.

    Returns:
        The images, sorted folder by folder as people count; that there is none is a problem, too.
    """
    found = _search(folder)
    if not found.images and not found.problems:
        held = found.note() or "it holds nothing"
        problem = InputError(f"no image in the folder {folder}: {held}; expected files such as .jpg or .png")
        found.problems.append((str(folder), problem))
    return found


def _search(folder: Path) -> ImageList:
    found, paths = ImageList(), list[str]()
    folders, links = [str(folder)], list[str]()
    entered: set[tuple[int, int]] = set()
    while folders or links:
        place = (folders or links).pop()  # links last: an image has the name that needs none
        try:
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            inside, files = _scan(place, found.passed_over)
        except OSError as error:
            found.problems.append((place, _unlisted(place, error)))
            continue
        for entry in inside:
            (links if entry.is_symlink() else folders).append(entry.path)
        paths += files
    found.images = [NamedImage(path, Path(path)) for path in sorted(paths, key=_natural)]
    return found


def _unlisted(folder: str | Path, error: OSError) -> InputError:
    return InputError(f"cannot list the folder {folder}: {error.strerror}; expected one that may be read")


def _scan(place: str, passed_over: Counter[str]) -> tuple[list[os.DirEntry[str]], list[str]]:
    """Subfolders and images of one folder, sorted by name; what is neither is counted."""
    folders: list[os.DirEntry[str]] = []
    images: list[str] = []
    with os.scandir(place) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                folder, file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, or into a folder that is closed to us
                folder = file = False
            if entry.name.startswith(".") or entry.name in _HIDDEN_FOLDERS:
                passed_over["hidden"] += 1
            elif folder:
                folders.append(entry)
            elif entry.name.endswith(SAVED_SUFFIX):
                passed_over["drawn by mge-run --save"] += 1
            elif Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
                passed_over["with another suffix"] += 1
            elif file:
                images.append(entry.path)
            else:
                passed_over["a link to nothing" if entry.is_symlink() else "a pipe, socket or device"] += 1
    return folders, images


def list_labeled(
    folder: Path, classes: Sequence[str] | None = None, say: Callable[[str], None] = lambda _: None
) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """List the images of `folder/<class>/...` with the index of their class.

    Args:
        folder: holds the class folders, each searched by `list_folder`.
        classes: names that are known; a class without images is allowed then. None: the folders are the classes.
        say: is told once what was passed over.

    Returns:
        The classes, sorted unless they were given, and the images, sorted by class and path.

    Raises:
        InputError: there is no such folder or no image in it, one cannot be listed, a name is no text, an image lies
            outside of the class folders, or a class is unknown; without `classes` also where there are fewer than two,
            or one has no image.
    """
    require_folder(folder, f"a folder with labeled images, {folder}/<class>/*.jpg")
    passed_over: Counter[str] = Counter()
    try:
        entries, loose = _scan(str(folder), passed_over)
    except OSError as error:
        raise _unlisted(folder, error) from error
    if loose:
        raise InputError(f"{loose[0]} lies in no class folder; expected {folder}/<class>/: sort the images by class")
    names = tuple(entry.name for entry in entries)
    if classes is None and len(names) < 2:
        raise InputError(f"{folder} holds {len(names)} class folders; expected at least two, one for each class")
    known = {name: index for index, name in enumerate(names if classes is None else classes)}
    samples: list[tuple[Path, int]] = []
    for name in names:
        found = _search(folder / name)
        paths = sorted(image.path for image in found.whole())
        for path in paths or [folder / name]:
            shown = os.fsencode(path).decode(errors="backslashreplace")
            if shown != str(path):
                raise InputError(f"the name of {shown} is no text in UTF-8; expected one that is: rename it")
        if not paths and classes is None:
            raise InputError(
                f"the class folder {folder / name} holds no image; expected at least one: add some, or remove it"
            )
        if paths and name not in known:
            raise InputError(
                f"{folder} holds class {name!r}, which is not among the model's {len(known)} classes; "
                f"expected folders named like them, such as {next(iter(known))!r}"
            )
        samples += [(path, known[name]) for path in paths]
        passed_over += found.passed_over
    if not samples:
        raise InputError(f"no image in the class folders of {folder}; expected {folder}/<class>/*.jpg")
    if message := ImageList(passed_over=passed_over).note():
        say(f"{folder}: {message}")
    return tuple(known), sorted(samples, key=lambda sample: sample[1])


def validation_folder(data: Path) -> Path | None:
    """The folder of validation images inside a data folder, one of `VALIDATION_FOLDERS`; None where there is none.

    Raises:
        InputError: there are several.
    """
    found = [data / name for name in VALIDATION_FOLDERS if is_folder(data / name)]
    if len(found) > 1:
        raise InputError(f"{data} holds {found[0].name} and {found[1].name}; expected one folder to validate on")
    return found[0] if found else None


def is_folder(path: Path) -> bool:
    """Whether this is a folder; no for a name too long or behind a closed folder, where `Path.is_dir` raises."""
    return os.path.isdir(path)  # noqa: PTH112


def require_folder(folder: Path, expected: str) -> None:
    """Refuse what is no folder; `expected` says what it should be, and which option names it.

    Raises:
        InputError: it is missing or no folder.
    """
    if not is_folder(folder):
        found = f"{folder} is a file" if os.path.lexists(folder) else f"no folder {folder}"
        raise InputError(f"{found}; expected {expected}")


def is_url(name: str) -> bool:
    """Whether this is an address on the net, or an embedded image, rather than a path."""
    return re.match(r"(https?|ftp|s3|gs|file|data):", name, re.IGNORECASE) is not None


def _expand(name: str) -> ImageList:
    """What a name on the command line stands for."""
    if name == STDIN:
        _require_stdin("the bytes of one image")
        return ImageList([NamedImage(_STDIN_NAME, _STDIN_PATH)])
    if name.startswith("@") and not os.path.lexists(name):
        return _gather([name[1:]], _expand_list)
    if glob.has_magic(name) and not os.path.lexists(name) and not is_url(name):
        return _match(name)
    return _expand_path(name)


def _expand_path(name: str) -> ImageList:
    if not name:  # Path("") is the working folder
        raise InputError(
            "found an empty name where an image belongs; expected a file or a folder: is a variable unset?"
        )
    path = Path(name)
    return list_folder(path) if is_folder(path) else ImageList([NamedImage(name, path)])


def _expand_list(place: str) -> ImageList:
    return _gather(_read_list(place), _expand_path)


def _match(pattern: str) -> ImageList:
    """Expand a pattern; like the shell it may match folders, which are searched unless the pattern itself goes deep."""

    def expand(name: str) -> ImageList:
        path = Path(name)
        if not is_folder(path):
            return ImageList([NamedImage(str(path), path)])
        return ImageList() if "**" in pattern else _search(path)

    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
    found = _gather(sorted(matches, key=_natural), expand)
    if not found.images and not found.problems:
        raise InputError(f"no image matches {pattern}; expected a pattern such as 'photos/*.jpg', check the path")
    return found


def _read_list(place: str) -> list[str]:
    """Paths in a file or on standard input, one a line or each ended by NUL."""
    expected = "a list of image paths, one a line"
    if place == STDIN:
        data = _read_stdin(expected)
    else:
        try:
            path = Path(place)
            if not path.is_file():  # a pipe would be waited for, a device may never end
                what = "is no regular file" if path.exists() else "does not exist"
                raise InputError(f"cannot read the list {place}: it {what}; expected {expected}")
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the list {place}: {reason}; expected {expected}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")  # what Windows begins text files with
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    paths = [os.fsdecode(line) for line in lines if line.strip()]
    if not paths:
        raise InputError(f"the list {place} names nothing; expected {expected}")
    return paths


def _read_stdin(expected: str) -> bytes:
    _require_stdin(expected)
    return read_stream(sys.stdin.buffer, _STDIN_NAME, expected)


def read_stream(stream: BinaryIO, name: str, expected: str) -> bytes:
    """Read a stream to its end, which may never come.

    Raises:
        InputError: it cannot be read, yields no bytes, or holds more than `MAX_BYTES`.
    """
    try:
        data = cast(Any, stream.read(MAX_BYTES + 1))
    except (OSError, ValueError) as error:  # a stream open for writing alone, for example
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {name}: {reason}; expected {expected}") from error
    if not isinstance(data, bytes):
        raise InputError(f"cannot read {name}: it yields {type(data).__name__}; expected a file opened in binary mode")
    if len(data) > MAX_BYTES:
        raise InputError(f"cannot read {name}: it holds more than {MAX_BYTES:,} bytes; expected {expected}")
    return data


def _require_stdin(expected: str) -> None:
    stdin: object = sys.stdin  # None where the process was started without one
    if stdin is None or sys.stdin.closed:
        raise InputError(f"cannot read {_STDIN_NAME}: it is closed; expected {expected}, pipe them in")


def _natural(path: str) -> list[tuple[list[tuple[int, str]], str]]:
    """Sort key: folder by folder, numbers by value, letters without case."""

    def counted(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part.casefold()) for part in re.split(r"(\d+)", name)]

    return [(counted(name), name) for name in Path(path).parts]
