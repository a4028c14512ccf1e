"""Compare an export with its checkpoint: graph by graph on the same inputs, as a chain, and as the finished bundle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mge.model import MGENet
from mge_export.experts import ExpertGraph, views
from mge_export.images import VerifyImages
from mge_export.precision import Precision
from mge_export.runners import FP16_MAX, Peak, Runner, Tensors, TypedRun, onnx_runner, reference_tensors
from mge_runtime.compare import (
    FEW_IMAGES,
    TOLERANCES,
    Tolerances,
    box_area,
    box_failures,
    box_iou,
    chain_box_iou,
    class_failures,
    class_margins,
    finite,
    relative_difference,
    same_boxes,
)
from mge_runtime.errors import BackendError, BundleError, ExportError
from mge_runtime.manifest import FRAME, GraphSpec, ViewSpec
from mge_runtime.pipeline import Pipeline

_ROUNDING = 0.025  # of the largest value: a crop by a box one pixel further differs by more
# Of the largest value, between the finished bundle and its graphs: the same weights in the same library.
_BUNDLE_RELATIVE = 1e-5
HEADROOM = 10  # an activation above 65504 / HEADROOM is called out: other images may drive it further


def _lists() -> dict[str, list[Any]]:
    return defaultdict(list)


@dataclass(frozen=True)
class _Kinds:
    """Names of a chain's tensors that are compared by more than their difference."""

    boxes: tuple[str, ...]  # in the order of the crops
    logits: frozenset[str]  # of every expert and of the chain: their classes are compared
    heatmaps: frozenset[str]
    crops: frozenset[str]  # images that a graph cuts out for the next one

    @classmethod
    def of(cls, specs: Sequence[GraphSpec], views: Sequence[ViewSpec]) -> _Kinds:
        """As the graphs and the views of a chain name them."""
        return cls(
            tuple(view.box for view in views if view.box is not None),
            frozenset([specs[-1].logits, *(view.logits for view in views)]),
            frozenset(view.heatmap for view in views),
            frozenset(tensor.name for spec in specs for tensor in spec.outputs if len(tensor.shape) == 4),
        )


@dataclass
class Differences:
    """Tensors compared with their reference, by name and image."""

    absolute: dict[str, list[float]] = field(default_factory=_lists)
    relative: dict[str, list[float]] = field(default_factory=_lists)  # see `relative_difference`
    class_changes: dict[str, list[bool]] = field(default_factory=_lists)  # of tensors of logits
    class_margins: dict[str, list[float]] = field(default_factory=_lists)  # see `class_margins`
    box_iou: dict[str, list[float]] = field(default_factory=_lists)

    def add(self, found: Tensors, reference: Tensors, names: Iterable[str], kinds: _Kinds) -> None:
        """Add a batch.

        Args:
            found: tensors of the batch.
            reference: the same.
            names: of those to compare, a box before the image that is cropped by it. An image cropped by another box
                is another image, so it is left out (its box is not).
            kinds: what they are.
        """
        same_box: Any = slice(None)
        for name in names:
            ours, theirs = found[name], reference[name]
            if name in kinds.boxes:
                self.box_iou[name] += box_iou(ours, theirs).tolist()
                same_box = same_boxes(ours, theirs)
                continue
            if name in kinds.logits:
                self.class_changes[name] += (ours.argmax(1) != theirs.argmax(1)).tolist()
                self.class_margins[name] += class_margins(ours, theirs).tolist()
            if name in kinds.crops:
                ours, theirs = ours[same_box], theirs[same_box]
            axes = tuple(range(1, ours.ndim))
            self.absolute[name] += np.abs(ours.astype(np.float64) - theirs).max(axes).tolist()
            self.relative[name] += relative_difference(ours, theirs).tolist()


