"""Compare an export with its checkpoint: graph by graph on the same inputs, and as a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mge.model import MGENet
from mge_export.activations import FP16_MAX, ActivationWatch, Peak
from mge_export.differences import ChainDifferences, GraphDifferences, box_area
from mge_export.experts import ExpertGraph
from mge_export.images import VerifyImages
from mge_export.precision import Precision
from mge_export.runners import Runner, Tensors, onnx_runner, reference_tensors, torch_runner
from mge_export.tolerances import FEW_IMAGES, TOLERANCES, Tolerances
from mge_runtime.manifest import FRAME, GraphSpec

__all__ = ["Check", "ParityReport", "measure_parity"]

_ROUNDING = 0.025  # of the largest value: a crop by a box one pixel further differs by more
HEADROOM = 10  # an activation above 65504 / HEADROOM is called out: other photographs may drive it further


@dataclass
class Check:
    """One way of computing the chain, compared with the checkpoint's own model in FP32."""

    name: str  # "torch", "onnx", or "int8"
    label: str  # what this check does and does not show
    graphs: dict[str, GraphDifferences]
    chain: ChainDifferences


@dataclass
class ParityReport:
    """What was measured, and whether it is within tolerance."""

    precision: Precision
    tolerances: Tolerances
    images: VerifyImages
    checks: list[Check]
    peaks: dict[str, Peak]  # by graph: the largest activation of the typed PyTorch modules, in the export's precision
    crop_area: dict[str, list[float]] = field(default_factory=dict)  # by box: share of its view, the reference's
    verified: Tensors = field(default_factory=Tensors)  # what the ONNX chain made of the first batch, but for images

    @property
    def failures(self) -> list[str]:
        """Everything out of tolerance, one line each; empty: the export may be published."""
        found = [line for check in self.checks for line in _graph_failures(check, self.tolerances)]
        found += [line for check in self.checks for line in _chain_failures(check, self.tolerances)]
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
            found.append("verified on generated pictures only; name photographs with --verify-data")
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
            "checks": {check.name: _check_dict(check) for check in self.checks},
            "largest_activation": {
                graph: {
                    "value": _finite(peak.value),
                    "operator": peak.operator,
                }
                for graph, peak in self.peaks.items()
            },
            "crop_area_median": {name: _finite(np.median(shares)) for name, shares in self.crop_area.items()},
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

    In FP32 the graphs compute what the modules do, which then run on the first few images alone, for their activations.

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
    watches = {graph.spec.name: ActivationWatch(precision.dtype, graph.normalize) for graph in graphs}
    half = precision is not Precision.FP32
    rounded = ", every activation rounded to FP16" if half else ""
    unquantised = ", before quantisation" if precision is Precision.INT8 else ""
    checks = [_check(model, specs, "torch", f"typed modules in PyTorch{rounded}{unquantised}")]
    runners = [torch_runner(graphs, watches)]
    if precision is Precision.INT8:
        checks += [
            _check(model, specs, "int8", "INT8 as TensorRT computes it, FP32 around, ONNX Runtime, CPU"),
            _check(model, specs, "onnx", "INT8 as a CPU computes it, ONNX Runtime's integer kernels"),
        ]
        runners += [onnx_runner(folder, specs, int8="exact"), onnx_runner(folder, specs, int8="fast")]
    else:
        checks.append(_check(model, specs, "onnx", "ONNX Runtime, CPU" + (", weights rounded only" if half else "")))
        runners.append(onnx_runner(folder, specs))
    area: dict[str, list[float]] = {name: [] for name in checks[0].chain.boxes}
    verified: Tensors = {}
    found: Tensors = {}
    done = 0
    for frames in images.batches():
        reference = reference_tensors(model, frames)
        for check, runner in zip(checks, runners, strict=True):
            if check.name != "torch" or half or not done:
                found = _compare(check, runner, specs, reference, TOLERANCES[precision].relative)
        verified = verified or {name: tensor for name, tensor in found.items() if tensor.ndim < 4}
        for name, shares in area.items():
            shares += (box_area(reference[name]) / model.config.image_size**2).tolist()
        done += len(frames)
        progress(done)
    peaks = {name: watch.peak for name, watch in watches.items()}
    return ParityReport(precision, TOLERANCES[precision], images, checks, peaks, area, verified)


def _check(model: MGENet, specs: Sequence[GraphSpec], name: str, label: str) -> Check:
    config = model.config
    boxes = [f"box_{k}" for k in range(1, config.experts)]
    chain = ChainDifferences(specs[-1].logits, boxes, config.image_size)
    return Check(name, label, {spec.name: GraphDifferences(spec) for spec in specs}, chain)


