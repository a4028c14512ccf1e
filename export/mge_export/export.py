"""From a model to one published bundle: split, write, check, verify, publish."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mge.config import MGEConfig
from mge.cost import count_gmacs
from mge.model import MGENet
from mge_calibration.int8.cpu import cpu_graph
from mge_export.chain import join_graphs
from mge_export.experts import ExpertGraph, build_graphs, views
from mge_export.graph import export_graph, externalize, inlined, weights_name
from mge_export.images import VerifyImages
from mge_export.int8 import Int8Request, LearnedGraph, check_quantization, quantize_graphs
from mge_export.parity import ParityReport, check_bundle, measure_parity
from mge_export.precision import Precision, check_precision, infer_types
from mge_runtime.bundle import GraphModel, write_bundle
from mge_runtime.cli.info_text import parity_lines
from mge_runtime.errors import ExportError
from mge_runtime.files import check_output, temporary_folder
from mge_runtime.manifest import Manifest

TOOLS = ("mge", "torch", "timm", "onnx", "onnxscript", "onnxruntime")  # distributions that shape the graphs
ATTESTED = "onnx: types inferred from the written graph"

Say = Callable[[str], None]  # shows one line of progress
Known = dict[bytes, tuple[str, int]] | None  # weights of the graphs so far, which the next ones refer to


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
    report is within its tolerances, and the finished file, opened by the runtime, predicts as its graphs did. On any
    error, an interrupt included, an earlier bundle at `path` stays as it was.

    Args:
        model: FP32, on the CPU, in evaluation mode; left as it is.
        path: where to write, usually `mge.plan`.
        precision: of backbones and part convolutions.
        images: to verify on, at least one.
        half_linear: compute linear heads in half too, as TensorRT-RTX on Turing needs.
        int8: images to learn ranges from and how, for `Precision.INT8` and for it alone.
        checkpoint_sha256: of the file that the model came from.
        allow_mismatch: publish even if the report is out of tolerance; the bundle's report then says so.
        finish: is called with the finished bundle before it takes its place, and may add engines to it; what it raises
            keeps the bundle from being published.
        say: shows progress.

    Raises:
        ExportError: a graph cannot be written, is not of the precision asked for, or is out of tolerance, or the bundle
            does not predict as its graphs did.
        OutputError: `path` cannot be written.
        InputError: an image to verify on cannot be decoded.
        ValueError: INT8 without `int8`, or the other way round.
    """
    if (precision is Precision.INT8) is not (int8 is not None):
        raise ValueError(f"{precision.value} was asked for; images to calibrate on belong to int8, and int8 needs them")
    check_output(path)
    config = model.config
    with temporary_folder("export") as folder:
        say(f"splitting {config.experts} x {config.arch} into graphs, {precision.value}")
        graphs = build_graphs(model, precision, half_linear=half_linear)
        known: Known = {} if config.sharing == "backbone" else None
        *before, whole = count_gmacs(model)  # up to each expert; the last graph has the gate, too
        gmacs = np.diff((0.0, *before[:-1], whole)).round(9).tolist()
        written = [
            _write_graph(graph, made, folder, known, operations, say)
            for (graph, made), operations in zip(_made(graphs, int8, config, say), gmacs, strict=True)
        ]
        step = max(images.count // 10, 1)

        def progress(done: int) -> None:
            if done == images.count or done // step != (done - 1) // step:
                say(f"verified {done} of {images.count} images")

        report = measure_parity(model, graphs, folder, precision, images, progress)
        for line in ("parity with the checkpoint:", *parity_lines(report.to_dict())):
            say(line)
        if report.failures and not allow_mismatch:
            more = f" (and {len(report.failures) - 1} more)" if len(report.failures) > 1 else ""
            better = "" if images.photographs else "; these images are generated: name photographs with --verify-data"
            raise ExportError(
                f"the export is out of tolerance: {report.failures[0]}{more}; no bundle was written (--allow-mismatch "
                f"writes it all the same){better}"
            )
        manifest = Manifest(
            model={key: value for key, value in config.to_dict().items() if key != "classes"},
            class_names=config.classes,
            preprocess=config.preprocess,
            graphs=tuple(graph.spec for graph in graphs),
            views=views(config),
            crops=config.crops,
            gate="gate" if config.experts > 1 else None,
            gmacs={graph.spec.name: operations for graph, operations in zip(graphs, gmacs, strict=True)},
            precision={  # pyright: ignore[reportArgumentType] - JSON values, nested
                graph.spec.name: {
                    "type": facts.precision.value,
                    "heads": "fp16" if half_linear else "fp32",
                    "attested": ATTESTED,
                    **facts.plan,
                    "weights_underflowed": graph.underflowed,
                }
                for graph, facts in zip(graphs, written, strict=True)
            },
            parity=report.to_dict() | {"allowed_mismatch": bool(report.failures)},
            tools={"python": platform.python_version()} | {name: version(name) for name in TOOLS},
            checkpoint_sha256=checkpoint_sha256,
        )

        def check(finished: Path) -> None:
            check_bundle(finished, images, report.verified)
            say("the finished bundle opens and predicts as verified")
            finish(finished)

        models = {facts.name: facts.files for facts in written}
        chain = join_graphs(manifest, {facts.name: facts.runs_on_cpu for facts in written})
        published = write_bundle(path, manifest, models, chain=chain.SerializeToString(deterministic=True), check=check)
    return ExportResult(path, published, report)


@dataclass(frozen=True)
class _Written:
    """A graph that lies in the folder, and what the manifest says of it."""

    name: str
    files: GraphModel
    precision: Precision
    plan: dict[str, Any]  # what was read back and learned
    runs_on_cpu: onnx.ModelProto  # what a CPU computes with: of INT8 bundles the graph encoded for it


def _made(
    graphs: Sequence[ExpertGraph], int8: Int8Request | None, config: MGEConfig, say: Say
) -> Iterator[tuple[ExpertGraph, LearnedGraph]]:
    """Each graph as it is written, and of a quantized one what was learned; one at a time, unless INT8 needs all."""
    if int8 is None:
        for graph in graphs:
            yield graph, LearnedGraph(export_graph(graph))
        return
    say(f"calibrating INT8 ({int8.options.method}) on {int8.images.source}")
    boxes = [view.box for view in views(config) if view.box is not None]
    learned = quantize_graphs([export_graph(graph) for graph in graphs], boxes, config.crops, int8, say)
    yield from zip(graphs, learned, strict=True)


def _write_graph(
    source: ExpertGraph, made: LearnedGraph, folder: Path, known: Known, gmacs: float, say: Say
) -> _Written:
    """Write `<graph>.onnx` and its weights but those that are `known`, of INT8 also `<graph>.cpu.onnx`; check them."""
    graph, name, own = made.graph, source.spec.name, weights_name(source.spec.name)
    model, block = graph.model, graph.weights
    if known is not None:
        model = inlined(model, {own: block})
        block = externalize(model, own, known)
    plan = check_precision(name, infer_types(model), graph.precision)
    check_quantization(name, model, made.nodes)
    weights = folder / own
    weights.write_bytes(block)
    # In an INT8 bundle a graph may have stayed in FP16: on a CPU it runs as the others do.
    encoded = cpu_graph(model, fast=True) if source.precision is Precision.INT8 else None
    cpu = None if encoded is None else _write_model(encoded, folder / f"{name}.cpu.onnx")
    files = GraphModel(_write_model(model, folder / f"{name}.onnx"), weights if block else None, cpu)
    small = f", {source.underflowed} weights underflowed to 0" if source.underflowed else ""
    quantized = made.learned.get("quantized")
    integer = f", {quantized['convolutions']} of them and {quantized['adds']} sums in INT8" if quantized else ""
    say(
        f"{name}: {len(model.graph.node)} nodes, {sum(plan['Conv'].values())} convolutions in "
        f"{graph.precision.onnx_name}{integer}, {gmacs:.3g} GMACs, weights {len(block) / 1e6:.1f} MB{small}"
    )
    return _Written(name, files, graph.precision, {"operators": plan, **made.learned}, encoded or model)


def _write_model(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name}: onnx.checker refuses the graph: {error}") from error
    return path
