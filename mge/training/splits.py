"""Training and validation images of a data folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mge.data.folder import list_classes, list_images
from mge_runtime.errors import InputError

__all__ = ["HOLDOUT", "training_splits"]

HOLDOUT = 0.1  # share of each class that is held out where there is no val/


def training_splits(data: Path, seed: int) -> tuple[tuple[str, ...], list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Classes, training samples and validation samples of `data` (ImageFolder layout).

    Validation images are `data/val` where it exists; else a seeded tenth of every class of `data/train` (at least one
    image where a class has two), taken out of training. `data/test` is never read.

    Raises:
        InputError: no training images, or a validation class without a training folder.
    """
    classes = list_classes(data / "train")
    samples = list_images(data / "train", classes)
    if (data / "val").is_dir():
        return classes, samples, list_images(data / "val", classes)
    random = np.random.default_rng(seed)
    held: set[Path] = set()
    for index in range(len(classes)):
        paths = [path for path, label in samples if label == index]
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
