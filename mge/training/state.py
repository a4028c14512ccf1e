"""What a training run carries from step to step, and how it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mge.checkpoint import read_checkpoint, save_checkpoint
from mge.model import MGENet
from mge.training.options import TrainOptions
from mge_runtime.errors import TrainingError

__all__ = ["Progress", "Stateful", "load_progress", "save_progress", "seed_step"]


class Stateful(Protocol):
    """An optimiser, a schedule, a precision plugin (whose state is the scale of the loss under 16-mixed)."""

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
    """
    training = {
        "options": asdict(options) | {"devices": processes},
        "images": images,
        "progress": asdict(progress),
        **{name: part.state_dict() for name, part in parts.items()},
    }
    save_checkpoint(path, model, training=training)


def load_progress(
    path: Path, options: TrainOptions, parts: Mapping[str, Stateful], *, images: str, processes: int = 1
) -> Progress:
    """Take up a run where `save_progress` left it; the model's weights are loaded by `mge.checkpoint`.

    Give it `parts` on their final device: tensors are copied to where the weights lie.

    Raises:
        TrainingError: the file holds no training state, or was trained with other options or images.
    """
    training = read_checkpoint(path).training
    if training is None:
        raise TrainingError(f"{path} holds a model but no training state; expected last.pt of an unfinished run")
    ours = _decisive(asdict(options) | {"devices": processes})
    theirs = _decisive({"devices": 1} | training["options"])
    if changed := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        differences = ", ".join(f"{key} = {theirs.get(key)} (now {ours.get(key)})" for key in changed)
        raise TrainingError(f"{path} was trained with {differences}; expected the same options to resume exactly")
    if training.get("images") != images:
        raise TrainingError(
            f"{path} was trained on {training.get('images', 'unknown images')}, this run has {images}; "
            "expected the same images to resume exactly"
        )
    for name, part in parts.items():
        if state := training.get(name):  # empty where the precision needs no scale
            part.load_state_dict(state)
    return Progress(**training["progress"])


def _decisive(options: dict[str, Any]) -> dict[str, Any]:
    """The options that change what is learned."""
    return {key: value for key, value in options.items() if key != "workers"}
