"""Labeled images, and which of them teach what: temperatures, and exits, whose images are new."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mge_runtime import sources
from mge_runtime.errors import InputError
from mge_runtime.files import file_sha256
from mge_runtime.layouts import find_list, relative_name
from mge_runtime.machine import cpu_count
from mge_runtime.manifest import Manifest

_LEAST_CLASSES = 1 / 2  # of the bundle's
_NAMED = 5  # classes in a message


@dataclass(frozen=True)
class LabeledImage:
    """One image and its class."""

    name: str  # relative to the data set, "/" between its parts
    path: Path
    label: int  # class index of the bundle; -1: of no class
    sha256: str  # of the file


@dataclass(frozen=True)
class Chosen:
    """Images to run, by what they may teach."""

    fitting: list[LabeledImage]  # temperatures; exits, too, where there is no folder for them alone
    testing: list[LabeledImage] | None  # exits alone; None: they are taken out of `fitting`
    folders: tuple[Path, Path]  # of the images for temperatures and for exits
    known: frozenset[str]  # digests of images that INT8 ranges were learned from: they set no exits


def short_digest(sha256: str) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256: what records tell images apart by."""
    return sha256[:16]


def list_labeled(
    folder: Path, class_names: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> tuple[Path, list[LabeledImage]]:
    """List the images of a data set's list or of `folder/<class>/...`, of the validation split where there are splits.

    Training never learns from that.
    A class without a folder has no images. Of files with the same bytes the first by name is taken: a copy is no
    further observation.

    Returns:
        The folder that holds the class folders (of a list: what names the split), and the images, by class and path.

    Raises:
        InputError: as for `sources.list_labeled` and `LabeledList.labeled`, or one image is of two classes.
    """
    if (listed := find_list(folder)) is not None:
        say(str(listed))
        root, base = folder / "val" if "val" in listed.splits else folder, listed.root
        samples = listed.labeled("val", class_names, say)
    else:
        split = sources.validation_folder(folder)
        root = base = folder if split is None or split.name in class_names else split
        _, samples = sources.list_labeled(root, class_names, say)
    with ThreadPoolExecutor(cpu_count()) as pool:
        hashes = list(pool.map(_content_sha256, (path for path, _ in samples)))
    unique: dict[str, LabeledImage] = {}
    for (path, label), sha256 in zip(samples, hashes, strict=True):
        name = relative_name(path, base)
        first = unique.setdefault(sha256, LabeledImage(name, path, label, sha256))
        if first.label != label:
            raise InputError(
                f"{root} holds one image in two classes, {first.name} and {name} are the same bytes; expected it "
                "in its own class alone: remove the other"
            )
    return root, list(unique.values())


def list_unknown(folder: Path) -> list[LabeledImage]:
    """List images of no class, label -1, in a folder and its subfolders; of files with the same bytes the first.

    Raises:
        InputError: there are none.
    """
    sources.require_folder(folder, "a folder of images of no class (--reject-data)")
    listed = sources.list_folder(folder)
    if listed.problems:
        raise listed.problems[0][1]
    with ThreadPoolExecutor(cpu_count()) as pool:
        hashes = pool.map(_content_sha256, (image.path for image in listed.images))
    images = [LabeledImage(i.name, i.path, -1, sha256) for i, sha256 in zip(listed.images, hashes, strict=True)]
    return list({image.sha256: image for image in reversed(images)}.values())[::-1]


def choose_images(data: Path, exit_data: Path | None, manifest: Manifest, say: Callable[[str], None]) -> Chosen:
    """List the images of one folder or of two.

    Args:
        data: labeled images.
        exit_data: others for the exits; None: a part of `data`.
        manifest: of the bundle.
        say: is told what is noteworthy, a line each.

    Raises:
        InputError: a folder without usable images, with too few of the bundle's classes, or without any image that the
            exits may use.
    """
    known = int8_digests(manifest)
    root, images = _listed(data, manifest, say)
    exit_root, exit_images = (root, images) if exit_data is None else _listed(exit_data, manifest, say)
    # The part of a data set that training chooses its checkpoint and box thresholds on.
    if exit_root.name in sources.VALIDATION_FOLDERS and len(manifest.graphs) > 1:
        say(
            f"exits are set by {exit_root}: if checkpoint or box thresholds were chosen on these images, as mge-train "
            "does, the guarantee does not hold; name images that no choice has seen with --exit-data"
        )
    fitting = set() if exit_data is None else {image.sha256 for image in images}
    others = [image for image in exit_images if image.sha256 not in fitting]
    unused = [image for image in others if short_digest(image.sha256) not in known]
    if shared := len(exit_images) - len(others):
        say(f"{shared} of {len(exit_images)} images in {exit_root} are also in {root}: they set no exits")
    if used := len(others) - len(unused):
        say(f"{used} of {len(exit_images)} images in {exit_root} taught INT8: they set no exits")
    if exit_data is None:
        return Chosen(images, None, (root, root), known)
    if not unused:
        raise InputError(
            f"every image in {exit_root} is also in {root}" + (" or taught INT8" if used else "") + "; exits need "
            "images other than those that set the temperatures"
        )
    return Chosen(images, unused, (root, exit_root), known)


def int8_digests(manifest: Manifest) -> frozenset[str]:
    """Digests of the images that INT8 ranges were learned from, as far as the manifest tells them."""
    found: set[str] = set()
    for plan in manifest.precision.values():
        calibration = plan.get("calibration")
        if isinstance(calibration, Mapping):
            digests = cast("Mapping[str, Any]", calibration).get("digests")
            if isinstance(digests, Sequence) and not isinstance(digests, str):
                found |= {text for text in digests if isinstance(text, str)}
    return frozenset(found)


def _content_sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        # Decoding reports what is wrong with it; until then it is told from others by its name.
        return hashlib.sha256(f"unreadable:{path}".encode()).hexdigest()


def _listed(folder: Path, manifest: Manifest, say: Callable[[str], None]) -> tuple[Path, list[LabeledImage]]:
    root, images = list_labeled(folder, manifest.class_names, say)
    present = {image.label for image in images}
    missing = [name for index, name in enumerate(manifest.class_names) if index not in present]
    if missing:
        named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        classes = len(manifest.class_names)
        found = f"{root} has images of {len(present)} of the bundle's {classes} classes, none of {named}"
        if len(present) < _LEAST_CLASSES * classes:
            raise InputError(
                f"{found}; expected at least half of them: what is learned would hold for those alone, add the others"
            )
        say(f"{found}: what is learned from them holds for images like those alone")
    return root, images
