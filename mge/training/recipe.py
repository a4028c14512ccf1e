"""What `TrainOptions` ask for: losses, optimizer, learning rates and memory layout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage] - where timm documents it
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mge.model import Expert, Gate, MGEOutput
from mge.training.combine import balance
from mge.training.options import TrainOptions
from mge_runtime.errors import TrainingError

FRAGILE_CHANNELS = 16  # input channels from which on no damage was seen, see `to_training_layout`
LAYER = 12  # parameters of a backbone, in their order, that are a layer (timm's `auto_group_layers`)
SOFTNESS = 2.0  # temperature of the distillation


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
    distill: float = 0.0,
) -> dict[str, Tensor]:
    """Every term of the training loss by name; the loss is their plain sum (all weights are 1 in the paper).

    Args:
        output: of a forward pass with these labels.
        labels: [B] int64.
        label_smoothing: in [0, 1), of the cross-entropies.
        diversity_form: "code", "paper" or "none".
        gate_balance: weight of the term `balance`; 0 leaves it out.
        distill: weight of the terms `distillation`; 0 leaves them out.

    Returns:
        Scalars: `global_k`, `part_k`, `concat_k` for k = 1..K, `diversity_k` for k = 2..K, `distill_k` for k = 1..K-1,
        and `mixture` and `balance` where there is a gate to train.
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
    if distill:
        for k, expert in enumerate(output.experts[:-1], 1):
            # The first of them trains the backbone, the second the head that exits read.
            distances = distillation(expert.global_logits, output.logits) + distillation(expert.logits, output.logits)
            terms[f"distill_{k}"] = distill * distances
    return terms


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """How far predictions are from a teacher's: T^2 KL(softmax(teacher / T) || softmax(logits / T)), mean of the batch.

    Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2; the last exit as the teacher of the
    ones before it, late in training, as in Phuong and Lampert 2019, "Distillation-based training for multi-exit
    architectures". T is `SOFTNESS`.

    Args:
        logits: [B, C].
        teacher: logits [B, C]; no gradient reaches them.
    """
    student, target = ((values / SOFTNESS).log_softmax(1) for values in (logits, teacher.detach()))
    return SOFTNESS**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


def make_optimizer(model: nn.Module, options: TrainOptions) -> Optimizer:
    """An optimizer of timm's with rates for the backbones (they start from ImageNet) and one for everything else.

    The first group holds the backbones' last layers at `backbone_lr`, the next ones the layers before, each at
    `layer_decay` times the rate of the one behind it, the last group everything else at `head_lr`.
    """
    layers: defaultdict[int, list[nn.Parameter]] = defaultdict(list)  # by how many layers follow
    inside = [item for item in model.named_parameters() if "backbone." in item[0]]
    for _, items in groupby(inside, key=lambda item: item[0].partition("backbone.")[0]):
        parameters = [parameter for _, parameter in items]
        for place, parameter in enumerate(parameters, 1):
            layers[(len(parameters) - place) // LAYER if options.layer_decay < 1 else 0].append(parameter)
    groups = [
        {"params": layers[depth], "lr": options.backbone_lr * options.layer_decay**depth} for depth in sorted(layers)
    ]
    others = [parameter for name, parameter in model.named_parameters() if "backbone." not in name]
    groups.append({"params": others, "lr": options.head_lr})
    name = "momentum" if options.optimizer == "sgd" else options.optimizer  # timm's "sgd" is Nesterov's
    return create_optimizer_v2(groups, name, weight_decay=options.weight_decay, momentum=options.momentum)


def make_schedule(optimizer: Optimizer, options: TrainOptions, steps_per_epoch: int, done: int = 0) -> LRScheduler:
    """A schedule that is stepped after every batch, `steps_per_epoch` times an epoch, and begins after `done` steps.

    The rates depend on nothing else, so a schedule need not be saved.
    """
    total, last = options.epochs * steps_per_epoch, done - 1
    if options.schedule == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        # At least two steps, or the cycle has no room to turn.
        return OneCycleLR(optimizer, rates, max(total, 2), cycle_momentum=False, last_epoch=last)
    warmup = round(min(options.warmup_epochs * steps_per_epoch, total - 1))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if options.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / (total - warmup), 1)))
        return 0.1 ** (step // (options.step_epochs * steps_per_epoch))

    return LambdaLR(optimizer, factor, last)


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, most: float, updates: int) -> None:
    """Move weights and BatchNorm statistics to d average + (1 - d) model, in place.

    d begins at 0 and rises to `most` with the number of updates before, so that an average of a short run is not one of
    its beginning: 1 - (1 + updates)^(-2/3), as timm's ModelEmaV3 has it. (That one goes through the state dict, where a
    module that others share stands several times, and would move it as often.)
    """
    decay = min(1 - (1 + updates) ** (-2 / 3), most)
    pairs = zip(*([*module.parameters(), *module.buffers()] for module in (average, model)), strict=True)
    averages, latest = zip(*((one, other) for one, other in pairs if one.is_floating_point()), strict=True)
    get_ema_multi_avg_fn(decay)(averages, latest, updates)


def freeze(model: nn.Module, stride: int) -> list[nn.Module]:
    """Let the layers of every backbone up to its features of a stride keep their weights: half the time of a step.

    Returns:
        These layers, whose statistics are to be held in each epoch.

    Raises:
        TrainingError: the backbone has no features of this stride.
    """
    frozen: list[nn.Module] = []
    for part in model.modules():
        if not isinstance(part, Expert | Gate):
            continue
        backbone: Any = part.backbone
        names = {level["reduction"]: level["module"].replace(".", "_") for level in backbone.feature_info.info}
        if stride not in names:
            raise TrainingError(f"--freeze {stride}: expected a stride of its features, {', '.join(map(str, names))}")
        # In the order of their definition, which is that of computation; timm calls stages.0 stages_0 at times.
        layers = [(f"{name}.".replace(".", "_"), layer) for name, layer in backbone.named_modules()]
        last = max(place for place, (name, _) in enumerate(layers) if name.startswith(names[stride] + "_"))
        frozen += [layer for _, layer in layers[: last + 1]]
    for layer in frozen:
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
    return frozen


def hold_statistics(layers: Iterable[nn.Module]) -> None:
    """Let BatchNorms normalize by their running statistics, as in evaluation; `train()` ends it.

    For layers that are frozen; and for a shared backbone late in training: whole images and crops differ in their
    statistics, of which it keeps one set for all passes, and its weights must learn with it.
    """
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


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
