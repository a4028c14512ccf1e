"""What a run will cost, measured in a few steps of it that write nothing."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from tqdm import tqdm

from mge.cost import count_gmacs
from mge.data.folder import batches
from mge.evaluation import Predictions, collect
from mge.training.loop import Progress, Trainer
from mge.training.record import Meter
from mge_runtime.files import format_bytes
from mge_runtime.interrupt import Interrupt

WARM_UP = 2  # steps that do not count: workers start, allocators find their size
LEAST, SECONDS = 3, 20.0  # steps that are timed: so many, and for so long
VALIDATED = 2  # batches, the last of which is timed


class DryRun(Trainer):
    """A trainer that stops after a few steps and keeps nothing; `report` then says what the whole run would cost.

    The device is waited for after each step, so that on a GPU the real steps are a little faster.
    """

    def fit(self, resume: Path | None = None) -> Progress:
        """Take a few steps, and validate on a few batches."""
        self._steps: list[float] = []  # seconds of each, with the wait for its images
        self._waits: list[float] = []  # seconds of each wait
        self._validation = 0.0  # seconds of a batch
        self._gmacs = count_gmacs(self.model.eval())[-1]
        return super().fit(resume)

    def report(self) -> Generator[str]:
        """Lines for people."""
        counts = sorted(Counter(label for _, label in self.train.samples).values())
        yield f"images of a class to train on: {counts[0]} to {counts[-1]}, median {median(counts):g}"
        yield f"model: {self._gmacs:.3g} GMACs an image; experts at {', '.join(map(str, self.model.config.sizes))} px"
        if self._steps:
            step, wait = (fmean(times[WARM_UP:] or times) for times in (self._steps, self._waits))
            epochs = self.options.epochs
            images = self.options.batch_size * self.fabric.world_size
            parts = step * self.steps_per_epoch, self._validation * len(self._val_loader)
            epoch, validation, run = map(tqdm.format_interval, (*parts, epochs * sum(parts)))
            yield (
                f"time: {step:.3g} s a step of {images} images, {images / step:.3g} images/s; "
                f"{wait / step:.0%} of it waiting for images"
            )
            yield f"time: {epoch} an epoch and {validation} its validation; {run} for {epochs} epochs"
        if (peak := peak_memory(self.fabric.device)) is not None:
            yield f"memory: {format_bytes(peak)} at most, {self.fabric.device.type}"
        yield "dry run: nothing was written"

    def _epoch(
        self, wrapped: Any, optimizer: Any, schedule: Any, progress: Progress, interrupt: Interrupt, meter: Meter
    ) -> bool:
        """Take steps until enough are timed, in further epochs where they are short."""
        self._validate(wrapped)
        stop = False
        while not stop and progress.epoch < self.options.epochs:
            self._last = time.perf_counter()
            stop = super()._epoch(wrapped, optimizer, schedule, progress, interrupt, meter)
            progress.epoch, progress.step = progress.epoch + 1, 0
        return True

    def _step(self, *arguments: Any, **options: Any) -> None:
        self._waits.append(time.perf_counter() - self._last)
        super()._step(*arguments, **options)
        if self.fabric.device.type != "cpu":
            torch.accelerator.synchronize()
        before, self._last = self._last, time.perf_counter()
        self._steps.append(self._last - before)

    def _anywhere(self, flag: bool) -> bool:
        timed = self._steps[WARM_UP:]
        return super()._anywhere(flag or (len(timed) >= LEAST and sum(timed) >= SECONDS))

    def _validate(self, *arguments: Any, **_: Any) -> Predictions:
        """Predict a few batches, and time the last."""
        marks = [time.perf_counter()]

        def timed(loaded: Iterable[Any]) -> Generator[Any]:
            for batch in loaded:
                yield batch
                marks.append(time.perf_counter())

        predictions = collect(arguments[0], timed(islice(batches(self._val_loader), VALIDATED)))
        self._validation = marks[-1] - marks[-2]
        return predictions

    def _save(self, *arguments: Any, **options: Any) -> None:
        """Nothing."""

    def _conclude(self, *arguments: Any, **options: Any) -> None:
        """Nothing."""

    def _open_board(self, progress: Progress) -> AbstractContextManager[Any]:
        return nullcontext(progress)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process had at most, on a GPU or else in main memory; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
