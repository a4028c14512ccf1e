"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from mge.training.options import TrainOptions

__all__ = ["make_optimizer", "make_schedule"]


def make_optimizer(model: nn.Module, options: TrainOptions) -> SGD:
    """SGD with one rate for the trunks (they start from ImageNet) and one for everything else."""
    trunks = [parameter for name, parameter in model.named_parameters() if "trunk." in name]
    others = [parameter for name, parameter in model.named_parameters() if "trunk." not in name]
    groups = [{"params": trunks, "lr": options.trunk_lr}, {"params": others, "lr": options.head_lr}]
    return SGD(groups, momentum=options.momentum, weight_decay=options.weight_decay)


def make_schedule(optimizer: Optimizer, options: TrainOptions, steps_per_epoch: int) -> LRScheduler:
    """A schedule that is stepped after every batch."""
    total = options.epochs * steps_per_epoch
    if options.schedule == "onecycle":
        # At least two steps, or the cycle has no room to turn.
        return OneCycleLR(
            optimizer, [options.trunk_lr, options.head_lr], total_steps=max(total, 2), cycle_momentum=False
        )
    if options.schedule == "cosine":
        return LambdaLR(optimizer, _Cosine(total))
    return LambdaLR(optimizer, _Step(options.step_epochs * steps_per_epoch))


class _Cosine:
    """A callable object, not a lambda: the scheduler's state can then be saved."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __call__(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step / self.total, 1)))


class _Step:
    def __init__(self, every: int) -> None:
        self.every = every

    def __call__(self, step: int) -> float:
        return 0.1 ** (step // self.every)
