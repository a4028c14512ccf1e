"""Answers on labelled images, of a model or a bundle, and the figures that sum them up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mge.metrics import top_k_correct, view_areas
from mge_runtime.metrics import calibration_error, log_softmax
from mge_runtime.preprocess import Viewport, compose_boxes

if TYPE_CHECKING:
    from torch import Tensor

    from mge.model import MGENet
    from mge_runtime.pipeline import Pipeline

__all__ = ["Answers", "Row", "collect", "collect_bundle", "median_areas", "summarize"]


@dataclass(frozen=True)
class Answers:
    """What was said about N images."""

    labels: np.ndarray  # [N] int64
    heads: dict[str, np.ndarray]  # name -> logits [N, C], in the order of the table; the last is the whole's answer
    gate: np.ndarray  # [N, K], rows sum to 1
    views: np.ndarray  # [N, K, 4], what each expert saw, in pixels of the source image
    heatmaps: tuple[Tensor, ...] = ()  # K of [N, h, w]; empty for a bundle
    temperature: float | None = None  # of the whole's answer, where a bundle's calibration learned one

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
    ece: float  # in [0, 1], over 15 bins of equal mass (`mge_runtime.metrics.calibration_error`)
    # The same after the temperature that the bundle's calibration learned for this answer; None: it learned none.
    calibrated_nll: float | None = None
    calibrated_ece: float | None = None


def collect(model: MGENet, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Answers:
    """Run a model over the batches of a `FolderDataset`, in evaluation mode; its mode is restored afterwards.

    The labels are only recorded: attention looks for each expert's own first guess, as on a device.
    """
    import torch  # here: a bundle is evaluated without it

    device = next(model.parameters()).device
    size = model.config.image_size
    was_training = model.training
    model.eval()
    labels: list[Tensor] = []
    gates: list[Tensor] = []
    views: list[np.ndarray] = []
    heads: dict[str, list[Tensor]] = {}
    heatmaps: list[list[Tensor]] = [[] for _ in model.experts]
    with torch.no_grad():  # not inference mode: with torch up to 2.11 it makes Grad-CAM's gradient zero, silently
        for images, targets, viewports in batches:
            output = model(images.to(device))
            labels.append(targets.cpu())
            gates.append(output.gate.float().cpu())
            crops = [expert.box.cpu() for expert in output.experts if expert.box is not None]
            boxes = torch.stack(crops, 1).numpy() if crops else np.zeros((len(images), 0, 4))
            for row, viewport in zip(boxes, viewports.cpu().tolist(), strict=True):
                views.append(compose_boxes(row, Viewport(*viewport[:4], *map(int, viewport[4:])), size))
            for k, expert in enumerate(output.experts):
                heads.setdefault(f"expert {k + 1} global", []).append(expert.global_logits.float().cpu())
                heads.setdefault(f"expert {k + 1} parts", []).append(expert.part_logits.float().cpu())
                heads.setdefault(f"expert {k + 1}", []).append(expert.logits.float().cpu())
                heatmaps[k].append(expert.heatmap.float().cpu())
            if crops:
                heads.setdefault("average", []).append(output.average.float().cpu())
                heads.setdefault("mixture", []).append(output.logits.float().cpu())
    model.train(was_training)
    return Answers(
        labels=torch.cat(labels).numpy(),
        heads={name: torch.cat(parts).numpy() for name, parts in heads.items()},
        gate=torch.cat(gates).numpy(),
        views=np.stack(views),
        heatmaps=tuple(torch.cat(maps) for maps in heatmaps),
    )


def collect_bundle(
    pipeline: Pipeline, samples: Sequence[tuple[Path, int]], batch: int = 1, workers: int = 2
) -> Answers:
    """Run a bundle over labelled images; it answers with the experts, their average and the mixture only.

    Logits are those of the graphs; the temperature of the whole's answer in a calibrated bundle stands beside them.

    Raises:
        InputError: an image cannot be read.
    """
    predictions = []
    for _, prediction in pipeline.predict_iter([path for path, _ in samples], batch=batch, workers=workers):
        if isinstance(prediction, Exception):
            raise prediction
        predictions.append(prediction)
    experts = np.stack([prediction.expert_logits for prediction in predictions], 1)
    heads = {f"expert {k}": logits for k, logits in enumerate(experts, 1)}
    if len(experts) > 1:
        heads["average"] = experts.mean(0)
        heads["mixture"] = np.stack([prediction.logits for prediction in predictions])
    ones = np.ones(len(experts))
    return Answers(
        labels=np.array([label for _, label in samples]),
        heads=heads,
        gate=np.stack([ones if prediction.gate is None else prediction.gate for prediction in predictions]),
        views=np.stack([prediction.boxes for prediction in predictions]),
        temperature=predictions[0].temperature,
    )


def summarize(answers: Answers) -> list[Row]:
    """One row for every head; the last one's is the whole's answer, for which a calibrated bundle has a temperature."""
    rows = []
    for name, logits in answers.heads.items():
        nll, ece = _quality(logits, answers.labels)
        row = Row(
            name=name,
            top1=float(top_k_correct(logits, answers.labels, 1).mean()),
            top5=float(top_k_correct(logits, answers.labels, 5).mean()),
            nll=nll,
            ece=ece,
        )
        rows.append(row)
    if answers.temperature is not None:
        nll, ece = _quality(answers.final / answers.temperature, answers.labels)
        rows[-1] = replace(rows[-1], calibrated_nll=nll, calibrated_ece=ece)
    return rows


def _quality(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean negative log-likelihood and expected calibration error."""
    log_probabilities = log_softmax(logits)
    picked = log_probabilities[np.arange(len(labels)), labels]
    confidence = np.exp(log_probabilities.max(1))
    return float(-picked.mean()), calibration_error(confidence, top_k_correct(logits, labels))


def median_areas(answers: Answers) -> list[float]:
    """Median share of the first view that each of the K views shows, in (0, 1]; 1 for the first."""
    return [float(area) for area in np.median(view_areas(answers.views), axis=0)]
