"""What other runtimes make of a chain, beside ONNX Runtime: does it convert, does it agree, how long does it take?

    mge-export --ckpt best.pt --onnx chain.onnx
    python -m benchmarks.runtimes chain.onnx groceries/test --ckpt best.pt

Tried is what is installed: OpenVINO, ONNX Runtime's provider for it and ncnn (by pnnx) read `chain.onnx`; LiteRT and
ExecuTorch convert the checkpoint's graphs in PyTorch. What fails is named with its reason. Compared are class,
probabilities and boxes on photographs that are spread evenly over the folder, one by one. The process keeps to one
processor, and times are processor time: what else runs here takes turns with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import click
import numpy as np
import onnx

from benchmarks.rounds import ratio, time_rounds
from mge_export.openvino import load_openvino
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.decode import decode_image
from mge_runtime.errors import brief
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import to_frame
from mge_runtime.sources import find_images

OURS = "ONNX Runtime"
PNNX_SECONDS = 120  # it takes one, or never ends
Predict = Callable[[np.ndarray], list[np.ndarray]]  # a frame [1, S, S, 3] to probabilities and each box


def onnx_runtime(chain: Path, names: list[str], provider: str = "CPUExecutionProvider", **settings: str) -> Predict:
    """ONNX Runtime on one thread."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(chain, options, providers=[provider], provider_options=[settings])
    return lambda frame: session.run(names, {"frame": frame})


def openvino(chain: Path, names: list[str], **settings: str) -> Predict:
    """OpenVINO on one thread."""
    model = load_openvino().Core().compile_model(chain, "CPU", {"INFERENCE_NUM_THREADS": 1, **settings})

    def predict(frame: np.ndarray) -> list[np.ndarray]:
        found = model({"frame": frame})
        return [found[name] for name in names]

    return predict


def ncnn(chain: Path, size: int) -> Predict:
    """ncnn: no chain has come further than to its list of layers so far."""
    import ncnn  # pyright: ignore[reportMissingImports]
    import pnnx  # pyright: ignore[reportMissingImports]

    program = Path(str(pnnx.__file__)).with_name("pnnx")
    words = [program, chain, f"inputshape=[1,{size},{size},3]u8"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PNNX_SECONDS)
    if done.returncode:
        raise RuntimeError(f"pnnx ended with {done.returncode} after: {done.stdout.splitlines()[-1]}")
    layers = {row.split()[0] for row in chain.with_suffix(".ncnn.param").read_text().splitlines()[2:]}
    unknown = sorted(layer for layer in layers if ncnn.layer_to_index(layer) < 0)
    raise RuntimeError(f"pnnx converts, ncnn {ncnn.__version__} has no layer {', '.join(unknown)}")


