"""How far INT8 is from FP32 on photographs, by how its ranges are learned and on which crops.

    python benchmarks/int8_agreement.py --ckpt last.pt --calib-data groceries/val --data groceries/test

Each row is one way to quantise the same trunks: ranges by maximum, percentile, entropy or mean squared error, experts
calibrated on the crops of quantised experts or of float ones ("float crops"), and every layer in INT8 or as many as
`--max-drop` and `--min-box-iou` allow. Each is run as TensorRT computes it ("exact") or as a CPU does ("fast"). Class
and top-1 are of the chain's answer, with a 95 % bootstrap interval of the difference in top-1 over photographs; the box
is what expert k sees, in pixels of the frame, composed through the earlier crops. `--onnxruntime` adds what ONNX
Runtime's own `quantize_static` makes of the same graphs and images, around the same layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import onnx

from mge.checkpoint import load_checkpoint
from mge.config import MGEConfig
from mge.model import MGENet
from mge_calibration.int8.chain import quantize_chain
from mge_calibration.int8.cpu import cpu_graph
from mge_calibration.int8.graph import Int8Options
from mge_calibration.int8.images import read_calibration_images
from mge_calibration.int8.ranges import METHODS
from mge_calibration.int8.sessions import BATCH, Tensors, open_graph, run_all
from mge_calibration.int8.sites import find_layers
from mge_export.differences import ChainDifferences
from mge_export.experts import ExpertGraph, build_graphs
from mge_export.graph import export_graph, inlined
from mge_export.int8 import is_trunk_weight
from mge_export.precision import Precision
from mge_export.runners import onnx_runner, run_chain
from mge_runtime.cli.common import reports_errors
from mge_runtime.decode import decode_image
from mge_runtime.metrics import bootstrap_mean
from mge_runtime.preprocess import to_frame
from mge_runtime.sources import list_folder

Models = dict[str, onnx.ModelProto]
PATH = click.Path(path_type=Path)


@click.command(help=__doc__)
@click.option("--ckpt", type=PATH, required=True)
@click.option("--calib-data", type=PATH, required=True, help="Folder of photographs to learn ranges from.")
@click.option("--calib-images", default=256, show_default=True)
@click.option("--data", type=PATH, required=True, help="DIR/<class>/*: photographs to test on.")
@click.option("--max-drop", default=0.5, show_default=True, help="Percent, of the rows that leave layers in FP16.")
@click.option("--min-box-iou", default=0.9, show_default=True, help="Of the same rows: least median IoU of a box.")
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, default=("mse",))
@click.option("--float-crops/--no-float-crops", default=True, help="Also calibrate on the crops of float experts.")
@click.option("--all-layers/--no-all-layers", default=True, help="Also with every layer in INT8.")
@click.option("--onnxruntime", "static", is_flag=True, help="Also ONNX Runtime's own quantiser.")
@reports_errors
def main(
    ckpt: Path,
    calib_data: Path,
    calib_images: int,
    data: Path,
    max_drop: float,
    min_box_iou: float,
    methods: tuple[str, ...],
    float_crops: bool,
    all_layers: bool,
    static: bool,
) -> None:
    """Quantise, run and print."""
    model = load_checkpoint(ckpt)
    config = model.config
    calibration = read_calibration_images(calib_data, config.preprocess, limit=calib_images, seed=0, say=click.echo)
    frames, labels = read_photographs(data, config)
    click.echo(
        f"{config.arch} at {config.image_size} px; calibrated on {calibration.source}; {len(frames)} photographs"
    )
    graphs, models = typed(model, Precision.INT8)
    _, wide = typed(model, Precision.FP32)
    reference = answers(graphs, wide, frames, None)
    answer = graphs[-1].spec.logits
    click.echo(f"FP32: top-1 {100 * (reference[answer].argmax(1) == labels).mean():.2f} %")

    def show(name: str, found: Models) -> None:
        for how in ("exact", "fast"):
            outputs = answers(graphs, models | found, frames, how)
            click.echo(f"{name:34} {how:5} {row(model, outputs, reference, labels, answer)}")

    show("FP16, not quantised", {})
    drops = ((1 - 1e-9, "all layers"),) if all_layers else ()
    for method in methods:
        for crops in (False, True) if float_crops else (False,):
            for drop, label in (*drops, (max_drop / 100, f"max-drop {max_drop:g}")):
                options = Int8Options(
                    method, max_drop=drop, float_crops=crops, min_box_iou=min_box_iou if drop < 1 - 1e-6 else 0
                )
                results = quantize_chain(
                    [graph.spec for graph in graphs],
                    models,
                    is_trunk_weight,
                    calibration.frames,
                    options,
                    click.echo,
                )
                name = f"{method}, {label}" + (", float crops" if crops else "")
                show(name, {graph: result.model for graph, result in results.items()})
    if static:
        show("quantize_static, MinMax", quantize_static_chain(graphs, models, calibration.frames))


def read_photographs(data: Path, config: MGEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [N, S, S, 3] of the photographs in DIR/<class>/, and their class indices [N]."""
    paths = [item.path for item in list_folder(data).whole() if item.path is not None]
    frames = np.stack([to_frame(decode_image(path), config.preprocess)[0] for path in paths])
    return frames, np.array([config.classes.index(path.relative_to(data).parts[0]) for path in paths])


