"""Answers of a model on labelled images, and the table that sums them up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mge.metrics import box_areas, expected_calibration_error, log_softmax, top_k_correct
from mge.model import MGENet

__all__ = ["Answers", "Row", "collect", "summarize", "view_areas"]


@dataclass(frozen=True)
class Answers:
    """What a model said about N images."""

    labels: np.ndarray  # [N] int64
    heads: dict[str, np.ndarray]  # name -> logits [N, C], in the order of the table
    gate: np.ndarray  # [N, K]
    boxes: np.ndarray  # [N, K - 1, 4], crop k in pixels of the image that expert k sees
    heatmaps: tuple[Tensor, ...]  # K of [N, h, w]
    image_size: int  # pixels, the side of every expert's image

    @property
    def final(self) -> np.ndarray:
        """[N, C], the answer of the whole: the mixture, or the single expert's."""
        return list(self.heads.values())[-1]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    top1: float  # in [0, 1]
    top5: float  # in [0, 1]
    nll: float  # nats
    ece: float  # in [0, 1]


def collect(model: MGENet, batches: Iterable[tuple[Tensor, Tensor]]) -> Answers:
    """Run a model over (images, labels) batches, in evaluation mode, without labels' help; the mode is restored."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    labels, gates, boxes = [], [], []
    heads: dict[str, list[Tensor]] = {}
    heatmaps: list[list[Tensor]] = [[] for _ in model.experts]
    with torch.inference_mode():
        for images, targets in batches:
            output = model(images.to(device))
            labels.append(targets)
            gates.append(output.gate.float().cpu())
            for k, expert in enumerate(output.experts):
                for name, logits in (
                    (f"expert {k + 1} global", expert.global_logits),
                    (f"expert {k + 1} parts", expert.part_logits),
                    (f"expert {k + 1}", expert.logits),
                ):
                    heads.setdefault(name, []).append(logits.float().cpu())
                heatmaps[k].append(expert.heatmap.float().cpu())
            if len(output.experts) > 1:
                heads.setdefault("average", []).append(output.average.float().cpu())
                heads.setdefault("mixture", []).append(output.logits.float().cpu())
                crops = [expert.box for expert in output.experts if expert.box is not None]
                boxes.append(torch.stack(crops, 1).float().cpu())
    model.train(was_training)
    number = sum(len(part) for part in labels)
    last = ("average", "mixture")
    names = [name for name in heads if name not in last] + [name for name in last if name in heads]
    return Answers(
        labels=torch.cat(labels).numpy(),
        heads={name: torch.cat(heads[name]).numpy() for name in names},
        gate=torch.cat(gates).numpy(),
        boxes=torch.cat(boxes).numpy() if boxes else np.zeros((number, 0, 4), np.float32),
        heatmaps=tuple(torch.cat(maps) for maps in heatmaps),
        image_size=model.config.image_size,
    )


def summarize(answers: Answers) -> list[Row]:
    """One row for every head."""
    rows = []
    for name, logits in answers.heads.items():
        picked = log_softmax(logits)[np.arange(len(answers.labels)), answers.labels]
        rows.append(
            Row(
                name=name,
                top1=float(top_k_correct(logits, answers.labels, 1).mean()),
                top5=float(top_k_correct(logits, answers.labels, 5).mean()),
                nll=float(-picked.mean()),
                ece=expected_calibration_error(logits, answers.labels),
            )
        )
    return rows


def view_areas(answers: Answers) -> list[float]:
    """Median share of the first view that each of the K views shows, in (0, 1]; 1 for the first."""
    shares = np.cumprod(box_areas(answers.boxes, answers.image_size), axis=1)
    return [1.0, *(float(np.median(shares[:, k])) for k in range(shares.shape[1]))]
