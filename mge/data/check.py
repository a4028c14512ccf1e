"""Problems of a training set, found before the first epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from mge_runtime.decode import check_header
from mge_runtime.errors import InputError
from mge_runtime.files import file_sha256
from mge_runtime.machine import cpu_count

LISTED = 10  # problems in a message
FEW = 2000  # images, for which starting processes would take longer than looking at them
TAIL = 64  # bytes at the end of a file; with its length they tell nearly all images apart

Samples = Sequence[tuple[Path, int]]


def check_images(
    splits: Mapping[str, Samples], classes: Sequence[str], max_pixels: int, say: Callable[[str], None]
) -> None:
    """Look at the header of every image, at copies and at the number of images of each class.

    Args:
        splits: "train" and "val", paths with class indices.
        classes: names by class index.
        max_pixels: the most that an image may have.
        say: is told what is doubtful, and the problems where there are several, a line each.

    Raises:
        InputError: images cannot be read, or a class has none to train on.
    """
    samples = [(split, path, label) for split, images in splits.items() for path, label in images]
    look = partial(_look, max_pixels=max_pixels)
    paths = [path for _, path, _ in samples]
    if len(paths) < FEW:
        looks = list(map(look, paths))
    else:
        with ProcessPoolExecutor(cpu_count()) as pool:
            looks = list(pool.map(look, paths, chunksize=FEW // 10))
    alike: dict[bytes, list[tuple[str, Path, int]]] = {}
    for sample, seen in zip(samples, looks, strict=True):
        if isinstance(seen, bytes):
            alike.setdefault(seen, []).append(sample)
    _tell(list(_copies(alike.values(), classes)), say)
    counts = Counter(label for _, label in splits["train"])
    if single := [name for label, name in enumerate(classes) if counts[label] == 1]:
        say(f"{len(single)} of {len(classes)} classes have one image to train on: {_some(single)}")
    problems = [seen for seen in looks if isinstance(seen, str)]
    if missing := [name for label, name in enumerate(classes) if not counts[label]]:
        problems.append(f"{len(missing)} of {len(classes)} classes have no image to train on: {_some(missing)}")
    if len(problems) > 1:
        _tell(problems, say)
        raise InputError(f"found {len(problems)} problems in {len(samples)} images; expected none: {problems[0]}")
    if problems:
        raise InputError(problems[0])


def _look(path: Path, max_pixels: int) -> str | bytes:
    """What is wrong with an image; what tells its file from others where that is nothing."""
    try:
        check_header(path, max_pixels)
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(size - TAIL, 0))
            return size.to_bytes(8, "big") + file.read()
    except (InputError, OSError) as error:
        return str(error)


def _copies(groups: Iterable[list[tuple[str, Path, int]]], classes: Sequence[str]) -> Iterable[str]:
    """A line for each image that lies in two splits or is of two classes."""
    for group in groups:
        if len({(split, label) for split, _, label in group}) == 1:
            continue
        first: dict[str, tuple[str, Path, int]] = {}
        for split, path, label in group:
            other, place, known = first.setdefault(file_sha256(path), (split, path, label))
            if (other, known) != (split, label):
                where = f"in {other} and in {split}" if other != split else ""
                what = f"of class {classes[known]!r} and of {classes[label]!r}" if known != label else ""
                yield f"{place} and {path} are the same image, {' and '.join(filter(None, (where, what)))}"


def _tell(lines: Sequence[str], say: Callable[[str], None]) -> None:
    for line in islice(lines, LISTED):
        say(line)
    if (more := len(lines) - LISTED) > 0:
        say(f"... and {more} more")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
