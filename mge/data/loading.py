"""Data loaders whose errors stay errors: one line, not the traceback of a worker process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from mge.interrupt import shield_worker
from mge_runtime.errors import InputError
from mge_runtime.machine import cpu_count

__all__ = ["batches", "make_loader"]


class _Guarded(Dataset[Any]):
    """Returns an `InputError` as a value: raised in a worker, it would come back wrapped in that worker's traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except InputError as error:
            return error.with_traceback(None)


def _collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, InputError)), None) or default_collate(samples)


def make_loader(
    dataset: Dataset[Any], batch_size: int, *, workers: int, device: torch.device | None = None, **options: Any
) -> DataLoader[Any]:
    """A loader whose batches are to be read through `batches`; its processes live as long as it does.

    Args:
        dataset: decodes in the workers.
        batch_size: images.
        workers: processes, at most one for each core.
        device: where the batches go; for a GPU they lie in pinned memory, so that copying them need not wait.
        options: of `DataLoader`.
    """
    workers = min(workers, cpu_count())  # more only wait for each other
    return DataLoader(
        _Guarded(dataset),
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=shield_worker,
        persistent_workers=workers > 0,
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
