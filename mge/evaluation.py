"""Predictions on labeled images, of a model or a bundle: the figures of the paper's table, as text and as a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mge.parts import part_report, read_parts, view_areas
from mge_runtime.errors import InputError
from mge_runtime.files import atomic_path, echo
from mge_runtime.metrics import calibration_error, log_softmax
from mge_runtime.preprocess import Viewport, compose_boxes

if TYPE_CHECKING:
    from torch import Tensor

    from mge.model import MGENet
    from mge_runtime.pipeline import Pipeline

__all__ = [
    "Predictions",
    "Row",
    "collect",
    "collect_bundle",
    "figures",
    "gate_report",
    "print_table",
    "summarize",
    "top_k_correct",
]

COLLAPSED = 0.95  # mean weight of one expert above which the others change next to nothing


@dataclass(frozen=True)
class Predictions:
    """What was predicted for N images."""

    labels: np.ndarray  # [N] int64
    heads: dict[str, np.ndarray]  # name -> logits [N, C], in the order of the table; the last are the final ones
    gate: np.ndarray  # [N, K], rows sum to 1
    views: np.ndarray  # [N, K, 4], what each expert saw, in pixels of the source image
    heatmaps: tuple[Tensor, ...] = ()  # K of [N, h, w]; empty for a bundle
    temperature: float | None = None  # of the final logits, where a bundle's calibration learned one

    @property
    def final(self) -> np.ndarray:
        """[N, C], the final logits: the mixture's, or the single expert's."""
        return list(self.heads.values())[-1]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    top1: float  # in [0, 1]
    top5: float  # in [0, 1]
    nll: float  # nats
    ece: float  # in [0, 1], over 15 bins of equal mass (`mge_runtime.metrics.calibration_error`)
    # The same after the temperature that the bundle's calibration learned for these logits; None: it learned none.
    calibrated_nll: float | None = None
    calibrated_ece: float | None = None


def collect(model: MGENet, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Predictions:
    """Run a model over the batches of a `FolderDataset`, in evaluation mode; its mode is restored afterwards.

    The labels are only recorded: attention looks for each expert's own first guess, as on a device.
    """
    import torch  # here: a bundle is evaluated without it

    from mge.data.folder import normalize

    device = next(model.parameters()).device
    crops = model.config.crops
    was_training = model.training
    model.eval()
    labels: list[Tensor] = []
    gates: list[Tensor] = []
    views: list[np.ndarray] = []
    heads: dict[str, list[Tensor]] = {}
    heatmaps: list[list[Tensor]] = [[] for _ in model.experts]
    with torch.no_grad():  # not inference mode: with torch up to 2.11 it makes Grad-CAM's gradient zero, silently
        for frames, targets, viewports in batches:
            output = model(normalize(frames.to(device), model.config).contiguous())
            labels.append(targets.cpu())
            gates.append(output.gate.float().cpu())
            cut = [expert.box.cpu() for expert in output.experts if expert.box is not None]
            boxes = torch.stack(cut, 1).numpy() if cut else np.zeros((len(frames), 0, 4))
            for row, viewport in zip(boxes, viewports.cpu().tolist(), strict=True):
                views.append(compose_boxes(row, Viewport(*viewport[:4], *map(int, viewport[4:])), crops))
            found: dict[str, Tensor] = {}
            for k, expert in enumerate(output.experts, 1):
                found |= {f"expert {k} global": expert.global_logits, f"expert {k} parts": expert.part_logits}
                found[f"expert {k}"] = expert.logits
                heatmaps[k - 1].append(expert.heatmap.float().cpu())
            if cut:
                found |= {"average": output.average, "mixture": output.logits}
            for name, logits in found.items():
                heads.setdefault(name, []).append(logits.float().cpu())
    model.train(was_training)
    return Predictions(
        labels=torch.cat(labels).numpy(),
        heads={name: torch.cat(parts).numpy() for name, parts in heads.items()},
        gate=torch.cat(gates).numpy(),
        views=np.stack(views),
        heatmaps=tuple(torch.cat(maps) for maps in heatmaps),
    )


def collect_bundle(
    pipeline: Pipeline, samples: Sequence[tuple[Path, int]], batch: int = 1, workers: int = 2
) -> Predictions:
    """Run a bundle over labeled images; its heads are the experts, their average and the mixture only.

    Logits are those of the graphs, before any temperature.

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
    return Predictions(
        labels=np.array([label for _, label in samples]),
        heads=heads,
        gate=np.stack([ones if prediction.gate is None else prediction.gate for prediction in predictions]),
        views=np.stack([prediction.boxes for prediction in predictions]),
        temperature=predictions[0].temperature,
    )


