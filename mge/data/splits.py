"""Training and validation images of a data set."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from mge_runtime.errors import InputError
from mge_runtime.layouts import find_list, relative_name
from mge_runtime.sources import list_labeled, require_folder, validation_folder

HOLDOUT = 0.1  # share of each class that is held out where there is no val/


def training_splits(
    data: Path, seed: int, say: Callable[[str], None] = lambda _: None
) -> tuple[tuple[str, ...], list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Classes, training samples and validation samples of `data`: class folders, a downloaded data set or a table.

    Validation images are those of the validation split where there is one; else a tenth of every class of the training
    split (at least one image where a class has two), taken out of training. A seeded hash of their names chooses them:
    where images are added or removed, the others stay on their side, but for the few by which the tenth grows or
    shrinks. Test images are never read.

    Args:
        data: a folder or a table, see `mge_runtime.layouts`.
        seed: of the images held out.
        say: is told as what `data` was recognized, what was passed over and how many images are held out.

    Raises:
        InputError: no training images, a validation class without a training folder, or two classes that Unicode calls
            one.
    """
    if (listed := find_list(data)) is not None:
        say(str(listed))
        root, classes = listed.root, listed.classes
        samples, val = listed.labeled("train", classes), listed.splits.get("val")
    else:
        place = data / "train"
        require_folder(place, f"class folders there ({place}/<class>/*.jpg), a downloaded data set or a table of paths")
        root, (classes, samples) = data, list_labeled(place, say=say)
        val = list_labeled(folder, classes, say)[1] if (folder := validation_folder(data)) else None
    names: dict[str, str] = {}
    for name in classes:
        if (other := names.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise InputError(
                f"{data} holds two classes named {name}, once composed and once decomposed in "
                f"Unicode ({other!a}, {name!a}); expected one for each class: merge them"
            )
    if val:
        return classes, samples, val

    def rank(path: Path) -> bytes:
        return hashlib.sha256(f"{seed}:{relative_name(path, root)}".encode()).digest()

    held: set[Path] = set()
    for _, group in groupby(samples, key=lambda sample: sample[1]):
        paths = [path for path, _ in group]
        count = max(round(HOLDOUT * len(paths)), 1) if len(paths) > 1 else 0
        held.update(sorted(paths, key=rank)[:count])
    if not held:
        raise InputError(
            f"{data} has one training image for each class and no validation split; expected at least two images of "
            "some class, or a val folder"
        )
    say(f"{data} has no validation split: {len(held)} of the training images are held out for it")
    train, val = ([sample for sample in samples if (sample[0] in held) is side] for side in (False, True))
    return classes, train, val
