"""Images in ImageFolder layout (`DIR/<split>/<class>/*.jpg`), decoded and cropped exactly as the runtime does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from mge.config import MGEConfig
from mge.data.sampling import sample_generator
from mge_runtime.decode import MAX_PIXELS, decode_picture
from mge_runtime.preprocess import crop_resized, resized_size, to_frame

__all__ = ["FolderDataset", "TrainingDataset", "normalize"]


def normalize(frame: np.ndarray, config: MGEConfig) -> Tensor:
    """A frame, uint8 [S, S, 3] RGB, to a normalised float32 image [3, S, S]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return (torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float() / 255 - mean) / std


class FolderDataset(Dataset[tuple[Tensor, int, Tensor]]):
    """Images for evaluation: what the runtime would see, the class index, and where the frame lies in the source.

    The last is a float64 tensor of a `Viewport`'s fields in their order, since a loader's batches are tensors.
    """

    def __init__(self, samples: Sequence[tuple[Path, int]], config: MGEConfig, *, max_pixels: int = MAX_PIXELS) -> None:
        self.samples = list(samples)
        self.config = config
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        path, label = self.samples[index]
        frame, viewport = to_frame(decode_picture(path, self._max_pixels), self.config.preprocess)
        return normalize(frame, self.config), label, torch.tensor(astuple(viewport), dtype=torch.float64)


class TrainingDataset(Dataset[tuple[Tensor, int]]):
    """Images for training: shorter side resized, a random crop, a random horizontal flip (the paper's augmentation).

    Indexed by the (epoch, index) pairs of an `EpochSampler`: the same pair always gives the same image.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        config: MGEConfig,
        *,
        seed: int,
        flip: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.samples = list(samples)
        self.config = config
        self._seed = seed
        self._flip = flip
        self._max_pixels = max_pixels

    def fingerprint(self) -> str:
        """Number of images and a hash of their names and classes, to tell one training set from another."""
        names = "\n".join(f"{label} {path.parent.name}/{path.name}" for path, label in self.samples)
        return f"{len(self.samples)} images ({hashlib.sha256(names.encode()).hexdigest()[:12]})"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        path, label = self.samples[index]
        random = sample_generator(self._seed, epoch, index)
        frame = random_crop(decode_picture(path, self._max_pixels), self.config, random)
        if self._flip and random.random() < 0.5:
            frame = frame[:, ::-1]
        return normalize(frame, self.config), label


def random_crop(image: Image, config: MGEConfig, random: np.random.Generator) -> np.ndarray:
    """Resize the shorter side as the runtime does, then cut a random square: an RGB image to uint8 [S, S, 3]."""
    width, height = resized_size(image.width, image.height, config.resize)
    top, left = (int(random.integers(side - config.image_size + 1)) for side in (height, width))
    return crop_resized(image, (width, height), (left, top), config.image_size)