def top_k_correct(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Whether the true class is among the k best: logits [N, C], labels [N] -> bool [N]. Ties go to the lower index."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return (best == labels[:, None]).any(1)


def summarize(predictions: Predictions) -> list[Row]:
    """One row for every head; the last one has the final logits, for which a calibrated bundle has a temperature."""
    rows, labels = [], predictions.labels
    for name, logits in predictions.heads.items():
        top1, top5 = (float(top_k_correct(logits, labels, k).mean()) for k in (1, 5))
        nll, ece = _quality(logits, labels)
        rows.append(Row(name, top1, top5, nll, ece))
    if predictions.temperature is not None:
        nll, ece = _quality(predictions.final / predictions.temperature, labels)
        rows[-1] = replace(rows[-1], calibrated_nll=nll, calibrated_ece=ece)
    return rows


def _quality(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean negative log-likelihood and expected calibration error."""
    log_probabilities = log_softmax(logits)
    picked = log_probabilities[np.arange(len(labels)), labels]
    confidence = np.exp(log_probabilities.max(1))
    return float(-picked.mean()), calibration_error(confidence, top_k_correct(logits, labels))


def gate_entropy(gate: np.ndarray) -> float:
    """Mean entropy of each image's weights, as a share of the most there can be: [N, K] -> [0, 1]."""
    weights = np.clip(gate.astype(np.float64), np.finfo(np.float64).tiny, 1)
    return float(-(weights * np.log(weights)).sum(1).mean() / np.log(max(gate.shape[1], 2)))


def gate_report(gate: np.ndarray) -> list[str]:
    """Warn of a gate [N, K] that trusts one expert for nearly every image; empty where it does not."""
    means = gate.mean(0)
    if gate.shape[1] == 1 or means.max() <= COLLAPSED:
        return []
    share = f"expert {means.argmax() + 1} has {100 * means.max():.1f} % of the weight"
    trusted = f"warning: {share}, the others change next to nothing"
    if (gate == gate[0]).all():  # fixed weights: chosen because nothing was more accurate on the validation images
        return [f"{trusted}: on the validation images no combination was better than this expert alone"]
    return [f"{trusted}: train with --gate none, or with --gate-balance 1"]


def figures(predictions: Predictions, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Everything that the table shows, as plain values.

    Args:
        predictions: for the images `names`, in their order.
        folder: of the images; its `parts.csv`, where there is one, tells where the deciding part of each image lies.
        names: of the images below `folder`, with "/".

    Raises:
        InputError: `parts.csv` leaves an image out.
    """
    areas = view_areas(predictions.views)
    result: dict[str, Any] = {
        "images": len(predictions.labels),
        "heads": [asdict(row) for row in summarize(predictions)],
        "temperature": predictions.temperature,
        "gate": predictions.gate.mean(0).tolist(),
        "gate_entropy": gate_entropy(predictions.gate),
        "warnings": gate_report(predictions.gate),
        "view_areas": np.median(areas, axis=0).tolist(),
        "crop_areas": [1.0, *np.median(areas[:, 1:] / areas[:, :-1], axis=0).tolist()],
    }
    parts = read_parts(folder)
    if parts is not None:
        if missing := [name for name in names if name not in parts]:
            raise InputError(
                f"{folder / 'parts.csv'} has no row for {missing[0]} ({len(missing)} images in all); "
                "expected the part of every image, or no parts.csv"
            )
        boxes = np.array([parts[name] for name in names])
        result["part_kept"], result["part_enlargement"] = part_report(boxes, predictions.views)
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    echo(f"{result['images']} images\n")
    echo(f"{'head':<18}{'top-1 %':>9}{'top-5 %':>9}{'NLL':>8}{'ECE %':>8}")
    for row in result["heads"]:
        echo(
            f"{row['name']:<18}{100 * row['top1']:9.2f}{100 * row['top5']:9.2f}{row['nll']:8.3f}{100 * row['ece']:8.2f}"
        )
    last = result["heads"][-1]
    if last["calibrated_nll"] is not None:
        echo(
            f"\n{last['name']} after the bundle's temperature {result['temperature']:.3f}, as mge-run predicts: "
            f"NLL {last['calibrated_nll']:.3f}, ECE {100 * last['calibrated_ece']:.2f} %; "
            "the rows above are before any temperature"
        )
    echo("\nECE: 15 bins of equal mass")
    shares = {"gate %": "gate", "crop area %": "crop_areas", "view area %": "view_areas", "part kept %": "part_kept"}
    columns = {
        title: [f"{100 * value:.1f}" for value in result[name]] for title, name in shares.items() if name in result
    }
    if "part_kept" in result:
        columns["part enlarged"] = [f"{value:.2f} x" for value in result["part_enlargement"]]
    echo("\n" + f"{'expert':<8}" + "".join(f"{title:>15}" for title in columns))
    for k, values in enumerate(zip(*columns.values(), strict=True), 1):
        echo(f"{k:<8}" + "".join(f"{value:>15}" for value in values))
    echo(
        "\ncrop area: median share that each expert's crop keeps of the view before; view area: of the first view"
        + ("; part: the deciding part of the image" if "part_kept" in result else "")
    )
    if len(result["gate"]) > 1:
        echo(f"gate: mean weights; mean entropy {100 * result['gate_entropy']:.0f} % of the most there can be")
    for warning in result["warnings"]:
        echo(warning)


def write_predictions(path: Path, predictions: Predictions, names: Sequence[str]) -> None:
    """Write a .npz file: `names`, `labels`, `gate`, `views` and `logits/<head>` for every head."""
    arrays: dict[str, Any] = {f"logits/{name}": logits for name, logits in predictions.heads.items()}
    arrays |= {"names": np.array(names)} | {n: getattr(predictions, n) for n in ("labels", "gate", "views")}
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
