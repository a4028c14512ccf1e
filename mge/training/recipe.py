"""The recipe of a training run: its options, losses, optimizer, learning rates and memory layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from mge.model import MGEOutput
from mge.training.combine import balance

__all__ = [
    "TrainOptions",
    "diversity",
    "hold_statistics",
    "loss_terms",
    "make_optimizer",
    "make_schedule",
    "to_training_layout",
]

FRAGILE_CHANNELS = 16  # input channels from which on no damage was seen, see `to_training_layout`


@dataclass(frozen=True)
class TrainOptions:
    """Everything that a run depends on besides the model and the images; the defaults are the paper's."""

    epochs: int = 100
    batch_size: int = 10  # images
    head_lr: float = 0.01  # of all layers outside the backbones; the peak rate under "onecycle"
    backbone_lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "step"  # "step", "onecycle" or "cosine"
    step_epochs: int = 30  # under "step": rates fall tenfold every so many epochs
    label_smoothing: float = 0.0  # in [0, 1)
    diversity: str = "code"  # form of the KL terms: "code", "paper" (see `diversity`) or "none"
    clip_norm: float | None = None  # largest norm of the gradient; None: not clipped
    gate_balance: float = 0.0  # weight of the term that keeps a gate from trusting one expert alone (`balance`)
    flip: bool = True  # random horizontal flips
    crop_area: tuple[
        float, ...
    ] = ()  # target share of each crop, in (0, 1], or one for all: thresholds follow; (): stay
    seed: int = 0
    workers: int = 2  # processes that decode images
    precision: str = "32-true"  # Lightning Fabric's name
    compile: bool = False  # torch.compile for the backbones


def diversity(logits: Tensor, previous: Tensor, labels: Tensor, form: str = "code") -> Tensor:
    """Reward two experts for disagreeing about the wrong classes: mean(exp(-Q (log Q - log P))).

    P = softmax(logits) and Q = softmax(previous), the true class taken out. Zhang et al. 2019, section 3.3.

    Args:
        logits: [B, C], expert k.
        previous: [B, C], expert k - 1; no gradient reaches it.
        labels: [B] int64.
        form: "code" zeroes the true class in both (and in log P) and leaves the rest as it is, as the authors' code
            does; "paper" renormalizes what is left over the C - 1 wrong classes, as the paper's text says.

    Returns:
        A scalar, about 1 where the experts agree, lower the more they differ.
    """
    wrong = torch.arange(logits.shape[1], device=logits.device) != labels[:, None]
    q, log_p = previous.detach().softmax(1) * wrong, logits.log_softmax(1)
    if form == "paper":
        q = q / q.sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
        log_p = log_p - log_p.masked_fill(~wrong, float("-inf")).logsumexp(1, keepdim=True)
    divergence = torch.xlogy(q, q) - q * torch.where(wrong, log_p, 0)
    return torch.exp(-divergence).mean()


def loss_terms(
    output: MGEOutput,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    diversity_form: str = "code",
    gate_balance: float = 0.0,
) -> dict[str, Tensor]:
    """Every term of the training loss by name; the loss is their plain sum (all weights are 1 in the paper).

    Args:
        output: of a forward pass with these labels.
        labels: [B] int64.
        label_smoothing: in [0, 1), of the cross-entropies.
        diversity_form: "code", "paper" or "none".
        gate_balance: weight of the term `balance`; 0 leaves it out.

    Returns:
        Scalars: `global_k`, `part_k`, `concat_k` for k = 1..K, `diversity_k` for k = 2..K, and `mixture` and `balance`
        where there is a gate to train.
    """

    def entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    terms: dict[str, Tensor] = {}
    for k, expert in enumerate(output.experts, 1):
        terms[f"global_{k}"] = entropy(expert.global_logits)
        terms[f"part_{k}"] = entropy(expert.part_logits)
        terms[f"concat_{k}"] = entropy(expert.logits)
    if output.gate.requires_grad:
        terms["mixture"] = entropy(output.logits)
        if gate_balance:
            terms["balance"] = gate_balance * balance(output.gate)
    if diversity_form != "none":
        for k, (before, expert) in enumerate(zip(output.experts, output.experts[1:], strict=False), 2):
            terms[f"diversity_{k}"] = diversity(expert.logits, before.logits, labels, diversity_form)
    return terms


def make_optimizer(model: nn.Module, options: TrainOptions) -> SGD:
    """SGD with one rate for the backbones (they start from ImageNet) and one for everything else."""
    backbones = [parameter for name, parameter in model.named_parameters() if "backbone." in name]
    others = [parameter for name, parameter in model.named_parameters() if "backbone." not in name]
    groups = [{"params": backbones, "lr": options.backbone_lr}, {"params": others, "lr": options.head_lr}]
    return SGD(groups, momentum=options.momentum, weight_decay=options.weight_decay)


def make_schedule(optimizer: Optimizer, options: TrainOptions, steps_per_epoch: int, done: int = 0) -> LRScheduler:
    """A schedule that is stepped after every batch, `steps_per_epoch` times an epoch, and begins after `done` steps.

    The rates depend on nothing else, so a schedule need not be saved.
    """
    total, last = options.epochs * steps_per_epoch, done - 1
    if options.schedule == "onecycle":
        rates = [options.backbone_lr, options.head_lr]
        # At least two steps, or the cycle has no room to turn.
        return OneCycleLR(optimizer, rates, max(total, 2), cycle_momentum=False, last_epoch=last)
    if options.schedule == "cosine":
        return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total, 1))), last)
    return LambdaLR(optimizer, lambda step: 0.1 ** (step // (options.step_epochs * steps_per_epoch)), last)


def hold_statistics(backbone: nn.Module) -> None:
    """Let BatchNorms normalize by their running statistics, as in evaluation; `train()` ends it.

    Whole images and crops differ in their statistics, of which a shared backbone keeps one set for all passes: its
    weights must learn with it.
    """
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def to_training_layout(model: nn.Module, device: torch.device) -> None:
    """Put a model into channels_last, in place: 1.5 times faster on CPUs, and what tensor cores want.

    On a CPU, 1x1 convolutions of stride 2 over few channels (stems of RepVGG, MobileOne, FastViT) keep out of it: their
    backward pass writes past its buffers in channels_last (torch 2.14.1; 1 to 15 input channels, 16 and more hold, so
    do strides 3 and 4). The layers around them stay as they are.
    """
    model.to(memory_format=torch.channels_last)
    if device.type != "cpu":
        return
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and max(module.stride) > 1
            and module.in_channels < FRAGILE_CHANNELS
        ):
            # A clone: a 1x1 kernel counts as contiguous whatever its strides, by which PyTorch chooses the layout.
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
            if _to_contiguous not in module._forward_pre_hooks.values():  # a second `fit` finds them there
                module.register_forward_pre_hook(_to_contiguous)
                module.register_forward_hook(_to_channels_last)


def _to_contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def _to_channels_last(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.contiguous(memory_format=torch.channels_last)