def _compare(check: Check, runner: Runner, specs: Sequence[GraphSpec], reference: Tensors, relative: float) -> Tensors:
    """Take a batch into a check; return all tensors of the chain.

    Each graph is judged by what it makes of the reference's inputs. Where those of the chain so far are the same but
    for rounding, what it makes of them counts for both; as a rule that is so in FP32.

    Args:
        check: takes the batch in.
        runner: runs a graph.
        specs: the chain.
        reference: all its tensors, by the checkpoint's own model.
        relative: that outputs may differ by, of their largest value; inputs that count for both by half of it.
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
        check.graphs[spec.name].add(made, reference)
    check.chain.add(found, reference)
    return found


def _same(found: Tensors, reference: Tensors, names: Sequence[str], image: int, relative: float) -> bool:
    """Whether the tensors of one image are the reference's but for rounding."""
    limit = min(relative, _ROUNDING)
    return all(
        bool(np.abs(found[name][image] - reference[name][image]).max() <= limit * np.abs(reference[name][image]).max())
        for name in names
        if found[name] is not reference[name]
    )


def _graph_failures(check: Check, limits: Tolerances) -> list[str]:
    found: list[str] = []
    for graph, differences in check.graphs.items():
        where = f"{check.name} {graph}"
        for name, values in differences.relative.items():
            # Attention looks at one class: on a near tie of two classes the map is another one, as is its box.
            allowed = limits.outliers_of(len(values)) if name.startswith("heatmap_") else 0
            beyond = sum(not value <= limits.relative for value in values)
            if beyond > allowed:
                found.append(
                    f"{where}: {name} differs by {max(values):.1e} of its largest value on {beyond} of {len(values)} "
                    f"images; expected at most {limits.relative:.0e} on all but {allowed}"
                )
        for name, changes in differences.class_changes.items():
            found += _class_failures(f"{where} {name}", changes, differences.class_margins[name], limits)
        found += _box_failures(where, differences.box_iou, limits)
    return found


def _chain_failures(check: Check, limits: Tolerances) -> list[str]:
    where = f"{check.name} chain"
    found = _class_failures(where, check.chain.class_changes, check.chain.class_margins, limits)
    for name, values in check.chain.box_iou.items() if limits.chain_boxes else ():
        found += _box_failures(f"{where} {name}", values, limits)
    return found


def _class_failures(where: str, changes: list[bool], margins: list[float], limits: Tolerances) -> list[str]:
    allowed = limits.allowed_changes(len(changes))
    counted = sum(changes)
    if allowed == 0:
        counted = sum(change and not margin <= limits.relative for change, margin in zip(changes, margins, strict=True))
    if counted <= allowed:
        return []
    return [f"{where}: {counted} of {len(changes)} images change their class; expected at most {allowed}"]


def _box_failures(where: str, values: list[float], limits: Tolerances) -> list[str]:
    if not values:
        return []
    found: list[str] = []
    if not np.median(values) >= limits.box_iou_median:
        found.append(f"{where}: median box IoU {np.median(values):.3f}; expected at least {limits.box_iou_median}")
    if len(values) < FEW_IMAGES:
        low = sum(not value >= limits.box_iou_p1 for value in values)
        if low > 1:
            found.append(
                f"{where}: {low} of {len(values)} boxes have an IoU below {limits.box_iou_p1}; expected at most 1"
            )
    elif not np.percentile(values, 1) >= limits.box_iou_p1:
        found.append(
            f"{where}: 1st percentile of box IoU {np.percentile(values, 1):.3f}; expected at least {limits.box_iou_p1}"
        )
    return found


def _check_dict(check: Check) -> dict[str, Any]:
    return {
        "label": check.label,
        "graphs": {name: _graph_dict(differences) for name, differences in check.graphs.items()},
        "chain": {
            "class_changes": sum(check.chain.class_changes),
            "answer_relative": _finite(max(check.chain.relative)),
            "box_iou": {name: _iou_dict(values) for name, values in check.chain.box_iou.items()},
        },
    }


def _graph_dict(differences: GraphDifferences) -> dict[str, Any]:
    values: dict[str, Any] = {
        "absolute": {name: _finite(max(found, default=0.0)) for name, found in differences.absolute.items()},
        "relative": {name: _finite(max(found, default=0.0)) for name, found in differences.relative.items()},
    }
    if differences.class_changes:
        values["class_changes"] = sum(map(sum, differences.class_changes.values()))
    if differences.box_iou:
        values["box_iou"] = _iou_dict(differences.box_iou)
    return values


def _iou_dict(values: list[float]) -> dict[str, float | str]:
    return {
        "median": _finite(np.median(values)),
        "p1": _finite(np.percentile(values, 1)),
        "worst": _finite(min(values)),
    }


def _finite(value: float | np.floating[Any]) -> float | str:
    """JSON has no infinity: six digits of a number, or its name."""
    return float(f"{value:.6g}") if np.isfinite(value) else str(float(value))
