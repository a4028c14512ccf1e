"""The training loop: explicit, on Lightning Fabric for device, precision and distribution."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from mge.checkpoint import save_checkpoint
from mge.data.folder import FolderDataset, TrainingDataset
from mge.data.loading import batches, make_loader
from mge.data.sampling import EpochSampler
from mge.evaluation import Answers, collect, median_areas, summarize
from mge.interrupt import Interrupt
from mge.model import MGENet
from mge.training.losses import loss_terms
from mge.training.optim import make_optimizer, make_schedule
from mge.training.options import TrainOptions
from mge.training.record import Board, write_csv, write_curves
from mge.training.state import Progress, Stateful, load_progress, save_progress, seed_step
from mge.training.thresholds import crop_report, propose_threshold
from mge_runtime.errors import TrainingError

__all__ = ["Trainer", "within_noise"]

EVALUATION_BATCH = 32  # images; needs no gradients, so more fit than in training


def within_noise(accuracy: float, best: float, images: int) -> bool:
    """Whether an epoch replaces the one in `best.pt`.

    Among epochs within one standard error of the highest accuracy, the latest is kept: learning rates fall to the end,
    and on few images the highest value is as likely luck as merit (the one-standard-error rule, Breiman et al. 1984,
    with "latest" for "simplest").

    Args:
        accuracy: of this epoch on validation images, in [0, 1].
        best: the highest so far, in [0, 1]; below 0 before the first epoch.
        images: validation images.
    """
    return best < 0 or accuracy >= best - math.sqrt(best * (1 - best) / images)


@dataclass
class Trainer:
    """Trains a model; writes `best.pt`, `last.pt`, `metrics.csv`, `curves.png` and TensorBoard events to a folder."""

    model: MGENet
    train: TrainingDataset
    val: FolderDataset
    options: TrainOptions
    folder: Path  # exists
    fabric: Fabric

    def fit(self, resume: Path | None = None) -> Progress:
        """Train to the last epoch, or to a Ctrl-C; returns where it stopped.

        Args:
            resume: a `last.pt` whose weights `model` already has; the run goes on exactly where it stood.

        Raises:
            TrainingError: a loss became infinite or NaN (`last.pt` keeps the state before the epoch), or `resume` does
                not fit.
        """
        model = self.model.to(memory_format=torch.channels_last)  # 1.5 times faster on CPUs, and what GPUs like
        optimizer = make_optimizer(model, self.options)
        schedule = make_schedule(optimizer, self.options, self.steps_per_epoch)
        wrapped, optimizer = self.fabric.setup(model, optimizer)
        parts = {"optimizer": optimizer, "schedule": schedule, "precision": self.fabric.strategy.precision}
        progress = Progress()
        if resume is not None:
            progress = load_progress(
                resume,
                self.options,
                parts,
                images=self.train.fingerprint(),
                processes=self.fabric.world_size,
            )
        with Interrupt() as interrupt, self._open_board(progress) as board:
            if resume is None and self.options.crop_area is not None:
                self._follow_area(self._validate(wrapped))
            stop = False
            while progress.epoch < self.options.epochs and not stop:
                started = time.perf_counter()
                stop = self._epoch(wrapped, optimizer, schedule, progress, interrupt)
                if not stop:
                    self._finish_epoch(wrapped, progress, board, time.perf_counter() - started)
                self._save(progress, parts)
                stop = stop or self._anywhere(interrupt.requested)  # Ctrl-C during validation
        if progress.history:
            answers = self._validate(wrapped)
            if self.fabric.is_global_zero:
                write_curves(self.folder / "curves.png", progress.history)
                config = self.model.config
                for line in crop_report(answers.heatmaps, config.image_size, config.box_thresholds):
                    click.echo(line)
        return progress

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the images of an incomplete last batch are left out (another set each epoch)."""
        return max(len(self.train) // self.fabric.world_size // self.options.batch_size, 1)

    def _epoch(self, wrapped: Any, optimizer: Any, schedule: Any, progress: Progress, interrupt: Interrupt) -> bool:
        """Train to the end of the epoch, or to a Ctrl-C; returns whether it was one."""
        batch = self.options.batch_size
        sampler = EpochSampler(
            len(self.train),
            seed=self.options.seed,
            epoch=progress.epoch,
            skip=progress.step * batch,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )
        loader = make_loader(
            self.train,
            batch,
            workers=self.options.workers,
            sampler=sampler,
            drop_last=len(self.train) // self.fabric.world_size >= batch,
        )
        bar = tqdm(
            total=self.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch + 1}/{self.options.epochs}",
            unit="batch",
            leave=False,
            disable=None if self.fabric.is_global_zero else True,
        )
        wrapped.train()
        with bar:
            for images, labels in batches(self.fabric.setup_dataloaders(loader, use_distributed_sampler=False)):
                total = self._step(wrapped, optimizer, images, labels, progress)
                progress.rates = [group["lr"] for group in optimizer.param_groups]
                schedule.step()
                progress.step += 1
                bar.set_postfix(loss=f"{total:.3f}", refresh=False)
                bar.update()
                if self._anywhere(interrupt.requested):
                    return True
        return False

    def _anywhere(self, flag: bool) -> bool:
        """Whether a flag is set in any process; to be called by all.

        They stop together: one that went on alone would wait for the gradients of the others for ever.
        """
        return bool(self.fabric.all_reduce(torch.tensor(float(flag), device=self.fabric.device), reduce_op="sum"))

    def _step(self, wrapped: Any, optimizer: Any, images: Tensor, labels: Tensor, progress: Progress) -> float:
        seed_step(self.options.seed, progress.epoch, progress.step, self.fabric.global_rank)
        images = images.to(memory_format=torch.channels_last)
        terms = loss_terms(
            wrapped(images, labels),
            labels,
            label_smoothing=self.options.label_smoothing,
            diversity_form=self.options.diversity,
        )
        loss = torch.stack(list(terms.values())).sum()
        # The mean of all processes, so that each of them stops at a loss that is not finite in one.
        means: Any = self.fabric.all_reduce(torch.stack([term.detach() for term in terms.values()]))
        values = dict(zip(terms, means.tolist(), strict=True))
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            raise TrainingError(
                f"loss {bad[0]} became {values[bad[0]]} in epoch {progress.epoch + 1}, step {progress.step + 1}; "
                "expected a finite number: lower --head-lr or --trunk-lr, set --clip-norm 5 or --normalize-features"
            )
        optimizer.zero_grad()
        self.fabric.backward(loss)
        if self.options.clip_norm is not None:
            self.fabric.clip_gradients(wrapped, optimizer, max_norm=self.options.clip_norm, error_if_nonfinite=False)
        optimizer.step()
        for name, value in values.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        return sum(values.values())

    def _finish_epoch(self, wrapped: Any, progress: Progress, board: Board | None, seconds: float) -> None:
        answers = self._validate(wrapped)
        if not np.isfinite(answers.final).all():
            raise TrainingError(
                f"the model's answers are not finite after epoch {progress.epoch + 1}; expected numbers: lower "
                "--head-lr or --trunk-lr, set --clip-norm 5 (last.pt keeps the state before this epoch)"
            )
        rows = summarize(answers)
        areas = median_areas(answers)
        row: dict[str, float] = {"epoch": progress.epoch + 1}
        row["loss/total"] = sum(progress.sums.values()) / progress.step
        row |= {f"loss/{name}": value / progress.step for name, value in progress.sums.items()}
        row |= {f"top1/{line.name}": line.top1 for line in rows}
        row |= {f"area/expert {k}": area for k, area in enumerate(areas, 1)}
        row |= {f"threshold/{k}": value for k, value in enumerate(self.model.config.box_thresholds, 1)}
        row["lr/trunk"], row["lr/heads"] = progress.rates
        row["seconds"] = round(seconds, 2)
        progress.history.append(row)
        accuracy = rows[-1].top1
        is_best = within_noise(accuracy, progress.best, len(answers.labels))
        if is_best:
            progress.kept = accuracy
        if board is not None:
            board.write(row)
        if self.fabric.is_global_zero:
            if is_best:
                save_checkpoint(self.folder / "best.pt", self.model)
            write_csv(self.folder / "metrics.csv", progress.history)
            singles = [line.top1 for line in rows if line.name.startswith("expert") and line.name.count(" ") == 1]
            click.echo(
                f"epoch {progress.epoch + 1:3d}  loss {row['loss/total']:7.3f}  "
                f"val: experts {' '.join(f'{100 * value:5.1f}' for value in singles)}  "
                f"{rows[-1].name} {100 * accuracy:5.1f} %  areas {' '.join(f'{100 * area:.0f}' for area in areas)} %  "
                f"thresholds {' '.join(f'{value:.2f}' for value in self.model.config.box_thresholds) or '-'}  "
                f"{seconds:.0f} s{'  best' if is_best else ''}"
            )
        progress.best = max(progress.best, accuracy)
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        if self.options.crop_area is not None:
            self._follow_area(answers)

    def _follow_area(self, answers: Answers) -> None:
        """Move each threshold to where the median crop keeps `crop_area` of its image."""
        target, size = self.options.crop_area or 1.0, self.model.config.image_size
        thresholds = tuple(
            propose_threshold(maps, size, target)[0] for maps in answers.heatmaps[: self.model.config.experts - 1]
        )
        self.model.config = self.model.config.with_thresholds(thresholds)

    def _validate(self, wrapped: Any) -> Answers:
        """Answers on the validation images, in the precision of training; to be called by all processes.

        Each process answers all images, with the running statistics of the first (the wrapper for several processes
        hands them out), so that all see the same figures and move the thresholds alike.
        """
        loader = make_loader(self.val, EVALUATION_BATCH, workers=self.options.workers)
        return collect(wrapped, batches(self.fabric.setup_dataloaders(loader, use_distributed_sampler=False)))

    def _open_board(self, progress: Progress) -> AbstractContextManager[Board | None]:
        if not self.fabric.is_global_zero:
            return nullcontext()
        return Board(self.folder / "tensorboard", progress.epoch + 1)

    def _save(self, progress: Progress, parts: Mapping[str, Stateful]) -> None:
        if self.fabric.is_global_zero:
            save_progress(
                self.folder / "last.pt",
                self.model,
                progress,
                self.options,
                parts,
                images=self.train.fingerprint(),
                processes=self.fabric.world_size,
            )
