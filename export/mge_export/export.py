"""From a model to one published bundle: split, write, check, verify, publish."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from mge.model import MGENet
from mge_export.bundle_check import check_bundle
from mge_export.graph import export_graph, weights_name
from mge_export.images import VerifyImages
from mge_export.int8 import Int8Request, LearnedGraph, check_quantization, quantize_graphs
from mge_export.parity import ParityReport, measure_parity
from mge_export.precision import Precision, check_precision
from mge_export.report import format_report
from mge_export.stages import Stage, build_stages, segments, views
from mge_runtime.bundle import StageModel, write_bundle
from mge_runtime.errors import ExportError
from mge_runtime.files import check_output, temporary_folder
from mge_runtime.manifest import Manifest

__all__ = ["ExportResult", "export_bundle"]

TOOLS = ("mge", "torch", "timm", "onnx", "onnxscript", "onnxruntime")  # distributions that shape the graphs
ATTESTED = "onnx: types inferred from the written graph"

Say = Callable[[str], None]  # shows one line of progress


@dataclass(frozen=True)
class ExportResult:
    """What was published."""

    path: Path
    manifest: Manifest
    report: ParityReport


def export_bundle(
    model: MGENet,
    path: Path,
    precision: Precision,
    images: VerifyImages,
    *,
    half_linear: bool = False,
    int8: Int8Request | None = None,
    checkpoint_sha256: str | None = None,
    allow_mismatch: bool = False,
    finish: Callable[[Path], None] = lambda _: None,
    say: Say = lambda _: None,
) -> ExportResult:
    """Export a model to one file.

    Nothing is published unless every graph passes `onnx.checker`, has the precision asked for and runs, the parity
    report is within its tolerances, and the finished file, opened by the runtime, answers as its graphs did. On any
    error, an interrupt included, an earlier bundle at `path` stays as it was.

    Args:
        model: FP32, on the CPU, in evaluation mode; left as it is.
        path: where to write, usually `mge.plan`.
        precision: of trunks and part convolutions.
        images: to verify on, at least one.
        half_linear: compute linear heads in half too, as TensorRT-RTX on Turing needs.
        int8: images to learn ranges from and how, for `Precision.INT8` and for it alone.
        checkpoint_sha256: of the file that the model came from.
        allow_mismatch: publish even if the report is out of tolerance; the bundle's report then says so.
        finish: is called with the finished bundle before it takes its place, and may add engines to it; what it raises
            keeps the bundle from being published.
        say: shows progress.

    Raises:
        ExportError: a stage cannot be written, is not of the precision asked for, or is out of tolerance, or the bundle
            does not answer as its graphs did.
        OutputError: `path` cannot be written.
        InputError: an image to verify on cannot be decoded.
        ValueError: INT8 without `int8`, or the other way round.
    """
    if (precision is Precision.INT8) is not (int8 is not None):
        raise ValueError(f"{precision.value} was asked for; images to calibrate on belong to int8, and int8 needs them")
    check_output(path)
    config = model.config
    with temporary_folder("export") as folder:
        say(f"splitting {config.experts} x {config.arch} into stages, {precision.value}")
        stages, chain = build_stages(model, precision, half_linear=half_linear), segments(config)
        plans: dict[str, dict[str, Any]] = {}
        typed: list[Stage] = []  # a stage that was to be quantised may stay in FP16
        for stage, made in _graphs(stages, chain[-1].answer, int8, say):
            plans[stage.spec.name] = _write_stage(stage, made, folder, say)
            typed.append(stage)
        stages = tuple(typed)
        step = max(images.count // 10, 1)

        def progress(done: int) -> None:
            if done == images.count or done // step != (done - 1) // step:
                say(f"verified {done} of {images.count} images")

        report = measure_parity(model, stages, folder, precision, images, progress)
        say(format_report(report))
        if report.failures and not allow_mismatch:
            raise ExportError(
                f"the export is out of tolerance: {report.failures[0]}"
                + (f" (and {len(report.failures) - 1} more)" if len(report.failures) > 1 else "")
                + "; no bundle was written (--allow-mismatch writes it all the same)"
            )
        manifest = Manifest(
            model={key: value for key, value in config.to_dict().items() if key != "classes"},
            class_names=config.classes,
            preprocess=config.preprocess,
            stages=tuple(stage.spec for stage in stages),
            segments=chain,
            views=views(config),
            gate="gate" if config.experts > 1 else None,
            precision={  # pyright: ignore[reportArgumentType] - JSON values, nested
                stage.spec.name: {
                    "type": stage.precision.value,
                    "heads": "fp16" if half_linear and stage.has_trunk else "fp32",
                    "attested": ATTESTED,
                    **plans[stage.spec.name],
                    "weights_underflowed": stage.underflowed,
                }
                for stage in stages
            },
            parity=report.to_dict() | {"allowed_mismatch": bool(report.failures)},
            tools={"python": platform.python_version()} | {name: version(name) for name in TOOLS},
            checkpoint_sha256=checkpoint_sha256,
        )

        def check(finished: Path) -> None:
            check_bundle(finished, images, report.verified)
            say("the finished bundle opens and answers as verified")
            finish(finished)

        models = {stage.spec.name: _stage_model(stage, folder) for stage in stages}
        written = write_bundle(path, manifest, models, check=check)
    return ExportResult(path, written, report)


def _graphs(
    stages: Sequence[Stage], answer: str, int8: Int8Request | None, say: Say
) -> Iterator[tuple[Stage, LearnedGraph]]:
    """Each stage's graph, and of a quantised one what was measured; one at a time, unless INT8 needs the chain."""
    if int8 is None:
        for stage in stages:
            yield stage, LearnedGraph(export_graph(stage))
        return
    say(f"calibrating INT8 ({int8.options.method}) on {int8.images.source}")
    graphs = {stage.spec.name: export_graph(stage) for stage in stages}
    quantised = quantize_graphs(stages, graphs, answer, int8, say)
    for stage in stages:
        made = quantised.get(stage.spec.name) or LearnedGraph(graphs[stage.spec.name])
        if stage.precision is Precision.INT8 and not made.nodes:
            yield replace(stage, precision=Precision.FP16), made
        else:
            yield stage, made


