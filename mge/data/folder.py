"""Images of labeled folders for training and evaluation: datasets, the order of an epoch, loaders.

Images are decoded and cropped exactly as the runtime does. They travel as bytes, and are normalized on the device.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import InterpolationMode, v2

from mge.attention import constant
from mge.config import MGEConfig
from mge.training.options import TrainOptions
from mge_runtime.decode import MAX_PIXELS, open_image
from mge_runtime.errors import InputError
from mge_runtime.machine import cpu_count
from mge_runtime.preprocess import crop_resized, resized_size, to_frame


def normalize(frames: np.ndarray | Tensor, config: MGEConfig) -> Tensor:
    """Frames, uint8 [..., S, S, 3] RGB, to normalized float32 images [..., 3, S, S] in the same memory layout.

    Where the frames are, with the same bits on every device: by a number of Python's a GPU would not divide, but
    multiply by its reciprocal.
    """
    frames = torch.as_tensor(frames)
    white, mean, std = (
        constant(values, torch.float32, frames.device)[:, None, None] for values in ((255.0,), config.mean, config.std)
    )
    return (frames.movedim(-1, -3).float() / white - mean) / std


class _Images(Dataset[Any]):
    """Labeled images; one that cannot be read is its error as a value: raised, it would carry a worker's traceback."""

    def __init__(self, samples: Sequence[tuple[Path, int]], config: MGEConfig, *, max_pixels: int = MAX_PIXELS) -> None:
        self.samples = list(samples)
        self.config = config
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.read(key)
        except InputError as error:
            return error.with_traceback(None)

    def read(self, key: Any) -> Any:
        """The sample of a sampler's key; raises InputError."""
        raise NotImplementedError


class FolderDataset(_Images):
    """Frames for evaluation: what the runtime would see, the class index, and the frame's `Viewport` as a tensor."""

    def read(self, key: int) -> tuple[np.ndarray, int, Tensor]:
        """Image `key`."""
        path, label = self.samples[key]
        frame, viewport = to_frame(open_image(path, self._max_pixels), self.config.preprocess)
        return frame, label, torch.tensor(astuple(viewport), dtype=torch.float64)


class TrainingDataset(_Images):
    """Frames for training: shorter side resized, a random crop, a random horizontal flip (the paper's augmentation).

    Indexed by the (epoch, index) pairs of an `EpochSampler`: the same pair always gives the same image.
    `augment` and `erasing` of the options add torchvision's TrivialAugmentWide or RandAugment (two operations of
    magnitude 9) and RandomErasing.
    """

    def __init__(
        self, samples: Sequence[tuple[Path, int]], config: MGEConfig, options: TrainOptions, **limits: Any
    ) -> None:
        super().__init__(samples, config, **limits)
        self._seed, self._flip = options.seed, options.flip
        blank: Any = [round(255 * mean) for mean in config.mean]  # what comes in from outside an image, or is erased
        look: Any = {"interpolation": InterpolationMode.BILINEAR, "fill": blank}
        self._transforms: list[Any] = []
        if options.augment != "none":
            self._transforms.append({"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}[options.augment](**look))
        if options.erasing:
            self._transforms.append(v2.RandomErasing(options.erasing, value=blank))

    def fingerprint(self) -> str:
        """Number of images and a hash of their names and classes, to tell one training set from another."""
        names = "\n".join(f"{label} {path.parent.name}/{path.name}" for path, label in self.samples)
        return f"{len(self.samples)} images ({hashlib.sha256(names.encode()).hexdigest()[:12]})"

    def read(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        """Image `index` as in `epoch`, whichever worker reads it and in whatever order."""
        path, label = self.samples[key[1]]
        random = np.random.default_rng((self._seed, *key))
        frame = random_crop(open_image(path, self._max_pixels), self.config, random)
        return self.augmented(frame, random), label

    def augmented(self, frame: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A frame, uint8 [S, S, 3], as training shows it: flipped or not, and what else the options ask for."""
        if self._flip and random.random() < 0.5:
            frame = np.ascontiguousarray(frame[:, ::-1])
        if not self._transforms:
            return frame
        image = Image.fromarray(frame)
        with torch.random.fork_rng(devices=()):  # torchvision draws from the generator of the process
            torch.default_generator.manual_seed(int(random.integers(2**63)))
            for transform in self._transforms:
                image = transform(image)
        return np.array(image)


def random_crop(image: Image.Image, config: MGEConfig, random: np.random.Generator) -> np.ndarray:
    """Resize the shorter side as the runtime does, then cut a random square: uint8 [S, S, 3]."""
    width, height = resized_size(image.width, image.height, config.resize)
    top, left = (int(random.integers(side - config.frame_size + 1)) for side in (height, width))
    return crop_resized(image, (width, height), (left, top), config.frame_size)


class EpochSampler(Sampler[tuple[int, int]]):
    """Shuffled (epoch, index) pairs of one epoch; the pair tells the data set which augmentation to draw.

    One sampler serves all epochs, so that the loader and its workers live on: `start` goes to another one. (It is not
    called `set_epoch` because Fabric calls that, with the number of its own iterations.) Each of `world` processes gets
    an equal share; up to world - 1 images are left out.
    """

    def __init__(self, length: int, *, seed: int, epoch: int = 0, skip: int = 0, rank: int = 0, world: int = 1) -> None:
        self._length, self._seed, self._rank, self._world = length, seed, rank, world
        self.start(epoch, skip)

    def start(self, epoch: int, skip: int = 0) -> None:
        """Go to an epoch, without its first `skip` pairs."""
        order = np.random.default_rng((self._seed, epoch)).permutation(self._length)
        share = self._length // self._world
        self._indices = order[self._rank : share * self._world : self._world][skip:]
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self._epoch, int(index)) for index in self._indices)


def _collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, InputError)), None) or default_collate(samples)


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    workers: int,
    device: torch.device | None = None,
    persistent: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    """A loader whose batches are to be read through `batches`.

    Args:
        dataset: decodes in the workers.
        batch_size: images.
        workers: processes, at most one for each core.
        device: where the batches go; for a GPU they lie in pinned memory, so that copying them need not wait.
        persistent: whether the processes live as long as the loader, rather than as one pass through it.
        options: of `DataLoader`.
    """
    workers = min(workers, cpu_count())
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_shield_worker,
        persistent_workers=persistent and workers > 0,
        pin_memory=device is not None and device.type == "cuda",
        **options,
    )


def batches(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches.

    Raises:
        InputError: an image of the next batch cannot be read.
    """
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _shield_worker(worker: int) -> None:
    """Take a data worker out of the process group, which a terminal or `timeout` signals, so that the step can end.

    Ignoring the signals would not do: a worker that ignores SIGTERM cannot be ended by the process that started it.
    """
    del worker
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:  # Windows
        signal.signal(signal.SIGINT, signal.SIG_IGN)
