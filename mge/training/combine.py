"""How the experts' logits are combined: weights learned on held-out images, and whether a gate still weighs.

A gate is trained on images that the experts already know, where whom it trusts makes no difference to the loss: it may
come to trust one expert for every image, which then predicts alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mge.model import Average


def fit_average(gate: Average, logits: Tensor, labels: Tensor) -> None:
    """Learn the weights and the scale of an average from held-out images.

    A weight and a temperature for each expert are one number in a sum of logits, sum_k (w_k / T_k) logits_k: these K
    coefficients are learned, their sum is the scale. The likeliest under a prior that favors equal ones moves towards
    the plain average, an expert or a blend of the two, just as far as it must to name at least as many of these images
    right as the average and each expert do: there the result is never less accurate than they are.

    Args:
        gate: changed in place.
        logits: [N, K, C], of images that trained no expert.
        labels: [N] int64.
    """
    logits, labels = logits.detach().double().cpu(), labels.cpu()
    experts = logits.shape[1]
    alone = torch.eye(experts, dtype=torch.float64)
    equal = alone.sum(0) / experts

    def mixed(coefficients: Tensor) -> Tensor:
        return (coefficients[:, None] * logits).sum(1)

    def right(direction: Tensor) -> int:
        return int((mixed(direction).argmax(1) == labels).sum())

    likeliest = _coefficients(logits, labels, alone)
    floor, good = max(map(right, (equal, *alone))), list[Tensor]()
    goals = [equal, *(torch.lerp(equal, one, share) for share in (0.25, 0.5, 0.75, 1.0) for one in alone)]
    for share in (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0):
        directions = [torch.lerp(likeliest / likeliest.sum(), goal, share) for goal in goals]
        if good := [direction for direction in directions if right(direction) >= floor]:
            break
    scaled = [_coefficients(logits, labels, direction[None]) for direction in good]
    best = min(scaled, key=lambda found: float(F.cross_entropy(mixed(found), labels)))
    gate.weights.copy_(best / best.sum())
    gate.scale.copy_(best.sum())


def _coefficients(logits: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
    """The likeliest positive combination of directions [D, K], by L-BFGS on the logarithms: -> [K].

    Their prior is a normal distribution around their mean, of variance 1/2. On few images the likelihood alone trusts
    whoever was lucky: see docs/adr/0011-cheaper-chains-and-crops-of-the-source.md.
    """
    logarithms = torch.full((len(directions),), -math.log(len(directions)), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logarithms], max_iter=100, line_search_fn="strong_wolfe")

    def coefficients() -> Tensor:
        # Bounded: where every image is named right the likeliest scale is infinite.
        return logarithms.clamp(-7, 7).exp() @ directions

    def loss() -> Tensor:
        optimizer.zero_grad()
        mixed = (coefficients()[:, None] * logits).sum(1)
        value = F.cross_entropy(mixed, labels, reduction="sum")
        value = (value + (logarithms - logarithms.mean()).square().sum()) / len(labels)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType] - a tensor is what it asks for
    return coefficients().detach()


def balance(weights: Tensor) -> Tensor:
    """How unequal the mean weights of a batch are: K sum_k mean_k^2 - 1, 0 where all are equal, K - 1 for one alone.

    The squared coefficient of variation of Shazeer et al. 2017, "Outrageously large neural networks", section 4.

    Args:
        weights: [B, K], rows sum to 1.
    """
    return weights.shape[1] * weights.mean(0).square().sum() - 1
