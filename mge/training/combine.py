"""How the experts' logits are combined: weights learned on held-out images, and whether a gate still weighs.

A gate is trained on images that the experts already know, where whom it trusts makes no difference to the loss: it may
come to trust one expert for every image, which then answers alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mge.model import Average

__all__ = ["balance", "fit_average"]


def fit_average(gate: Average, logits: Tensor, labels: Tensor) -> None:
    """Learn the weights and the scale of an average by maximum likelihood.

    A weight and a temperature for each expert are one number in a sum of logits, sum_k (w_k / T_k) logits_k: these K
    coefficients are learned, their sum is the scale. The plain average, each expert alone and blends of the two are
    tried, too, each with a scale of its own, and what names most images right is taken, of equal ones the likeliest: on
    these images the result is never less accurate than any of them.

    Args:
        gate: changed in place.
        logits: [N, K, C], of images that trained no expert.
        labels: [N] int64.
    """
    logits, labels = logits.detach().double().cpu(), labels.cpu()
    experts = logits.shape[1]
    alone = torch.eye(experts, dtype=torch.float64)
    equal = alone.sum(0) / experts
    # On few images an expert may be ahead by one of them: what lies between it and the average is likelier.
    directions = [equal, *(share * one + (1 - share) * equal for share in (0.25, 0.5, 0.75, 1.0) for one in alone)]
    found = [_coefficients(logits, labels, direction[None]) for direction in directions]
    found.append(_coefficients(logits, labels, alone))

    def score(coefficients: Tensor) -> tuple[int, float]:
        mixed = (coefficients[:, None] * logits).sum(1)
        return int((mixed.argmax(1) == labels).sum()), -float(F.cross_entropy(mixed, labels))

    best = max(found, key=score)
    gate.weights.copy_(best / best.sum())
    gate.scale.copy_(best.sum())


def _coefficients(logits: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
    """The likeliest positive combination of directions [D, K], by L-BFGS on the logarithms: -> [K]."""
    logarithms = torch.full((len(directions),), -math.log(len(directions)), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logarithms], max_iter=100, line_search_fn="strong_wolfe")

    def coefficients() -> Tensor:
        # Bounded: where every image is named right the likeliest scale is infinite.
        return logarithms.clamp(-7, 7).exp() @ directions

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy((coefficients()[:, None] * logits).sum(1), labels)
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
