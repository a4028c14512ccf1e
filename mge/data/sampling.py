"""Which images make up an epoch, so that it can be repeated and resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

__all__ = ["EpochSampler", "sample_generator"]


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one image in one epoch, whichever worker draws them and in whatever order."""
    return np.random.default_rng((seed, epoch, index))


class EpochSampler(Sampler[tuple[int, int]]):
    """Shuffled (epoch, index) pairs of one epoch; the pair tells the data set which augmentation to draw.

    One sampler serves all epochs, so that the loader and its workers live on: `start` goes to another one. (It is not
    called `set_epoch` because Fabric calls that, with the number of its own iterations.)

    Args:
        length: images in the data set.
        seed: of the order.
        epoch: from 0.
        skip: pairs to leave out at the start, when an interrupted epoch goes on.
        rank: of this process, in [0, world).
        world: number of processes; each gets an equal share, up to world - 1 images are left out.
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
