"""Hold an export to its checkpoint: stage by stage on the same inputs, and as a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mge.model import MGENet
from mge_export.activations import FP16_MAX, ActivationWatch, Peak
from mge_export.differences import ChainDifferences, StageDifferences, box_area
from mge_export.images import VerifyImages
from mge_export.precision import Precision
from mge_export.runners import Runner, Tensors, onnx_runner, reference_tensors, run_chain, torch_runner
from mge_export.stages import Stage, segments
from mge_export.tolerances import FEW_IMAGES, TOLERANCES, Tolerances

__all__ = ["Check", "ParityReport", "measure_parity"]

HEADROOM = 10  # an activation above 65504 / HEADROOM is called out: other photographs may drive it further


@dataclass
class Check:
    """One way of computing the chain, compared with the checkpoint's own model in FP32."""

    name: str  # "torch", "onnx", or "int8"
    label: str  # what this check does and does not show
    stages: dict[str, StageDifferences]
    chain: ChainDifferences


@dataclass
class ParityReport:
    """What was measured, and whether it is within tolerance."""

    precision: Precision
    tolerances: Tolerances
    images: VerifyImages
    checks: list[Check]
    peaks: dict[str, Peak]  # by stage: the largest activation of the typed PyTorch stages, in the export's precision
    crop_area: dict[str, list[float]] = field(default_factory=dict)  # by box: share of its view, the reference's
    verified: list[Tensors] = field(default_factory=list)  # by batch: what the ONNX chain put out, but for its images

    @property
    def failures(self) -> list[str]:
        """Everything out of tolerance, one line each; empty: the export may be published."""
        found = [line for check in self.checks for line in _stage_failures(check, self.tolerances)]
        found += [line for check in self.checks for line in _chain_failures(check, self.tolerances)]
        if self.precision is not Precision.FP32:
            for stage, peak in self.peaks.items():
                if not peak.value < FP16_MAX:
                    found.append(f"{stage}: an activation ({peak.operator}) overflows FP16: {peak.value:g}")
        return found

    @property
    def warnings(self) -> list[str]:
        """What is within tolerance and still worth a look."""
        found = [
            f"{stage}: the largest activation is {peak.value:.0f} ({peak.operator}), "
            f"above a tenth of FP16's {FP16_MAX:.0f}"
            for stage, peak in self.peaks.items()
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
                stage: {
                    "value": _finite(peak.value),
                    "operator": peak.operator,
                }
                for stage, peak in self.peaks.items()
            },
            "crop_area_median": {name: _finite(np.median(shares)) for name, shares in self.crop_area.items()},
            "failures": self.failures,
            "warnings": self.warnings,
        }


def measure_parity(
    model: MGENet,
    stages: Sequence[Stage],
    folder: Path,
    precision: Precision,
    images: VerifyImages,
    progress: Callable[[int], None],
) -> ParityReport:
    """Run model, typed stages and ONNX graphs over the images and compare.

    Args:
        model: the reference, FP32, in evaluation mode.
        stages: its typed stages.
        folder: with `<stage>.onnx` of each.
        precision: that the stages were typed for.
        images: at least one.
        progress: called with the number of images done so far.

    Raises:
        ExportError: ONNX Runtime refuses a graph.
        InputError: an image cannot be decoded.
    """
    specs = [stage.spec for stage in stages]
    watches = {stage.spec.name: ActivationWatch(stage.precision.dtype) for stage in stages if stage.has_trunk}
    half = precision is not Precision.FP32
    rounded = ", every activation rounded to FP16" if half else ""
    unquantised = ", before quantisation" if precision is Precision.INT8 else ""
    checks = [_check(model, stages, "torch", f"typed stages in PyTorch{rounded}{unquantised}")]
    runners = [torch_runner(stages, watches)]
    if precision is Precision.INT8:
        checks += [
            _check(model, stages, "int8", "INT8 as TensorRT computes it, FP32 around, ONNX Runtime, CPU"),
            _check(model, stages, "onnx", "INT8 as a CPU computes it, ONNX Runtime's integer kernels"),
        ]
        runners += [onnx_runner(folder, specs, int8="exact"), onnx_runner(folder, specs, int8="fast")]
    else:
        checks.append(_check(model, stages, "onnx", "ONNX Runtime, CPU" + (", weights rounded only" if half else "")))
        runners.append(onnx_runner(folder, specs))
    area: dict[str, list[float]] = {name: [] for name in checks[0].chain.boxes}
    verified: list[Tensors] = []
    done = 0
    for frames in images.batches():
        reference = reference_tensors(model, frames)
        found = [_compare(check, runner, stages, reference) for check, runner in zip(checks, runners, strict=True)]
        verified.append({name: tensor for name, tensor in found[-1].items() if tensor.ndim < 4})
        for name, shares in area.items():
            shares += (box_area(reference[name]) / model.config.image_size**2).tolist()
        done += len(frames)
        progress(done)
    peaks = {name: watch.peak for name, watch in watches.items()}
    return ParityReport(precision, TOLERANCES[precision], images, checks, peaks, area, verified)


def _check(model: MGENet, stages: Sequence[Stage], name: str, label: str) -> Check:
    config = model.config
    boxes = [f"box_{k}" for k in range(1, config.experts)]
    chain = ChainDifferences(segments(config)[-1].answer, boxes, config.image_size)
    return Check(name, label, {stage.spec.name: StageDifferences(stage.spec) for stage in stages}, chain)


def _compare(check: Check, runner: Runner, stages: Sequence[Stage], reference: Tensors) -> Tensors:
    """Take a batch into a check; return what the chain put out."""
    for stage in stages:
        check.stages[stage.spec.name].add(runner(stage.spec, reference), reference)
    found = run_chain([stage.spec for stage in stages], runner, reference["frame"])
    check.chain.add(found, reference)
    return found


def _stage_failures(check: Check, limits: Tolerances) -> list[str]:
    found: list[str] = []
    for stage, differences in check.stages.items():
        where = f"{check.name} {stage}"
        for name, values in differences.relative.items():
            # Attention looks at one class: on a near tie of two classes the map is another one, as is its box.
            allowed = limits.outliers_of(len(values)) if name.startswith("heatmap_") else 0
            beyond = sum(not value <= limits.relative for value in values)
            if beyond > allowed:
                found.append(
                    f"{where}: {name} differs by {max(values):.1e} of its largest value on {beyond} of {len(values)} "
                    f"images; expected at most {limits.relative:.0e} on all but {allowed}"
                )
        found += _class_failures(where, differences.class_changes, differences.class_margins, limits)
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
        "stages": {name: _stage_dict(differences) for name, differences in check.stages.items()},
        "chain": {
            "class_changes": sum(check.chain.class_changes),
            "answer_relative": _finite(max(check.chain.relative)),
            "box_iou": {name: _iou_dict(values) for name, values in check.chain.box_iou.items()},
        },
    }


def _stage_dict(differences: StageDifferences) -> dict[str, Any]:
    values: dict[str, Any] = {
        "absolute": {name: _finite(max(found, default=0.0)) for name, found in differences.absolute.items()},
        "relative": {name: _finite(max(found, default=0.0)) for name, found in differences.relative.items()},
    }
    if differences.class_changes:
        values["class_changes"] = sum(differences.class_changes)
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
