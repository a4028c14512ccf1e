"""Ways to cut a box out of an image and resize it, as ONNX Runtime's CPU provider computes them.

    python benchmarks/crop_operators.py [--size 112 --size 448] [--threads 1] [--rounds 30]

"lines" is `mge.attention.crop_resize` as it is exported. The others are single operators, or two matrix products by
given weights: what they need before (regions, grids, weights) is not counted, and their pixels differ in the last place
or, RoiAlign's and GridSample's regions aside, not at all. Resize is asked for one pixel more on each side: ONNX Runtime
1.31 hands back the image itself where a region is resized to the size of the whole (seen here, and printed). Ways run
in turn, in an order drawn anew for each round; reported is the median of the rounds.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import click
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from mge.attention import crop_resize
from mge_export.graph import OPSET
from mge_runtime.backends.onnxruntime import load_onnxruntime

onnxruntime = load_onnxruntime()

Way = Callable[[], Any]


class Crop(nn.Module):
    """The crop alone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] and [B, 4] to [B, 3, S, S]."""
        return crop_resize(image, box, self.size)


@click.command(help=__doc__)
@click.option("--size", "sizes", multiple=True, default=[112, 448], show_default=True, help="Of the image, in pixels.")
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=30, show_default=True)
def main(sizes: tuple[int, ...], threads: int, rounds: int) -> None:
    """Build, time, print."""
    for size in sizes:
        ways = make_ways(size, threads)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        names, order = list(ways), random.Random(0)
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                ways[name]()
                begin = time.perf_counter()
                for _ in range(5):
                    ways[name]()
                taken[name].append((time.perf_counter() - begin) / 5)
        click.echo(f"{size} x {size} pixels, {threads} threads, median of {rounds} rounds, us")
        for name, seconds in taken.items():
            click.echo(f"  {name:36} {1e6 * median(seconds):8.0f}")


def make_ways(size: int, threads: int) -> dict[str, Way]:
    """Every way, ready to run on one image."""
    random_numbers = np.random.default_rng(0)
    image = random_numbers.normal(0, 1, (1, 3, size, size)).astype(np.float32)
    box = np.array([[size // 8, size // 6, size * 3 // 4, size * 7 // 8]], np.float32)
    share = (box - [0, 0, 1, 1]) / (size - 1)  # of the way from the first to the last pixel
    x0, y0, x1, y1 = share[0].astype(np.float32)
    steps = np.linspace(0, 1, size, dtype=np.float32)
    grid = np.stack(np.meshgrid(x0 + steps * (x1 - x0), y0 + steps * (y1 - y0)), -1)[None] * 2 - 1
    weights = random_numbers.normal(0, 1, (1, 1, size, size)).astype(np.float32)
    region = np.array([0, 0, y0, x0, 1, 1, y1, x1], np.float32)
    node = helper.make_node

    def resize(pixels: int) -> Way:
        crop = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
        feeds = {"image": image, "region": region, "sizes": np.array([1, 3, pixels, pixels])}
        return way([node("Resize", ["image", "region", "", "sizes"], ["crop"], **crop)], feeds, threads)

    same = resize(size)()[0]
    if np.array_equal(same, image):
        click.echo(
            f"Resize of a region to the size of the whole gives the whole (ONNX Runtime {onnxruntime.__version__})"
        )
    roi = {"output_height": size, "output_width": size, "sampling_ratio": 1}
    number = {"box": box, "batch": np.zeros(1, np.int64)}
    place = {"share": share[:, [1, 0, 3, 2]].astype(np.float32), "batch": np.zeros(1, np.int32)}
    return {
        "lines (mge.attention.crop_resize)": way(exported_crop(size), {"image": image, "box": box}, threads),
        "two matrix products": way(
            [node("MatMul", ["image", "x"], ["rows"]), node("MatMul", ["y", "rows"], ["crop"])],
            {"image": image, "x": weights, "y": weights},
            threads,
        ),
        "Resize of a region, a pixel more": resize(size + 1),
        "RoiAlign": way(
            [node("RoiAlign", ["image", "box", "batch"], ["crop"], **roi)], {"image": image, **number}, threads
        ),
        "CropAndResize (com.microsoft)": way(
            [node("CropAndResize", ["image", "share", "batch", "size"], ["crop"], domain="com.microsoft")],
            {"image": image, **place, "size": np.array([size, size], np.int32)},
            threads,
        ),
        "GridSample": way(
            [node("GridSample", ["image", "grid"], ["crop"], align_corners=1, mode="bilinear")],
            {"image": image, "grid": grid.astype(np.float32)},
            threads,
        ),
    }


def way(graph: onnx.ModelProto | list[onnx.NodeProto], feeds: dict[str, np.ndarray], threads: int) -> Way:
    """A session, and a call that runs it."""
    if isinstance(graph, list):
        kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
        inputs = [
            helper.make_tensor_value_info(name, kinds.get(value.dtype, TensorProto.INT32), value.shape)
            for name, value in feeds.items()
        ]
        outputs = [helper.make_tensor_value_info("crop", TensorProto.FLOAT, None)]
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_model(helper.make_graph(graph, "g", inputs, outputs), opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def exported_crop(size: int) -> onnx.ModelProto:
    """The crop with a dynamic batch, as `mge-export` traces it."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            Crop(size),
            (torch.zeros(2, 3, size, size), torch.zeros(2, 4)),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image", "box"],
            dynamic_shapes=({0: batch}, {0: batch}),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("the exporter returned no graph")
    return program.model_proto


if __name__ == "__main__":
    main()
