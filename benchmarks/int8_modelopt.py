"""How far INT8 by NVIDIA ModelOpt's quantiser is from FP32, beside the rows of `int8_agreement.py`.

ModelOpt pins packages that are older than the project's, so it has an environment of its own, outside the checkout:

    python3.11 -m venv ../modelopt && ../modelopt/bin/pip install "nvidia-modelopt[onnx]"
    python benchmarks/int8_modelopt.py --python ../modelopt/bin/python --ckpt last.pt --calib-data groceries/val \
        --data groceries/test

It is given each expert's graph in FP32 and the same images, chained: every expert is calibrated on what the quantised
ones before it make. Each method is used twice: with ModelOpt's own choice of layers, and around the layers that
`mge-export` would quantise. Every graph is run in FP32 around the INT8 that it says, as TensorRT computes it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import click
import numpy as np
import onnx
from int8_agreement import Models, answers, read_photographs, row, typed

from mge.checkpoint import load_checkpoint
from mge_calibration.int8.cpu import cpu_graph
from mge_calibration.int8.images import read_calibration_images
from mge_calibration.int8.sessions import Tensors, default_workers, open_graph, run_all
from mge_calibration.int8.sites import find_layers
from mge_export.experts import ExpertGraph
from mge_export.int8 import is_trunk_weight
from mge_export.precision import Precision
from mge_runtime.cli.common import reports_errors

PATH = click.Path(path_type=Path)

# Runs in ModelOpt's environment. Without data it would calibrate on random numbers, so data are always named.
QUANTIZE = """
import json, sys
import numpy as np
from modelopt.onnx.quantization import quantize
source, data, target, method, nodes = sys.argv[1:]
quantize(
    source, quantize_mode="int8", calibration_data=dict(np.load(data)), calibration_method=method,
    calibration_eps=["cpu"], nodes_to_quantize=json.loads(nodes) or None, high_precision_dtype="fp32",
    output_path=target, log_level="WARNING",
)
"""


@click.command(help=__doc__)
@click.option("--python", type=PATH, required=True, help="Of the environment that holds ModelOpt.")
@click.option("--ckpt", type=PATH, required=True)
@click.option("--calib-data", type=PATH, required=True, help="Folder of photographs to learn ranges from.")
@click.option("--calib-images", default=256, show_default=True)
@click.option("--data", type=PATH, required=True, help="DIR/<class>/*: photographs to test on.")
@click.option("--method", "methods", type=click.Choice(["entropy", "max"]), multiple=True, default=("entropy", "max"))
@reports_errors
def main(python: Path, ckpt: Path, calib_data: Path, calib_images: int, data: Path, methods: tuple[str, ...]) -> None:
    """Quantise, run and print."""
    model = load_checkpoint(ckpt)
    config = model.config
    calibration = read_calibration_images(calib_data, config.preprocess, limit=calib_images, seed=0, say=click.echo)
    frames, labels = read_photographs(data, config)
    graphs, models = typed(model, Precision.INT8)
    _, wide = typed(model, Precision.FP32)
    reference = answers(graphs, wide, frames, None)
    answer = graphs[-1].spec.logits
    for method in methods:
        for own in (True, False):
            found = quantize_chain(python, graphs, models, calibration.frames, method, own=own)
            name = f"ModelOpt, {method}, {'its own choice of layers' if own else 'the same layers'}"
            outputs = answers(graphs, models | found, frames, "exact")
            click.echo(f"{name:52} {row(model, outputs, reference, labels, answer)}")


def quantize_chain(
    python: Path, graphs: tuple[ExpertGraph, ...], models: Models, frames: np.ndarray, method: str, *, own: bool
) -> Models:
    """Quantise the graphs, each on what those before it make of the calibration images."""
    done: Models = {}
    tensors: Tensors = {"frame": frames}
    for spec in (graph.spec for graph in graphs):
        wide = cpu_graph(models[spec.name], fast=False)
        inputs = {tensor.name: tensors[tensor.name] for tensor in spec.inputs}
        nodes = [] if own else [layer.node for layer in find_layers(models[spec.name], is_trunk_weight)]
        found = done[spec.name] = quantize(python, wide, inputs, method, nodes)
        click.echo(f"{spec.name}: {describe(found)}")
        tensors |= run_all(open_graph(found), inputs, workers=default_workers())
    return done


def quantize(python: Path, graph: onnx.ModelProto, inputs: Tensors, method: str, nodes: list[str]) -> onnx.ModelProto:
    """Quantise one graph in ModelOpt's environment; `nodes`: empty for its own choice."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # ModelOpt's onnx is older and refuses newer files by their number alone; the operators are of an old opset.
        graph.ir_version = min(graph.ir_version, 10)
        onnx.save(graph, folder / "in.onnx")
        np.savez(folder / "data.npz", **inputs)  # pyright: ignore[reportArgumentType]
        files = [str(folder / file) for file in ("in.onnx", "data.npz", "out.onnx")]
        subprocess.run([python, "-c", QUANTIZE, *files, method, json.dumps(nodes)], check=True)
        return onnx.load(folder / "out.onnx")


def describe(graph: onnx.ModelProto) -> str:
    """Which operators read dequantised tensors, and how many of each."""
    coded = {name for node in graph.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    readers = Counter(node.op_type for node in graph.graph.node if coded & set(node.input))
    convolutions = sum(node.op_type == "Conv" for node in graph.graph.node)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(readers.items())) + f"; {convolutions} Conv in all"


if __name__ == "__main__":
    main()
