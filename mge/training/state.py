"""What a training run carries from step to step, and how it is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mge.checkpoint import read_checkpoint, save_checkpoint
from mge.model import MGENet
from mge.training.options import TrainOptions, require_as_many_epochs
from mge_runtime.errors import TrainingError

__all__ = ["Progress", "Stateful", "load_progress", "save_progress", "seed_step"]


class Stateful(Protocol):
    """An optimiser, a precision plugin (whose state is the scale of the loss under 16-mixed)."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take up what `state_dict` gave."""
        ...


@dataclass
class Progress:
    """Where a run stands. Everything random hangs on (seed, epoch, index) or `seed_step`, so this is all."""

    epoch: int = 0  # the epoch that comes next, or that goes on
    step: int = 0  # batches of it that are done
    sums: dict[str, float] = field(default_factory=dict)  # loss terms over those batches
    history: list[dict[str, float]] = field(default_factory=list)  # one row for each finished epoch
    best: float = -1.0  # highest validation accuracy so far, in [0, 1]
    kept: float = -1.0  # validation accuracy of the epoch in best.pt, in [0, 1]
    rates: list[float] = field(default_factory=list)  # of trunks and heads in the last step

    def move(self, step: int) -> None:
        """Go to another step of the epoch, where steps mean other images than before; the mean losses stay."""
        share = step / self.step if self.step else 0.0
        self.step, self.sums = step, {name: value * share for name, value in self.sums.items()}


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed torch's generators (of every device) for one step: what dropout and stochastic depth draw from.

    A run that is resumed in the middle of an epoch then draws what the whole one did, on every process and whatever
    else has used the generators in between (a loader draws a number each time it is iterated).

    Args:
        seed: of the run.
        epoch: from 0.
        step: of the epoch, from 0.
        rank: of this process.
    """
    # The key of a child, so that these numbers are not those of sample_generator's (seed, epoch, index).
    sequence = np.random.SeedSequence((seed, epoch, step), spawn_key=(rank,))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def save_progress(
    path: Path,
    model: MGENet,
    progress: Progress,
    options: TrainOptions,
    parts: Mapping[str, Stateful],
    *,
    images: str,
    processes: int = 1,
    command: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that `load_progress` can go on from, whole or not at all.

    Args:
        path: replaced if it exists.
        model: not wrapped for distribution.
        progress: where the run stands.
        options: of the run.
        parts: whatever else has a state, by name.
        images: names the training set.
        processes: that share each step.
        command: what the command was asked for, as plain values, so that `--resume` alone can go on.
    """
    training = {
        "options": asdict(options) | {"devices": processes},
        "command": dict(command or {}),
        "images": images,
        "progress": asdict(progress),
        **{name: part.state_dict() for name, part in parts.items()},
    }
    save_checkpoint(path, model, training=training)


def load_progress(
    path: Path,
    options: TrainOptions,
    parts: Mapping[str, Stateful],
    *,
    images: str,
    processes: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Progress:
    """Take up a run where `save_progress` left it; the model's weights are loaded by `mge.checkpoint`.

    Give it `parts` on their final device: tensors are copied to where the weights lie.

    Args:
        path: of the checkpoint.
        options: those of the run; `epochs` may have grown.
        parts: as they were saved.
        images: names the training set. Another one than before (images were removed) goes on, no longer exactly.
        processes: that share each step. Another number than before goes on, no longer exactly.
        say: is told of another training set, another number of processes or more epochs.

    Raises:
        TrainingError: the file holds no training state, or was trained with other options.
    """
    training = read_checkpoint(path).training
    if training is None:
        raise TrainingError(f"{path} holds a model but no training state; expected last.pt of an unfinished run")
    ours, theirs = _decisive(asdict(options)), _decisive(training["options"])
    if changed := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        differences = ", ".join(f"{key} = {theirs.get(key)} (now {ours.get(key)})" for key in changed)
        raise TrainingError(f"{path} was trained with {differences}; expected the same options to resume exactly")
    before = training["options"]["epochs"]
    require_as_many_epochs(path, options.epochs, before)
    if options.epochs > before:
        say(f"{options.epochs} epochs instead of {before}: learning rates go on as in a run of that length")
    if training.get("images") != images:
        say(
            f"{path} was trained on {training.get('images', 'unknown images')}, this run has {images}: it goes on with "
            "these, in their own order"
        )
    for name, part in parts.items():
        if state := training.get(name):  # empty where the precision needs no scale
            part.load_state_dict(state)
    progress = Progress(**training["progress"])
    if (shared := training["options"].get("devices", 1)) != processes:
        say(f"{processes} processes instead of {shared}: each step learns from {processes}/{shared} as many images")
        progress.move(progress.step * shared // processes)
    return progress


def _decisive(options: dict[str, Any]) -> dict[str, Any]:
    """The options that must not change (`epochs` may grow, `devices` change what a step learns from, which is said)."""
    return {key: value for key, value in options.items() if key not in ("workers", "epochs", "compile", "devices")}
