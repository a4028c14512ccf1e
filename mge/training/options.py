"""Everything that a training run depends on besides the model and the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mge_runtime.errors import TrainingError

__all__ = ["SCHEDULES", "TrainOptions", "require_as_many_epochs"]

SCHEDULES = ("step", "onecycle", "cosine")


@dataclass(frozen=True)
class TrainOptions:
    """Defaults are the paper's."""

    epochs: int = 100
    batch_size: int = 10  # images
    head_lr: float = 0.01  # of all layers outside the trunks; the peak rate under "onecycle"
    trunk_lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "step"  # one of SCHEDULES
    step_epochs: int = 30  # under "step": rates fall tenfold every so many epochs
    label_smoothing: float = 0.0  # in [0, 1)
    diversity: str = "code"  # one of mge.training.losses.DIVERSITY_FORMS
    clip_norm: float | None = None  # largest norm of the gradient; None: not clipped
    flip: bool = True  # random horizontal flips
    crop_area: float | None = None  # target share of each crop, in (0, 1]: thresholds follow it; None: they stay
    seed: int = 0
    workers: int = 2  # processes that decode images
    precision: str = "32-true"  # Lightning Fabric's name
    compile: bool = False  # torch.compile for the backbones


def require_as_many_epochs(path: Path, epochs: int, before: int) -> None:
    """Refuse to go on with a run for fewer epochs than it was to have.

    Raises:
        TrainingError: so it is; `path` is the run's file.
    """
    if epochs < before:
        raise TrainingError(f"{path} was trained with epochs = {before} (now {epochs}); expected as many or more")
