"""Labelled images in class folders: which there are, what they hold, and how one folder serves two purposes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mge_runtime.cpus import cpu_count
from mge_runtime.errors import InputError
from mge_runtime.sources import find_images

__all__ = ["LabelledImage", "data_sha256", "list_labelled", "short_digest", "split_by_content", "without"]

_SPLIT = "val"  # of DIR/<split>/<class>/*: the part that training chooses settings on, never learns from


@dataclass(frozen=True)
class LabelledImage:
    """One image and the class that its folder names."""

    name: str  # relative to the folder, "/" between its parts
    path: Path
    label: int  # class index of the bundle
    sha256: str  # of the file


def short_digest(sha256: str) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256: what records tell images apart by."""
    return sha256[:16]


def list_labelled(folder: Path, class_names: Sequence[str]) -> tuple[Path, list[LabelledImage]]:
    """List the images of `folder/<class>/...`, or of `folder/val/<class>/...` where there is a `val`.

    A class without a folder has no images. Of files with the same bytes the first by name is taken: a copy is no
    further observation.

    Returns:
        The folder that holds the class folders, and the images, sorted as people count.

    Raises:
        InputError: no such folder, one that cannot be listed, no image in it, images outside class folders, a class
            folder that the bundle does not know, or one image in the folders of two classes.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputError(f"{folder} is {found}; expected a folder with labelled images, DIR/<class>/*.jpg")
    root = folder / _SPLIT if (folder / _SPLIT).is_dir() and _SPLIT not in class_names else folder
    images, problems = find_images([str(root)])
    if problems:
        raise problems[0]
    labels = {name: index for index, name in enumerate(class_names)}
    named: list[tuple[str, Path, int]] = []
    for path in (image.path for image in images if image.path is not None):
        parts = path.relative_to(root).parts
        if len(parts) == 1:
            raise InputError(
                f"{path} lies in no class folder; expected DIR/<class>/{parts[0]}: sort the images by class"
            )
        if parts[0] not in labels:
            raise InputError(
                f"{root} holds class {parts[0]!r}, which is not among the bundle's {len(labels)} classes; "
                f"expected folders named like them, such as {class_names[0]!r}"
            )
        named.append(("/".join(parts), path, labels[parts[0]]))
    with ThreadPoolExecutor(cpu_count()) as pool:
        hashes = list(pool.map(_file_sha256, (path for _, path, _ in named)))
    unique: dict[str, LabelledImage] = {}
    for (name, path, label), sha256 in zip(named, hashes, strict=True):
        first = unique.setdefault(sha256, LabelledImage(name, path, label, sha256))
        if first.label != label:
            raise InputError(
                f"{root} holds one image in two classes, {first.name} and {name} are the same bytes; expected it "
                "in the folder of its own class alone: remove the other"
            )
    return root, list(unique.values())


def without(images: Iterable[LabelledImage], others: Iterable[LabelledImage]) -> list[LabelledImage]:
    """Those whose bytes are not among `others`."""
    known = {image.sha256 for image in others}
    return [image for image in images if image.sha256 not in known]


def split_by_content(
    images: Sequence[LabelledImage], share: float, seed: int
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Split by a seeded hash of each file's bytes: the same image always falls on the same side, whatever its name.

    Args:
        images: to split, in any order.
        share: of the first part, in (0, 1), to one image.
        seed: another one gives another split.

    Returns:
        Both parts, in the order of `images`.
    """
    ranks = {image.sha256: hashlib.sha256(f"{seed}:{image.sha256}".encode()).digest() for image in images}
    first = set(sorted(ranks, key=ranks.__getitem__)[: round(share * len(ranks))])
    return [i for i in images if i.sha256 in first], [i for i in images if i.sha256 not in first]


def data_sha256(images: Iterable[LabelledImage]) -> str:
    """SHA-256 over the names and file hashes, sorted by name: 64 hexadecimal digits."""
    lines = sorted(f"{image.name}\0{image.sha256}\n" for image in images)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        # Decoding reports what is wrong with it; until then it is told from others by its name.
        return hashlib.sha256(f"unreadable:{path}".encode(errors="surrogateescape")).hexdigest()
