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


def make_schedule(optimizer: Optimizer, options: TrainOptions, steps_per_epoch: int, done: int = 0) -> LRScheduler:
    """A schedule that is stepped after every batch.

    Args:
        optimizer: with the state of its last step, where some are done.
        options: of the run.
        steps_per_epoch: batches.
        done: steps before this one; the rates depend on nothing else, so the schedule itself need not be saved.
    """
    total, last = options.epochs * steps_per_epoch, done - 1
    if options.schedule == "onecycle":
        # At least two steps, or the cycle has no room to turn.
        return OneCycleLR(
            optimizer,
            [options.trunk_lr, options.head_lr],
            total_steps=max(total, 2),
            cycle_momentum=False,
            last_epoch=last,
        )
    if options.schedule == "cosine":
        return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total, 1))), last)
    return LambdaLR(optimizer, lambda step: 0.1 ** (step // (options.step_epochs * steps_per_epoch)), last)