def _write_stage(stage: Stage, made: LearnedGraph, folder: Path, say: Say) -> dict[str, Any]:
    """Write `<stage>.onnx` and its weights, check both; return what was read back and learned, for the manifest."""
    name, graph = stage.spec.name, made.graph
    plan = check_precision(name, graph.model, stage.precision, has_trunk=stage.has_trunk)
    check_quantization(name, graph.model, made.nodes)
    path = folder / f"{name}.onnx"
    if graph.weights:
        (folder / weights_name(name)).write_bytes(graph.weights)
    path.write_bytes(graph.model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{name}: onnx.checker refuses the graph: {error}") from error
    convolutions = sum(plan.get("Conv", {}).values())
    trunk = f", {convolutions} convolutions in {stage.precision.onnx_name}" if convolutions else ""
    small = f", {stage.underflowed} weights underflowed to 0" if stage.underflowed else ""
    quantised = made.learned.get("quantized")
    integer = f", {quantised['convolutions']} of them and {quantised['adds']} sums in INT8" if quantised else ""
    size = f"weights {len(graph.weights) / 1e6:.1f} MB"
    say(f"{name}: {len(graph.model.graph.node)} nodes{trunk}{integer}, {size}{small}")
    return {"operators": plan, **made.learned}


def _stage_model(stage: Stage, folder: Path) -> StageModel:
    weights = folder / weights_name(stage.spec.name)
    return StageModel(folder / f"{stage.spec.name}.onnx", weights if weights.exists() else None)