def typed(model: MGENet, precision: Precision) -> tuple[tuple[ExpertGraph, ...], Models]:
    """The chain's modules and their graphs, not quantised, with their weights."""
    graphs = build_graphs(model, precision)
    return graphs, {graph.spec.name: inlined(export_graph(graph)) for graph in graphs}


def answers(graphs: tuple[ExpertGraph, ...], models: Models, frames: np.ndarray, int8: str | None) -> Tensors:
    """All small tensors of the chain over all frames."""
    specs = [graph.spec for graph in graphs]
    with tempfile.TemporaryDirectory() as name:
        for graph, model in models.items():
            onnx.save(model, Path(name) / f"{graph}.onnx")
            if int8 == "fast":
                onnx.save(cpu_graph(model, fast=True), Path(name) / f"{graph}.cpu.onnx")
        runner = onnx_runner(Path(name), specs, int8=int8)  # pyright: ignore[reportArgumentType]
        parts = [run_chain(specs, runner, frames[start : start + BATCH]) for start in range(0, len(frames), BATCH)]
    return {key: np.concatenate([part[key] for part in parts]) for key, value in parts[0].items() if value.ndim < 4}


def row(model: MGENet, found: Tensors, reference: Tensors, labels: np.ndarray, answer: str) -> str:
    """Agreement, accuracy and boxes of one variant."""
    config = model.config
    boxes = [f"box_{k}" for k in range(1, config.experts)]
    differences = ChainDifferences(answer, boxes, config.image_size)
    differences.add(found, reference)
    ours, theirs = found[answer].argmax(1) == labels, reference[answer].argmax(1) == labels
    change = 100 * (ours.astype(float) - theirs)
    mean, low, high = bootstrap_mean(change, resamples=2000)
    ious = " ".join(f"{np.median(values):.3f}" for values in differences.box_iou.values())
    return (
        f"same class {100 * (1 - np.mean(differences.class_changes)):.2f} %, top-1 {100 * ours.mean():.2f} % "
        f"({mean:+.2f} [{low:+.2f}, {high:+.2f}]), median box IoU {ious}"
    )


def quantize_static_chain(graphs: tuple[ExpertGraph, ...], models: Models, frames: np.ndarray) -> Models:
    """ONNX Runtime's `quantize_static` with the settings that TensorRT takes, each graph on what those before make.

    It is given the graphs in FP32, since it cannot read FP16 ones without changing them.
    """
    from mge_runtime.backends.onnxruntime import load_onnxruntime

    quantization = load_onnxruntime("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, inputs: Mapping[str, np.ndarray]) -> None:
            count = len(next(iter(inputs.values())))
            self._batches = iter([{k: v[i : i + BATCH] for k, v in inputs.items()} for i in range(0, count, BATCH)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    done: Models = {}
    tensors: Tensors = {"frame": frames}
    for graph in graphs:
        name = graph.spec.name
        wide = cpu_graph(models[name], fast=False)
        inputs = {tensor.name: tensors[tensor.name] for tensor in graph.spec.inputs}
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "quantised.onnx"
            quantization.quantize_static(
                wide,
                target,
                Reader(inputs),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_quantize=[layer.node for layer in find_layers(models[name], is_trunk_weight)],
                extra_options={"ActivationSymmetric": True, "QuantizeBias": False, "WeightSymmetric": True},
            )
            wide = onnx.load(target)
        done[name] = wide
        tensors |= run_all(open_graph(wide), inputs)
    return done


if __name__ == "__main__":
    main()
