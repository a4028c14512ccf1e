"""The training loop: explicit, on Lightning Fabric for device, precision and distribution."""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from mge.archive import taking_up
from mge.attention import propose_threshold
from mge.checkpoint import read_training, save_checkpoint
from mge.data.folder import EpochSampler, FolderDataset, TrainingDataset, batches, make_loader, normalize
from mge.evaluation import Predictions, collect, gate_entropy, gate_report, summarize
from mge.model import Average, Expert, Gate, MGENet, mix
from mge.parts import view_areas
from mge.training.combine import fit_average
from mge.training.options import TrainOptions
from mge.training.recipe import (
    freeze,
    hold_statistics,
    loss_terms,
    make_optimizer,
    make_schedule,
    move_average,
    to_training_layout,
)
from mge.training.record import Meter, write_csv, write_curves
from mge_runtime.errors import TrainingError
from mge_runtime.files import echo
from mge_runtime.interrupt import Interrupt

EVALUATION_BATCH = 32  # images; needs no gradients, so more fit than in training
READ_EVERY = 10  # steps: losses stay on the device until then, so that no step waits for it


@dataclass
class Progress:
    """Where a run stands. Everything random depends on (seed, epoch, index) or on `seed_step`, so this is all."""

    epoch: int = 0  # the epoch that comes next, or that goes on
    step: int = 0  # batches of it that are done
    sums: dict[str, float] = field(default_factory=dict)  # loss terms over those batches
    history: list[dict[str, float]] = field(default_factory=list)  # one row for each finished epoch
    best: float = -1.0  # highest validation accuracy so far, in [0, 1]
    kept: float = -1.0  # validation accuracy of the epoch in best.pt, in [0, 1]
    rates: list[float] = field(default_factory=list)  # of the backbones' last layers and of the heads in the last step

    def move(self, step: int) -> None:
        """Go to another step of the epoch, where a step is another number of images than before; mean losses stay."""
        share = step / self.step if self.step else 0.0
        self.step, self.sums = step, {name: value * share for name, value in self.sums.items()}


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed torch's generators (of every device) for one step: what dropout and stochastic depth draw from.

    A run that is resumed in the middle of an epoch then draws what the whole one did, on every process and whatever
    else has used the generators in between (a loader draws a number each time it is iterated).
    """
    # The key of a child, so that these numbers are not those that augment the image of (seed, epoch, index).
    sequence = np.random.SeedSequence((seed, epoch, step), spawn_key=(rank,))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


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
    command: Mapping[str, Any] = field(default_factory=dict)  # plain values that `last.pt` keeps for --resume
    stopped_by: signal.Signals | None = field(default=None, init=False)  # the signal that ended `fit` early
    _average: MGENet | None = field(default=None, init=False)  # the moving average, where `options.ema` asks for one
    _frozen: list[nn.Module] = field(init=False)  # see `freeze`
    _unread: list[dict[str, Tensor]] = field(default_factory=list, init=False)  # loss terms of the latest steps

    def __post_init__(self) -> None:
        """Freeze what is not to learn; refused here, before a run has written anything."""
        self._frozen = freeze(self.model, self.options.freeze) if self.options.freeze else []

    def fit(self, resume: Path | None = None) -> Progress:
        """Train to the last epoch, or to a signal (SIGINT, SIGTERM, SIGHUP); returns where it stopped.

        The losses are read every `READ_EVERY` steps. One that is not finite is noticed then: up to `READ_EVERY` - 1
        steps have followed it, of which nothing is saved.

        With a moving average of the weights (and of the BatchNorms' statistics, which belong to them), that is what is
        validated and kept; `last.pt` holds the trained weights, too.

        Args:
            resume: a `last.pt` of a run with these options, whose weights `model` already has; the run goes on exactly
                where it stood.

        Raises:
            TrainingError: a loss became infinite or NaN (`last.pt` keeps the state before the epoch), or `resume` holds
                no training state.
        """
        to_training_layout(self.model, self.fabric.device)
        if self.options.compile:
            for module in self.model.modules():
                if isinstance(module, Expert | Gate):
                    module.backbone.compile()
        bare = make_optimizer(self.model, self.options)
        wrapped, optimizer = self.fabric.setup(self.model, bare)
        parts = {"optimizer": optimizer, "precision": self.fabric.strategy.precision}
        validated = wrapped
        if self.options.ema:
            # A copy of the model as `last.pt` has it, which is the average; `_load` then brings the trained weights.
            self._average = copy.deepcopy(self.model)
            validated, parts["weights"] = self.fabric.setup_module(self._average), self.model
        progress = Progress()
        with nullcontext() if resume is None else taking_up(resume):
            if resume is not None:
                progress = self._load(resume, parts)
            done = progress.epoch * self.steps_per_epoch + progress.step
            schedule = make_schedule(bare, self.options, self.steps_per_epoch, done)
        meter = Meter(self.options.epochs, self.steps_per_epoch, done, shown=self.fabric.is_global_zero)
        with Interrupt(noted=True) as interrupt, self._open_board(progress) as board:
            if resume is None and self.options.crop_area and self.model.config.experts > 1:
                self._follow_area(self._validate(validated))
            stop, predictions = False, None
            while progress.epoch < self.options.epochs and not stop:
                started = time.perf_counter()
                stop = self._epoch(wrapped, optimizer, schedule, progress, interrupt, meter)
                if not stop:
                    predictions = self._finish_epoch(validated, progress, board, time.perf_counter() - started)
                self._save(progress, parts)
                stop = stop or self._anywhere(interrupt.requested)  # a signal during validation
            self.stopped_by = interrupt.received
        if self.fabric.is_global_zero:
            self._conclude(progress, None if stop else predictions)
        return progress

    @property
    def result(self) -> MGENet:
        """What is validated and saved: the moving average, or the model itself."""
        return self._average or self.model

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the images of an incomplete last batch are left out (another set each epoch)."""
        return max(len(self.train) // self.fabric.world_size // self.options.batch_size, 1)

    @cached_property
    def _sampler(self) -> EpochSampler:
        rank, world = self.fabric.global_rank, self.fabric.world_size
        return EpochSampler(len(self.train), seed=self.options.seed, rank=rank, world=world)

    @cached_property
    def _train_loader(self) -> Any:
        """One loader for all epochs: its workers live on."""
        batch = self.options.batch_size
        loader = make_loader(
            self.train,
            batch,
            workers=self.options.workers,
            device=self.fabric.device,
            persistent=True,
            sampler=self._sampler,
            drop_last=len(self.train) // self.fabric.world_size >= batch,
        )
        return self.fabric.setup_dataloaders(loader, use_distributed_sampler=False)

    @cached_property
    def _val_loader(self) -> Any:
        """Its workers end with each validation: those of training keep their memory, and decode more often."""
        loader = make_loader(self.val, EVALUATION_BATCH, workers=self.options.workers, device=self.fabric.device)
        return self.fabric.setup_dataloaders(loader, use_distributed_sampler=False)

    def _epoch(
        self, wrapped: Any, optimizer: Any, schedule: Any, progress: Progress, interrupt: Interrupt, meter: Meter
    ) -> bool:
        """Train to the end of the epoch, or to a signal; returns whether it was one."""
        self._sampler.start(progress.epoch, skip=progress.step * self.options.batch_size)
        alone = self.fabric.world_size == 1
        wrapped.train()
        hold_statistics(self._frozen)
        config = self.model.config
        if config.experts > 1 and config.sharing == "backbone" and self._is_late(progress):
            hold_statistics(self.model.get_submodule("experts.0.backbone").modules())
        with meter.epoch(progress.epoch, progress.step):
            for frames, labels in batches(self._train_loader):
                self._step(wrapped, optimizer, frames, labels, progress)
                progress.rates = [optimizer.param_groups[place]["lr"] for place in (0, -1)]
                schedule.step()
                if self._average is not None:
                    done = progress.epoch * self.steps_per_epoch + progress.step
                    move_average(self._average, self.model, self.options.ema, done)
                progress.step += 1
                read = progress.step % READ_EVERY == 0
                if read:
                    meter.loss = self._read_losses(progress)
                meter.step()
                # Several processes wait for each other to agree, so they ask as rarely as they read.
                if (alone or read) and self._anywhere(interrupt.requested):
                    self._read_losses(progress)
                    return True
            meter.loss = self._read_losses(progress)
        return False

    def _is_late(self, progress: Progress) -> bool:
        """Whether the last third of the run has begun; never in its first epoch."""
        return progress.epoch >= max(2 * self.options.epochs // 3, 1)

    def _anywhere(self, flag: bool) -> bool:
        """Whether a flag is set in any process; to be called by all.

        They stop together: one that went on alone would wait for the gradients of the others for ever.
        """
        if self.fabric.world_size == 1:
            return flag
        return bool(self.fabric.all_reduce(torch.tensor(float(flag), device=self.fabric.device), reduce_op="sum"))

    def _step(self, wrapped: Any, optimizer: Any, frames: Tensor, labels: Tensor, progress: Progress) -> None:
        """One step of the optimizer; nothing in it waits for the device."""
        seed_step(self.options.seed, progress.epoch, progress.step, self.fabric.global_rank)
        images = normalize(frames, self.model.config)  # channels_last, as frames are
        terms = loss_terms(
            wrapped(images, labels),
            labels,
            label_smoothing=self.options.label_smoothing,
            diversity_form=self.options.diversity,
            gate_balance=self.options.gate_balance,
            distill=self.options.distill if self._is_late(progress) else 0.0,  # what follows it must be good
        )
        self._unread.append({name: term.detach() for name, term in terms.items()})
        optimizer.zero_grad()
        self.fabric.backward(torch.stack(list(terms.values())).sum())
        if self.options.clip_norm is not None:
            self.fabric.clip_gradients(wrapped, optimizer, max_norm=self.options.clip_norm, error_if_nonfinite=False)
        optimizer.step()

    def _read_losses(self, progress: Progress) -> float:
        """Add the losses since the last time to the epoch's sums; returns the mean loss of the epoch so far.

        Step by step and in double precision, so that the sums do not depend on when they are read.

        Raises:
            TrainingError: one is not finite.
        """
        if self._unread:
            names = list(self._unread[0])
            # The mean of all processes, so that each of them stops at a loss that is not finite in one.
            means: Any = self.fabric.all_reduce(torch.stack([torch.stack(list(row.values())) for row in self._unread]))
            for step, values in enumerate(means.tolist(), progress.step - len(self._unread) + 1):
                for name, value in zip(names, values, strict=True):
                    if not math.isfinite(value):
                        raise TrainingError(
                            f"loss {name} became {value} in epoch {progress.epoch + 1}, step {step}; expected a finite "
                            "number: lower --head-lr or --backbone-lr, set --clip-norm 5 or --normalize-features"
                        )
                    progress.sums[name] = progress.sums.get(name, 0.0) + value
            self._unread.clear()
        return sum(progress.sums.values()) / max(progress.step, 1)

    def _finish_epoch(self, validated: Any, progress: Progress, board: Any, seconds: float) -> Predictions:
        """Validate, write what the epoch gave, and return the predictions on the validation images."""
        predictions = self._fit_average(self._validate(validated))
        if not np.isfinite(predictions.final).all():
            raise TrainingError(
                f"the model's logits are not finite after epoch {progress.epoch + 1}; expected numbers: lower "
                "--head-lr or --backbone-lr, set --clip-norm 5 (last.pt keeps the state before this epoch)"
            )
        rows = summarize(predictions)
        areas = np.median(view_areas(predictions.views), axis=0).tolist()
        thresholds = self.model.config.box_thresholds
        row: dict[str, float] = {"epoch": progress.epoch + 1}
        row["loss/total"] = sum(progress.sums.values()) / progress.step
        row |= {f"loss/{name}": value / progress.step for name, value in progress.sums.items()}
        row |= {f"top1/{line.name}": line.top1 for line in rows}
        row |= {f"area/expert {k}": area for k, area in enumerate(areas, 1)}
        row |= {f"gate/{k}": weight for k, weight in enumerate(predictions.gate.mean(0).tolist(), 1)}
        row["gate/entropy"] = gate_entropy(predictions.gate)
        row |= {f"threshold/{k}": value for k, value in enumerate(thresholds, 1)}
        row["lr/backbone"], row["lr/heads"] = progress.rates
        row["seconds"] = round(seconds, 2)
        progress.history.append(row)
        accuracy = rows[-1].top1
        kept = within_noise(accuracy, progress.best, len(predictions.labels))
        if kept:
            progress.kept = accuracy
        if self.fabric.is_global_zero:
            for key in row.keys() - {"epoch"}:
                board.add_scalar(key, row[key], progress.epoch + 1)
            board.flush()
            if kept:
                save_checkpoint(self.folder / "best.pt", self.result)
            write_csv(self.folder / "metrics.csv", progress.history)
            singles = [row[f"top1/expert {k}"] for k in range(1, len(areas) + 1)]
            echo(
                f"epoch {progress.epoch + 1:3d}  loss {row['loss/total']:7.3f}  "
                f"val: experts {' '.join(f'{100 * value:5.1f}' for value in singles)}  "
                f"{rows[-1].name} {100 * accuracy:5.1f} %  areas {' '.join(f'{100 * area:.0f}' for area in areas)} %  "
                f"thresholds {' '.join(f'{value:.2f}' for value in thresholds) or '-'}  "
                f"{seconds:.0f} s{'  kept' if kept else ''}"
            )
        progress.best = max(progress.best, accuracy)
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        if self.options.crop_area:
            self._follow_area(predictions)
        return predictions

    def _conclude(self, progress: Progress, predictions: Predictions | None) -> None:
        """Draw the curves; say what the gate of a finished run is like."""
        if progress.history:
            write_curves(self.folder / "curves.png", progress.history)
        if predictions is not None:
            for line in gate_report(predictions.gate):
                echo(f"last.pt: {line}")

    def _follow_area(self, predictions: Predictions) -> None:
        """Move each threshold to where the median crop keeps `crop_area` of its image."""
        config, targets = self.model.config, self.options.crop_area
        targets *= config.experts - 1 if len(targets) == 1 else 1
        crops = zip(predictions.heatmaps[:-1], config.sizes[:-1], targets, strict=True)
        thresholds = tuple(propose_threshold(*crop) for crop in crops)
        self.model.config = self.result.config = config.changed(box_thresholds=thresholds)

    def _fit_average(self, predictions: Predictions) -> Predictions:
        """Learn the weights of an average on the validation images, in every process alike."""
        gate = self.result.gate
        if not isinstance(gate, Average):
            return predictions
        experts = range(1, self.model.config.experts + 1)
        logits = torch.from_numpy(np.stack([predictions.heads[f"expert {k}"] for k in experts], 1))
        fit_average(gate, logits, torch.from_numpy(predictions.labels))
        cast("Average", self.model.gate).load_state_dict(gate.state_dict())  # or the next step would move the copy's
        fitted = copy.deepcopy(gate).cpu()
        weights = fitted(logits)
        heads = predictions.heads | {"mixture": mix(fitted, weights, logits).numpy()}
        return replace(predictions, heads=heads, gate=weights.numpy())

    def _validate(self, validated: Any) -> Predictions:
        """Predictions on the validation images, in the precision of training; to be called by all processes.

        Each process predicts all images, with the running statistics of the first (the wrapper for several processes
        hands them out), so that all see the same figures and move the thresholds alike.
        """
        return collect(validated, batches(self._val_loader))

    def _open_board(self, progress: Progress) -> AbstractContextManager[Any]:
        if not self.fabric.is_global_zero:
            return nullcontext()
        from torch.utils.tensorboard import SummaryWriter

        # Viewers forget what earlier files say about the next epoch and later ones: none appears twice.
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=progress.epoch + 1)

    def _save(self, progress: Progress, parts: Mapping[str, Any]) -> None:
        """Write `last.pt`, from which `_load` goes on, whole or not at all."""
        if self.fabric.is_global_zero:
            training = {
                "options": asdict(self.options),
                "command": dict(self.command),
                "images": self.train.fingerprint(),
                "processes": self.fabric.world_size,
                "progress": asdict(progress),
                **{name: part.state_dict() for name, part in parts.items()},
            }
            save_checkpoint(self.folder / "last.pt", self.result, training=training)

    def _load(self, path: Path, parts: Mapping[str, Any]) -> Progress:
        """Take up a run where `_save` left it; `parts` are on their final device, where their tensors are copied to.

        With more epochs, other images (some were removed) or another number of processes it goes on, and says so.
        """
        training = read_training(path)
        say = echo if self.fabric.is_global_zero else lambda _: None
        if (epochs := self.options.epochs) > (before := training["options"]["epochs"]):
            say(f"{epochs} epochs instead of {before}: learning rates go on as in a run of that length")
        if (images := self.train.fingerprint()) != training["images"]:
            say(f"{path} was trained on {training['images']}, this run has {images}: it goes on with these")
        for name, part in parts.items():
            if state := training[name]:  # empty where the precision needs no scale
                part.load_state_dict(state)
        progress = Progress(**training["progress"])
        if (now := self.fabric.world_size) != (shared := training["processes"]):
            say(f"{now} processes instead of {shared}: each step learns from {now}/{shared} as many images")
            progress.move(progress.step * shared // now)
        if progress.step > self.steps_per_epoch:  # there are fewer images now
            progress.move(self.steps_per_epoch)
        return progress
