"""Which images teach what: temperatures, and exits, whose images no choice may have seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from mge_calibration.collect import Answers
from mge_calibration.folder import LabelledImage, list_labelled, short_digest, split_by_content, without
from mge_runtime.errors import InputError
from mge_runtime.manifest import Manifest
from mge_runtime.sources import VALIDATION_FOLDERS

__all__ = ["TEMPERATURE_SHARE", "Chosen", "choose_images", "int8_digests", "split_answers"]

TEMPERATURE_SHARE = 1 / 3  # of one folder's images; thresholds need more of them than a temperature does
_LEAST_CLASSES = 1 / 2  # of the bundle's
_NAMED = 5  # classes in a message


@dataclass(frozen=True)
class Chosen:
    """Images to answer, by what they may teach."""

    fitting: list[LabelledImage]  # temperatures; exits, too, where there is no folder for them alone
    testing: list[LabelledImage] | None  # exits alone; None: they are taken out of `fitting`
    folders: tuple[Path, Path]  # of the images for temperatures and for exits
    known: frozenset[str]  # digests of images that INT8 ranges were learned from: they set no exits


def choose_images(data: Path, exit_data: Path | None, manifest: Manifest, say: Callable[[str], None]) -> Chosen:
    """List the images of one folder or of two.

    Args:
        data: labelled images.
        exit_data: others for the exits; None: a part of `data`.
        manifest: of the bundle.
        say: is told what is noteworthy, a line each.

    Raises:
        InputError: a folder without usable images, with too few of the bundle's classes, or without any image that the
            exits may use.
    """
    known = int8_digests(manifest)
    root, images = _listed(data, manifest, say)
    if exit_data is None:
        _tell_of_choice(root, manifest, say)
        if known and (used := sum(short_digest(image.sha256) in known for image in images)):
            say(f"{used} of {len(images)} images in {root} taught INT8: they set no exits")
        return Chosen(images, None, (root, root), known)
    exit_root, exit_images = _listed(exit_data, manifest, say)
    _tell_of_choice(exit_root, manifest, say)
    others = without(exit_images, images)
    if shared := len(exit_images) - len(others):
        say(f"{shared} of {len(exit_images)} images in {exit_root} are also in {root}: they set no exits")
    unused = [image for image in others if short_digest(image.sha256) not in known]
    if used := len(others) - len(unused):
        say(f"{used} of {len(exit_images)} images in {exit_root} taught INT8: they set no exits")
    if not unused:
        raise InputError(
            f"every image in {exit_root} is also in {root}" + (" or taught INT8" if used else "") + "; exits need "
            "images other than those that set the temperatures"
        )
    return Chosen(images, unused, (root, exit_root), known)


def split_answers(answers: Answers, known: frozenset[str], seed: int) -> tuple[Answers, Answers]:
    """Split one folder's answers by a seeded hash of the images: a third for temperatures, the others for exits.

    Args:
        answers: of the images that could be read.
        known: digests of images that may set temperatures alone; they count towards their third.
        seed: another one gives another split.
    """
    free = [image for image in answers.images if short_digest(image.sha256) not in known]
    wanted = round(TEMPERATURE_SHARE * len(answers)) - (len(answers) - len(free))
    testing = split_by_content(free, max(0.0, wanted / max(len(free), 1)), seed)[1]
    names = {image.sha256 for image in testing}
    apart = np.array([image.sha256 in names for image in answers.images])
    return answers.take(np.flatnonzero(~apart)), answers.take(np.flatnonzero(apart))


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


def _listed(folder: Path, manifest: Manifest, say: Callable[[str], None]) -> tuple[Path, list[LabelledImage]]:
    root, images = list_labelled(folder, manifest.class_names, say)
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


def _tell_of_choice(root: Path, manifest: Manifest, say: Callable[[str], None]) -> None:
    # The part of a data set that training chooses its checkpoint and box thresholds on.
    if root.name in VALIDATION_FOLDERS and len(manifest.graphs) > 1:
        say(
            f"exits are set by {root}: if checkpoint or box thresholds were chosen on these images, as mge-train does, "
            "the promise is not kept; name images that no choice has seen with --exit-data"
        )
