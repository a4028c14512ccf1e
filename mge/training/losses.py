"""The paper's losses: cross-entropy on every head and the mixture, and diversity between neighbouring experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mge.model import MGEOutput

__all__ = ["DIVERSITY_FORMS", "diversity", "loss_terms"]

DIVERSITY_FORMS = ("code", "paper", "none")


def diversity(logits: Tensor, previous: Tensor, labels: Tensor, form: str = "code") -> Tensor:
    """Reward two experts for disagreeing about the wrong classes: mean(exp(-Q (log Q - log P))).

    P = softmax(logits) and Q = softmax(previous), the true class taken out. Zhang et al. 2019, section 3.3.

    Args:
        logits: [B, C], expert k.
        previous: [B, C], expert k - 1; no gradient reaches it.
        labels: [B] int64.
        form: "code" zeroes the true class in both (and in log P) and leaves the rest as it is, as the authors' code
            does; "paper" renormalises what is left over the C - 1 wrong classes, as the paper's text says.

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
    output: MGEOutput, labels: Tensor, *, label_smoothing: float = 0.0, diversity_form: str = "code"
) -> dict[str, Tensor]:
    """Every term of the training loss by name; the loss is their plain sum (all weights are 1 in the paper).

    Args:
        output: of a forward pass with these labels.
        labels: [B] int64.
        label_smoothing: in [0, 1), of the cross-entropies.
        diversity_form: one of `DIVERSITY_FORMS`.

    Returns:
        Scalars: `global_k`, `part_k`, `concat_k` for k = 1..K, `mixture` and `diversity_k` for k = 2..K. A single
        expert has no mixture (it would train its answer twice).
    """

    def entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    terms: dict[str, Tensor] = {}
    for k, expert in enumerate(output.experts, 1):
        terms[f"global_{k}"] = entropy(expert.global_logits)
        terms[f"part_{k}"] = entropy(expert.part_logits)
        terms[f"concat_{k}"] = entropy(expert.logits)
    if len(output.experts) > 1:
        terms["mixture"] = entropy(output.logits)
    if diversity_form != "none":
        for k, (before, expert) in enumerate(zip(output.experts, output.experts[1:], strict=False), 2):
            terms[f"diversity_{k}"] = diversity(expert.logits, before.logits, labels, diversity_form)
    return terms
