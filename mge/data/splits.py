"""Training and validation images of a data folder."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from mge_runtime.errors import InputError
from mge_runtime.sources import list_labeled, validation_folder

__all__ = ["HOLDOUT", "training_splits"]

HOLDOUT = 0.1  # share of each class that is held out where there is no val/


def training_splits(
    data: Path, seed: int, say: Callable[[str], None] = lambda _: None
) -> tuple[tuple[str, ...], list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Classes, training samples and validation samples of `data` (ImageFolder layout).

    Validation images are those of `validation_folder` where there is one; else a tenth of every class of `data/train`
    (at least one image where a class has two), taken out of training. A seeded hash of their names chooses them: where
    images are added or removed, the others stay on their side, but for the few by which the tenth grows or shrinks.
    `data/test` is never read.

    Args:
        data: the data folder.
        seed: of the images held out.
        say: is told what was passed over, a line for each folder.

    Raises:
        InputError: no training images, a validation class without a training folder, or two classes that Unicode calls
            one.
    """
    classes, samples = list_labeled(data / "train", say=say)
    names: dict[str, str] = {}
    for name in classes:
        if (other := names.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise InputError(
                f"{data / 'train'} holds two class folders named {name}, once composed and once decomposed in "
                f"Unicode ({other!a}, {name!a}); expected one for each class: merge them"
            )
    if (held_out := validation_folder(data)) is not None:
        return classes, samples, list_labeled(held_out, classes, say)[1]

    def rank(path: Path) -> bytes:
        name = path.relative_to(data).as_posix()
        return hashlib.sha256(f"{seed}:{name}".encode()).digest()

    held: set[Path] = set()
    for _, group in groupby(samples, key=lambda sample: sample[1]):
        paths = [path for path, _ in group]
        count = max(round(HOLDOUT * len(paths)), 1) if len(paths) > 1 else 0
        held.update(sorted(paths, key=rank)[:count])
    if not held:
        raise InputError(
            f"{data / 'train'} has one image for each class and there is no {data / 'val'}; expected at least two "
            "images of some class, or a val folder"
        )
    train, val = ([sample for sample in samples if (sample[0] in held) is side] for side in (False, True))
    return classes, train, val