def traced(ckpt: Path, names: list[str]) -> Any:
    """The chain in PyTorch as one module: a frame, uint8 [1, S, S, 3], to the named tensors."""
    import torch

    from mge.checkpoint import load_checkpoint
    from mge_export.experts import build_graphs
    from mge_export.precision import Precision

    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graphs = torch.nn.ModuleList(build_graphs(load_checkpoint(ckpt), Precision.FP32))

        def forward(self, frame: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tensors = {"frame": frame}
            for graph in self.graphs:
                spec: Any = graph.spec
                found = graph(*(tensors[tensor.name] for tensor in spec.inputs))
                tensors |= zip([tensor.name for tensor in spec.outputs], found, strict=True)
            tensors["probabilities"] = tensors["logits"].softmax(1)
            return tuple(tensors[name] for name in names)

    return Chain().eval()


def litert(ckpt: Path, names: list[str], frame: np.ndarray, folder: Path) -> Predict:
    """LiteRT with its XNNPACK delegate, on one thread."""
    import litert_torch  # pyright: ignore[reportMissingImports]
    import torch
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    litert_torch.convert(traced(ckpt, names), (torch.from_numpy(frame),)).export(str(folder / "chain.tflite"))
    interpreter = Interpreter(str(folder / "chain.tflite"), num_threads=1)
    interpreter.allocate_tensors()
    place, *_ = interpreter.get_input_details()
    places = [detail["index"] for detail in interpreter.get_output_details()]

    def predict(frame: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(place["index"], frame)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in places]

    return predict


def executorch(ckpt: Path, names: list[str], frame: np.ndarray, folder: Path) -> Predict:
    """ExecuTorch with its XNNPACK backend; operators that this does not know run in portable kernels."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    program = torch.export.export(traced(ckpt, names), (torch.from_numpy(frame),))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (folder / "chain.pte").write_bytes(lowered.buffer)
    loaded = Runtime.get().load_program(folder / "chain.pte")
    forward = loaded.load_method("forward")
    return lambda frame: [tensor.numpy().copy() for tensor in forward.execute([torch.from_numpy(frame)])]


def makers(
    chain: Path, ckpt: Path | None, names: list[str], frame: np.ndarray, folder: Path
) -> Iterator[tuple[str, Callable[[], Predict]]]:
    """Every way that is installed, by name."""
    if find_spec("openvino"):
        name = f"OpenVINO {version('openvino')}"
        yield f"{name}, f32", lambda: openvino(chain, names, INFERENCE_PRECISION_HINT="f32")
        yield f"{name}, its default", lambda: openvino(chain, names)
    if "OpenVINOExecutionProvider" in load_onnxruntime().get_available_providers():
        settings = {"device_type": "CPU", "num_of_threads": "1", "precision": "FP32"}
        yield (
            "ONNX Runtime, OpenVINOExecutionProvider",
            lambda: onnx_runtime(chain, names, "OpenVINOExecutionProvider", **settings),
        )
    if find_spec("pnnx"):
        copied = Path(shutil.copy(chain, folder / "ncnn.onnx"))  # pnnx writes beside it
        yield f"ncnn, pnnx {version('pnnx')}", lambda: ncnn(copied, frame.shape[1])
    if ckpt and find_spec("litert_torch"):
        name = f"LiteRT {version('ai-edge-litert')}, litert-torch {version('litert-torch')}"
        yield name, lambda: litert(ckpt, names, frame, folder)
    if ckpt and find_spec("executorch"):
        yield f"ExecuTorch {version('executorch')}", lambda: executorch(ckpt, names, frame, folder)


def agreement(expected: list[list[np.ndarray]], found: list[list[np.ndarray]]) -> str:
    """In words: classes, the largest difference of a probability, how far edges of boxes lie apart."""
    ours, theirs = (np.concatenate([row[0] for row in rows]) for rows in (expected, found))
    boxes, others = (np.concatenate([np.stack(row[1:], 1) for row in rows]) for rows in (expected, found))
    apart = np.abs(boxes - others).max((1, 2), initial=0)
    same = (ours.argmax(1) == theirs.argmax(1)).sum()
    return (
        f"same class {same}/{len(ours)}, max |dp| {np.abs(ours - theirs).max():.1e}, "
        f"boxes within a pixel {(apart <= 1).sum()}/{len(ours)}, farthest {apart.max():.0f} px"
    )


@click.command(help=__doc__)
@click.argument("chain", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--ckpt", type=click.Path(path_type=Path, exists=True), help="For LiteRT and ExecuTorch.")
@click.option("--images", "count", default=100, show_default=True)
@click.option("--rounds", default=15, show_default=True)
def main(chain: Path, folder: Path, ckpt: Path | None, count: int, rounds: int) -> None:
    """Convert, compare, time, print."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    model = onnx.load(chain, load_external_data=False)
    props: Mapping[str, str] = {entry.key: entry.value for entry in model.metadata_props}
    mean, std = (tuple(json.loads(props[key])) for key in ("mean", "std"))
    spec = Preprocess(int(props["resize"]), int(props["size"]), mean, std)
    outputs = [tensor.name for tensor in model.graph.output]
    names = ["probabilities", *(name for name in outputs if name.startswith("box_"))]
    paths = [image.path for image in find_images([str(folder)]).whole()]
    chosen = [paths[number * len(paths) // count] for number in range(count)]
    # Not [None], whose stride of 0 ExecuTorch refuses.
    frames = [np.stack([to_frame(decode_image(path), spec)[0]]) for path in chosen]
    ways: dict[str, Predict] = {OURS: onnx_runtime(chain, names)}
    expected = [ways[OURS](frame) for frame in frames]
    with TemporaryDirectory() as scratch:
        for name, make in makers(chain, ckpt, names, frames[0], Path(scratch)):
            try:
                predict = make()
                click.echo(f"{name}: {agreement(expected, [predict(frame) for frame in frames])}")
            except Exception as error:  # every library has exceptions of its own
                click.echo(f"{name}: {type(error).__name__}: {brief(error)}")
            else:
                ways[name] = predict
        frame = frames[0]
        taken = time_rounds(
            {name: lambda predict=predict: predict(frame) for name, predict in ways.items()}, rounds, clock=process_time
        )
    for name, times in taken.items():
        beside = f", {ratio(times, taken[OURS])} x {OURS}" if name != OURS else f" {load_onnxruntime().__version__}"
        click.echo(f"{name}{beside}: {np.median(times):.1f} ms of processor time")


if __name__ == "__main__":
    main()