@dataclass
class Check:
    """One way of computing the chain, compared with the checkpoint's own model in FP32."""

    name: str  # "torch", "onnx", or "int8"
    label: str  # what this check does and does not show
    graphs: dict[str, Differences]  # each on the reference's inputs
    chain: Differences = field(default_factory=Differences)  # on its own: logits, and boxes in pixels of the frame
    heatmaps: Collection[str] = ()  # names of them

    def failures(self, limits: Tolerances) -> list[str]:
        """What is out of tolerance, one line each."""
        found: list[str] = []
        for graph, differences in self.graphs.items():
            where = f"{self.name} {graph}"
            for name, values in differences.relative.items():
                # Attention looks at one class: on a near tie of two classes the map is another one, as is its box.
                allowed = limits.allowed_outliers(len(values)) if name in self.heatmaps else 0
                beyond = sum(not value <= limits.relative for value in values)
                if beyond > allowed:
                    found.append(
                        f"{where}: {name} differs by {max(values):.1e} of its largest value on {beyond} of "
                        f"{len(values)} images; expected at most {limits.relative:.0e} on all but {allowed}"
                    )
            found += _class_and_box_failures(where, differences, limits, boxes=True)
        return found + _class_and_box_failures(f"{self.name} chain", self.chain, limits, boxes=limits.chain_boxes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        (logits,) = self.chain.class_changes
        return {
            "label": self.label,
            "graphs": {name: _graph_dict(graph) for name, graph in self.graphs.items()},
            "chain": {
                "class_changes": sum(self.chain.class_changes[logits]),
                "logits_relative": finite(max(self.chain.relative[logits])),
                "box_iou": {name: _iou_dict(values) for name, values in self.chain.box_iou.items()},
            },
        }


@dataclass
class ParityReport:
    """What was measured, and whether it is within tolerance."""

    precision: Precision
    images: VerifyImages
    checks: list[Check]
    peaks: dict[str, Peak]  # by graph: the largest activation of the typed PyTorch modules, in the export's precision
    crop_area: dict[str, list[float]] = field(default_factory=dict)  # by box: share of its view, the reference's
    verified: Tensors = field(default_factory=Tensors)  # what the ONNX chain made of the first batch, but for images

    @property
    def tolerances(self) -> Tolerances:
        """Of the export's precision."""
        return TOLERANCES[self.precision.value]

    @property
    def failures(self) -> list[str]:
        """Everything out of tolerance, one line each; empty: the export may be published."""
        found = [line for check in self.checks for line in check.failures(self.tolerances)]
        if self.precision is not Precision.FP32:
            for graph, peak in self.peaks.items():
                if not peak.value < FP16_MAX:
                    found.append(f"{graph}: an activation ({peak.operator}) overflows FP16: {peak.value:g}")
        return found

    @property
    def warnings(self) -> list[str]:
        """What is within tolerance and still worth a look."""
        found = [
            f"{graph}: the largest activation is {peak.value:.0f} ({peak.operator}), "
            f"above a tenth of FP16's {FP16_MAX:.0f}"
            for graph, peak in self.peaks.items()
            if FP16_MAX / HEADROOM < peak.value < FP16_MAX
        ]
        if not self.images.photographs:
            found.append("verified on generated images only; name photographs with --verify-data")
        if self.precision is not Precision.FP32 and self.images.count < FEW_IMAGES:
            found.append(
                f"class agreement on {self.images.count} images says little; "
                f"verify {self.precision.name} on at least {FEW_IMAGES} with --verify-data and --verify-images"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "images": self.images.count,
            "source": self.images.source,
            "photographs": self.images.photographs,
            "reference": "the checkpoint's own model in PyTorch, FP32",
            "tolerances": asdict(self.tolerances),
            "checks": {check.name: check.to_dict() for check in self.checks},
            "largest_activation": {
                graph: {"value": finite(peak.value), "operator": peak.operator} for graph, peak in self.peaks.items()
            },
            "crop_area_median": {name: finite(np.median(shares)) for name, shares in self.crop_area.items()},
            "failures": self.failures,
            "warnings": self.warnings,
        }


def measure_parity(
    model: MGENet,
    graphs: Sequence[ExpertGraph],
    folder: Path,
    precision: Precision,
    images: VerifyImages,
    progress: Callable[[int], None],
) -> ParityReport:
    """Run model, typed modules and ONNX graphs over the images and compare.

    In FP32 the graphs compute what the modules do, which then run on the first image alone, for their activations.

    Args:
        model: the reference, FP32, in evaluation mode.
        graphs: its typed modules.
        folder: with `<graph>.onnx` of each.
        precision: that they were typed for.
        images: at least one.
        progress: called with the number of images done so far.

    Raises:
        ExportError: ONNX Runtime refuses a graph.
        InputError: an image cannot be decoded.
    """
    specs = [graph.spec for graph in graphs]
    typed = {graph.spec.name: TypedRun(graph) for graph in graphs}
    half = precision is not Precision.FP32
    rounded = ", every activation rounded to FP16" if half else ""
    unquantized = ", before quantization" if precision is Precision.INT8 else ""
    modules = f"typed modules in PyTorch{rounded}{unquantized}"
    ways: list[tuple[str, str, Runner]] = [("torch", modules, lambda spec, tensors: typed[spec.name](tensors))]
    if precision is Precision.INT8:
        exact, fast = (onnx_runner(folder, specs, int8="exact"), onnx_runner(folder, specs, int8="fast"))
        ways.append(("int8", "INT8 as TensorRT computes it, FP32 around, ONNX Runtime, CPU", exact))
        ways.append(("onnx", "INT8 as a CPU computes it, ONNX Runtime's integer kernels", fast))
    else:
        label = "ONNX Runtime, CPU" + (", weights rounded only" if half else "")
        ways.append(("onnx", label, onnx_runner(folder, specs)))
    kinds, crops = _Kinds.of(specs, views(model.config)), model.config.crops
    checks = [
        Check(name, label, {spec.name: Differences() for spec in specs}, heatmaps=kinds.heatmaps)
        for name, label, _ in ways
    ]
    area: dict[str, list[float]] = {name: [] for name in kinds.boxes}
    limits = TOLERANCES[precision.value]
    verified: Tensors = {}
    found: Tensors = {}
    done = 0
    for frames in images.batches():
        reference = reference_tensors(model, frames)
        for check, (_, _, runner) in zip(checks, ways, strict=True):
            if check.name == "torch" and done and not half:
                continue
            found = _compare_graphs(check, runner, specs, reference, limits.relative, kinds)
            check.chain.add(found, reference, [specs[-1].logits], kinds)
            for name, ious in chain_box_iou(kinds.boxes, found, reference, crops).items():
                check.chain.box_iou[name] += ious.tolist()
        verified = verified or {name: tensor for name, tensor in found.items() if tensor.ndim < 4}
        before = np.full(len(frames), float(crops.frame**2))
        for (name, shares), side in zip(area.items(), crops.sizes, strict=False):
            cut = box_area(reference[name])
            shares += (cut / (before if crops.frame else side**2)).tolist()
            before = cut
        done += len(frames)
        progress(done)
    return ParityReport(precision, images, checks, {name: run.peak for name, run in typed.items()}, area, verified)


def check_bundle(path: Path, images: VerifyImages, verified: Tensors) -> None:
    """Open a bundle as a device will, and compare all that a prediction reports with the graphs that were verified.

    Args:
        path: the bundle.
        images: that the graphs were verified on.
        verified: what their chain made of the first of `images.batches()`: by name, [B, ...], float32.

    Raises:
        ExportError: it cannot be opened or run, or its outputs differ.
    """
    threads = torch.get_num_threads()
    try:
        with Pipeline.open(path, device="cpu", backend="onnxruntime", threads=threads) as pipeline:
            found = pipeline.run(next(images.batches()))
    except (BundleError, BackendError) as error:
        # Not by the name of a file that is about to be removed.
        reason = str(error).replace(str(path.resolve()), "it").replace(str(path), "it")
        raise ExportError(f"the finished bundle cannot be run: {reason}; no bundle was written") from error
    for name, tensor in found.items():
        difference = np.abs(tensor.astype(np.float64) - verified[name]).max()
        limit = _BUNDLE_RELATIVE * np.abs(verified[name]).max()
        if not difference <= limit:
            raise ExportError(
                f"the finished bundle computes otherwise than its graphs did: {name} differs by {difference:.1e}; "
                f"expected at most {limit:.1e}; no bundle was written"
            )


def _compare_graphs(
    check: Check, runner: Runner, specs: Sequence[GraphSpec], reference: Tensors, relative: float, kinds: _Kinds
) -> Tensors:
    """Add a batch to a check's graphs; return all tensors of the chain.

    Each graph is judged by what it makes of the reference's inputs. Where those of the chain so far are the same but
    for rounding (half of `relative`, which outputs may differ by, of their largest value), what it makes of them counts
    for both; as a rule that is so in FP32.
    """
    found: Tensors = {FRAME: reference[FRAME]}
    for spec in specs:
        made = runner(spec, found)
        names = [tensor.name for tensor in spec.inputs]
        differs = [n for n in range(len(reference[FRAME])) if not _same(found, reference, names, n, relative / 2)]
        found |= made
        if differs:
            alone = runner(spec, {name: reference[name][differs] for name in names})
            made = {name: tensor.copy() for name, tensor in made.items()}
            for name, tensor in alone.items():
                made[name][differs] = tensor
        check.graphs[spec.name].add(made, reference, made, kinds)
    return found


def _same(found: Tensors, reference: Tensors, names: Sequence[str], image: int, relative: float) -> bool:
    """Whether the tensors of one image are the reference's but for rounding."""
    limit = min(relative, _ROUNDING)
    return all(
        bool(np.abs(found[name][image] - reference[name][image]).max() <= limit * np.abs(reference[name][image]).max())
        for name in names
        if found[name] is not reference[name]
    )


def _class_and_box_failures(where: str, differences: Differences, limits: Tolerances, *, boxes: bool) -> list[str]:
    found: list[str] = []
    for name, changes in differences.class_changes.items():
        found += class_failures(f"{where} {name}", changes, differences.class_margins[name], limits)
    for name, values in differences.box_iou.items() if boxes else ():
        found += box_failures(f"{where} {name}", values, limits)
    return found


def _graph_dict(found: Differences) -> dict[str, Any]:
    values: dict[str, Any] = {
        "absolute": {name: finite(max(values, default=0.0)) for name, values in found.absolute.items()},
        "relative": {name: finite(max(values, default=0.0)) for name, values in found.relative.items()},
        "class_changes": sum(map(sum, found.class_changes.values())),
    }
    if found.box_iou:
        (values["box_iou"],) = map(_iou_dict, found.box_iou.values())
    return values


def _iou_dict(values: list[float]) -> dict[str, float | str]:
    return {"median": finite(np.median(values)), "p1": finite(np.percentile(values, 1)), "worst": finite(min(values))}
