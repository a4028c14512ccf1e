"""Predictions on labeled images, of a model or a bundle: how they are made, stored and summed up, head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mge.cost import Cost, bundle_cost
from mge_runtime.errors import InputError, brief
from mge_runtime.files import atomic_path
from mge_runtime.layouts import find_list, relative_name
from mge_runtime.metrics import calibration_error, log_softmax, share_interval
from mge_runtime.preprocess import Viewport, compose_boxes
from mge_runtime.sources import VALIDATION_FOLDERS, is_folder, list_labeled, require_folder, validation_folder

if TYPE_CHECKING:
    from torch import Tensor

    from mge.model import MGENet
    from mge_runtime.pipeline import Exit, Pipeline
    from mge_runtime.prediction import Prediction

Label = Callable[[tuple[str, ...]], list[tuple[Path, int]]]  # class names to the images with their index among these


COLLAPSED = 0.95  # mean weight of one expert above which the others change next to nothing


@dataclass(frozen=True)
class Exits:
    """What a calibrated bundle predicts where it may stop early."""

    used: np.ndarray  # [N] int64, experts that ran
    logits: np.ndarray  # [N, C], of where each image stopped


@dataclass(frozen=True)
class Predictions:
    """What was predicted for N images."""

    labels: np.ndarray  # [N] int64
    heads: dict[str, np.ndarray]  # name -> logits [N, C], in the order of the table; the last are the final ones
    gate: np.ndarray  # [N, K], rows sum to 1
    views: np.ndarray  # [N, K, 4], what each expert saw, in pixels of the source image
    heatmaps: tuple[Any, ...] = ()  # K of [N, h, w], tensors of a model, arrays of a bundle
    temperature: float | None = None  # of the final logits, where a bundle's calibration learned one
    exits: Exits | None = None  # None: the chain never stops early
    cost: Cost | None = None  # None: not measured
    classes: tuple[str, ...] = ()  # names by class index; empty: not known, in older files

    @property
    def truth(self) -> list[str]:
        """The N classes by name, by number where no names are known."""
        return [self.classes[label] if self.classes else str(label) for label in self.labels.tolist()]

    @property
    def final(self) -> np.ndarray:
        """[N, C], the final logits: the mixture's, or the single expert's."""
        return list(self.heads.values())[-1]


@dataclass(frozen=True)
class Evaluation:
    """Predictions, and what they are of."""

    predictions: Predictions
    samples: Sequence[tuple[Path, int]]  # N images and their labels
    folder: Path  # that the images lie in, as `parts.csv` does
    root: Path  # that their names start from
    name: str  # of the checkpoint's or the bundle's file
    model: Mapping[str, Any]  # fields of its config

    @property
    def names(self) -> list[str]:
        """Of the images below the root, with "/"; the folder of a split is part of them."""
        return [relative_name(path, self.root) for path, _ in self.samples]

    @property
    def named(self) -> tuple[Predictions, list[str]]:
        """What `write_predictions` takes and `read_predictions` returns."""
        return self.predictions, self.names


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    top1: float  # in [0, 1]
    top1_interval: tuple[float, float]  # 95 % (`mge_runtime.metrics.share_interval`)
    top5: float  # in [0, 1]
    nll: float  # nats
    ece: float  # in [0, 1], over 15 bins of equal mass (`mge_runtime.metrics.calibration_error`)
    # The same after the temperature that the bundle's calibration learned for these logits; None: it learned none.
    calibrated_nll: float | None = None
    calibrated_ece: float | None = None
    gmacs: float | None = None  # of all that these logits need; None: not measured
    ms: float | None = None


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
    """Run a bundle over labeled images, and once more with early exits where its calibration has some.

    Its heads are the experts, their average and the mixture only. Logits are those of the graphs, before any
    temperature.

    Raises:
        InputError: an image cannot be read.
    """

    def predict(exit: Exit) -> list[Prediction]:
        predictions: list[Prediction] = []
        paths = [path for path, _ in samples]
        for _, prediction in pipeline.predict_iter(paths, batch=batch, workers=workers, exit=exit):
            if isinstance(prediction, Exception):
                raise prediction
            predictions.append(prediction)
        return predictions

    predictions, exits = predict("never"), None
    if pipeline.calibrated.exits:
        stopped = predict("calibrated")
        exits = Exits(np.array([one.experts_used for one in stopped]), np.stack([one.logits for one in stopped]))
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
        heatmaps=tuple(map(np.stack, zip(*(prediction.heatmaps for prediction in predictions), strict=True))),
        temperature=predictions[0].temperature,
        exits=exits,
    )


def find_labeled(data: Path, split: str, note: Callable[[str], None]) -> tuple[Path, Path, Label]:
    """The folder of labeled images, the one that their names start from, and what lists them by class.

    Names in class folders start with the folder of the split, so that `0.jpg` of two splits are two images.

    Raises:
        InputError: there is none.
    """
    if (listed := find_list(data)) is not None:
        note(str(listed))
        return listed.root, listed.root, lambda classes: listed.labeled(split, classes, note)
    folder = data / split if is_folder(data / split) else data
    if split in VALIDATION_FOLDERS:
        folder = validation_folder(data) or data
    if is_folder(folder / "train"):
        raise InputError(f"no folder {data / split}; expected the images there, or name the folder of another split")
    require_folder(folder, "test/<class>/*.jpg in it, the class folders, a downloaded data set or a table of paths")
    return folder, folder / "..", lambda classes: list_labeled(folder, classes, note)[1]


def evaluate_bundle(
    engine: Path, folder: Path, root: Path, label: Label, batch: int = 1, workers: int = 2, **options: Any
) -> Evaluation:
    """Run a bundle over what `find_labeled` found, and time it.

    Args:
        engine: the bundle.
        folder: of the images.
        root: that their names start from.
        label: lists them.
        batch: images in one run.
        workers: threads that decode.
        options: of `Pipeline.open`.

    Raises:
        MGEError: as for `Pipeline.open`, or an image cannot be read.
    """
    from mge_runtime.pipeline import Pipeline

    with Pipeline.open(engine, streams="auto", **options) as pipeline:
        manifest = pipeline.manifest
        samples = label(manifest.class_names)
        found = with_stops(collect_bundle(pipeline, samples, batch, max(workers, 1)))
    with Pipeline.open(engine, **options) as pipeline:  # one stream: an image has all processors to itself
        found = replace(found, cost=bundle_cost(pipeline, options.get("threads")), classes=manifest.class_names)
    return Evaluation(found, samples, folder, root, engine.name, manifest.model)


def with_stops(predictions: Predictions) -> Predictions:
    """Add what the chain gives that stops early: the averages of its first experts, "average 1-2" and so on."""
    experts = predictions.gate.shape[1]
    logits = [predictions.heads[f"expert {k}"] for k in range(1, experts)]
    stops = {f"average 1-{k}": np.mean(logits[:k], axis=0) for k in range(2, experts)}
    ends = {name: logits for name, logits in predictions.heads.items() if name in ("average", "mixture")}
    others = {name: logits for name, logits in predictions.heads.items() if name not in ends}
    return replace(predictions, heads=others | stops | ends)


def top_k_correct(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Whether the true class is among the k best: logits [N, C], labels [N] -> bool [N]. Ties go to the lower index."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return (best == labels[:, None]).any(1)


def summarize(predictions: Predictions) -> list[Row]:
    """One row for every head; the last one has the final logits, for which a calibrated bundle has a temperature."""
    rows, labels, cost = [], predictions.labels, predictions.cost
    for name, logits in predictions.heads.items():
        right, right5 = (top_k_correct(logits, labels, k) for k in (1, 5))
        interval = share_interval(int(right.sum()), len(right))
        row = Row(name, float(right.mean()), interval, float(right5.mean()), *_quality(logits, labels))
        if cost is not None:
            row = replace(row, gmacs=cost.gmacs[cost.place(name)], ms=cost.ms[cost.place(name)])
        rows.append(row)
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


def write_predictions(path: Path, predictions: Predictions, names: Sequence[str]) -> None:
    """Write a .npz file: `names`, `classes`, `labels`, `gate`, `views`, `logits/<head>`, `exits/...`, `cost/...`."""
    arrays: dict[str, Any] = {f"logits/{name}": logits for name, logits in predictions.heads.items()}
    arrays |= {"names": np.array(names), "classes": np.array(predictions.classes, str)}
    arrays |= {name: getattr(predictions, name) for name in ("labels", "gate", "views")}
    for part, values in (("exits", predictions.exits), ("cost", predictions.cost)):
        if values is not None:
            arrays |= {f"{part}/{name}": value for name, value in asdict(values).items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_predictions(path: Path) -> tuple[Predictions, list[str]]:
    """Read what `write_predictions` wrote: the predictions, and the names of their images.

    Raises:
        InputError: the file is missing or no such file.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
        exits = Exits(arrays["exits/used"], arrays["exits/logits"]) if "exits/used" in arrays else None
        cost = None
        if "cost/gmacs" in arrays:
            gmacs, ms = (tuple(arrays[f"cost/{name}"].tolist()) for name in ("gmacs", "ms"))
            cost = Cost(gmacs, ms, str(arrays["cost/measured"]))
        heads = {name.removeprefix("logits/"): value for name, value in arrays.items() if name.startswith("logits/")}
        classes = tuple(arrays["classes"].tolist()) if "classes" in arrays else ()
        found = Predictions(arrays["labels"], heads, arrays["gate"], arrays["views"], (), None, exits, cost, classes)
        names = arrays["names"].tolist()
        if not heads or {len(found.truth), *map(len, heads.values())} != {len(names)} or found.final.ndim != 2:
            raise ValueError("its parts are of different numbers of images")
        return found, names
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(
            f"cannot read {path}: {brief(error)}; expected a file that mge-eval --predictions wrote"
        ) from error
