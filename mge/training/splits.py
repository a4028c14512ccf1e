"""Training and validation images of a data folder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np

from mge_runtime.errors import InputError
from mge_runtime.sources import list_labelled, validation_folder

__all__ = ["HOLDOUT", "training_splits"]

HOLDOUT = 0.1  # share of each class that is held out where there is no val/


def training_splits(
    data: Path, seed: int, say: Callable[[str], None] = lambda _: None
) -> tuple[tuple[str, ...], list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Classes, training samples and validation samples of `data` (ImageFolder layout).

    Validation images are those of `validation_folder` where there is one; else a seeded tenth of every class of
    `data/train` (at least one image where a class has two), taken out of training. `data/test` is never read.

    Args:
        data: the data folder.
        seed: of the images held out.
        say: is told what was passed over, a line for each folder.

    Raises:
        InputError: no training images, or a validation class without a training folder.
    """
    classes, samples = list_labelled(data / "train", say=say)
    if (held_out := validation_folder(data)) is not None:
        return classes, samples, list_labelled(held_out, classes, say)[1]
    random = np.random.default_rng(seed)
    held: set[Path] = set()
    for _, group in groupby(samples, key=lambda sample: sample[1]):
        paths = [path for path, _ in group]
        count = max(round(HOLDOUT * len(paths)), 1) if len(paths) > 1 else 0
        held.update(paths[i] for i in random.permutation(len(paths))[:count])
    if not held:
        raise InputError(
            f"{data / 'train'} has one image for each class and there is no {data / 'val'}; expected at least two "
            "images of some class, or a val folder"
        )
    return (
        classes,
        [sample for sample in samples if sample[0] not in held],
        [sample for sample in samples if sample[0] in held],
    )
