"""What a training run carries from step to step, and how it is saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mge.checkpoint import read_checkpoint, save_checkpoint
from mge.model import MGENet
from mge.training.options import TrainOptions
from mge_runtime.errors import TrainingError

__all__ = ["Progress", "load_progress", "save_progress"]


@dataclass
class Progress:
    """Where a run stands. Everything random hangs on (seed, epoch, index) or torch's generator, so this is all."""

    epoch: int = 0  # the epoch that comes next, or that goes on
    step: int = 0  # batches of it that are done
    sums: dict[str, float] = field(default_factory=dict)  # loss terms over those batches
    history: list[dict[str, float]] = field(default_factory=list)  # one row for each finished epoch
    best: float = -1.0  # highest validation accuracy so far, in [0, 1]
    kept: float = -1.0  # validation accuracy of the epoch in best.pt, in [0, 1]


def save_progress(
    path: Path, model: MGENet, progress: Progress, options: TrainOptions, images: str, optimizer: Any, schedule: Any
) -> None:
    """Write a checkpoint that `load_progress` can go on from, whole or not at all; `images` names the training set."""
    training = {
        "options": asdict(options),
        "images": images,
        "progress": asdict(progress),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
    }
    save_checkpoint(path, model, training=training)


def load_progress(path: Path, options: TrainOptions, images: str, optimizer: Any, schedule: Any) -> Progress:
    """Take up a run where `save_progress` left it; the model's weights are loaded by `mge.checkpoint`.

    Raises:
        TrainingError: the file holds no training state, or was trained with other options or images.
    """
    training = read_checkpoint(path).training
    if training is None:
        raise TrainingError(f"{path} holds a model but no training state; expected last.pt of an unfinished run")
    ours = {key: value for key, value in asdict(options).items() if key not in {"workers"}}
    theirs = {key: value for key, value in training["options"].items() if key not in {"workers"}}
    if changed := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        differences = ", ".join(f"{key} = {theirs.get(key)} (now {ours.get(key)})" for key in changed)
        raise TrainingError(f"{path} was trained with {differences}; expected the same options to resume exactly")
    if training.get("images") != images:
        raise TrainingError(
            f"{path} was trained on {training.get('images', 'unknown images')}, this run has {images}; "
            "expected the same images to resume exactly"
        )
    optimizer.load_state_dict(training["optimizer"])
    schedule.load_state_dict(training["schedule"])
    torch.set_rng_state(training["random"])
    return Progress(**training["progress"])
