"""Labelled images in class folders: which there are, what they hold, and how one folder serves two purposes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mge_runtime import sources
from mge_runtime.errors import InputError
from mge_runtime.files import file_sha256
from mge_runtime.machine import cpu_count

__all__ = ["LabelledImage", "data_sha256", "list_labelled", "short_digest", "split_by_content", "without"]


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


def list_labelled(
    folder: Path, class_names: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> tuple[Path, list[LabelledImage]]:
    """List the images of `folder/<class>/...`, or of the validation folder in it: training never learns from that.

    A class without a folder has no images. Of files with the same bytes the first by name is taken: a copy is no
    further observation.

    Returns:
        The folder that holds the class folders, and the images, sorted by class and path.

    Raises:
        InputError: as for `sources.list_labelled`, or one image is in the folders of two classes.
    """
    split = sources.validation_folder(folder)
    root = folder if split is None or split.name in class_names else split
    _, samples = sources.list_labelled(root, class_names, say)
    named = [(path.relative_to(root).as_posix(), path, label) for path, label in samples]
    with ThreadPoolExecutor(cpu_count()) as pool:
        hashes = list(pool.map(_content_sha256, (path for _, path, _ in named)))
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
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _content_sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        # Decoding reports what is wrong with it; until then it is told from others by its name.
        return hashlib.sha256(f"unreadable:{path}".encode()).hexdigest()
