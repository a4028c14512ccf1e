"""Three ways to compute the same chain: the model itself, its typed modules, and their ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from mge.data.folder import normalize
from mge.model import MGENet
from mge_calibration.int8.cpu import cpu_graph
from mge_export.activations import ActivationWatch
from mge_export.experts import ExpertGraph
from mge_export.half_kernels import HalfKernels
from mge_runtime.backends.onnxruntime import import_onnxruntime, integer_entries
from mge_runtime.errors import ExportError
from mge_runtime.manifest import GraphSpec

__all__ = ["Runner", "Tensors", "onnx_runner", "reference_tensors", "run_chain", "torch_runner"]

Tensors = dict[str, np.ndarray]  # by name, batch first
Runner = Callable[[GraphSpec, Mapping[str, np.ndarray]], Tensors]  # a graph and its inputs -> its outputs


@torch.no_grad()
def reference_tensors(model: MGENet, frames: np.ndarray) -> Tensors:
    """All tensors of the chain as the checkpoint's own model computes them in FP32, neither split nor folded.

    Args:
        model: in evaluation mode.
        frames: uint8 [B, S, S, 3].
    """
    images = torch.stack([normalize(frame, model.config) for frame in frames])
    output = model(images)
    tensors: dict[str, torch.Tensor] = {"gate": output.gate, "logits": output.logits}
    logits = torch.stack([expert.logits for expert in output.experts])
    for k, expert in enumerate(output.experts, 1):
        tensors |= {f"logits_{k}": expert.logits, f"heatmap_{k}": expert.heatmap}
        if k > 1:
            tensors[f"image_{k}"] = expert.image
        if expert.box is not None:
            tensors |= {f"box_{k}": expert.box, f"mean_logits_{k}": logits[:k].mean(0)}
    return {"frame": frames} | {name: tensor.numpy() for name, tensor in tensors.items()}


def torch_runner(
    graphs: Sequence[ExpertGraph], watches: Mapping[str, ActivationWatch], *, fast_half: bool = True
) -> Runner:
    """Run the typed modules in PyTorch, which rounds every half-precision activation as a GPU does.

    Args:
        graphs: the chain.
        watches: by graph, of those that are watched; each sees what its graph computes.
        fast_half: FP16 sums by `HalfKernels`; False: by PyTorch's own kernels, slow on most CPUs.
    """
    modules = {graph.spec.name: graph for graph in graphs}

    @torch.no_grad()
    def run(spec: GraphSpec, tensors: Mapping[str, np.ndarray]) -> Tensors:
        inputs = [torch.from_numpy(tensors[tensor.name]) for tensor in spec.inputs]
        with HalfKernels() if fast_half else nullcontext(), watches.get(spec.name, nullcontext()):
            outputs = modules[spec.name](*inputs)
        return {tensor.name: output.numpy() for tensor, output in zip(spec.outputs, outputs, strict=True)}

    return run


def onnx_runner(folder: Path, specs: Sequence[GraphSpec], int8: Literal["exact", "fast"] | None = None) -> Runner:
    """Run `<graph>.onnx` files of a folder with ONNX Runtime on the CPU.

    Args:
        folder: with `<graph>.onnx` of each.
        specs: the chain.
        int8: "exact" computes as TensorRT does, "fast" as the runtime does on a CPU, with the folder's
            `<graph>.cpu.onnx`. None: as they are.

    Raises:
        ExportError: ONNX Runtime refuses a graph.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if int8 is not None:
        for key, value in (integer_entries() if int8 == "fast" else {"session.disable_quant_qdq": "1"}).items():
            options.add_session_config_entry(key, value)
    if int8 == "exact":  # read from bytes, so weights must be told where they lie
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    sessions: dict[str, Any] = {}
    for spec in specs:
        try:
            graph: Path | bytes = folder / (f"{spec.name}.cpu.onnx" if int8 == "fast" else f"{spec.name}.onnx")
            if int8 == "exact":
                graph = cpu_graph(onnx.load(graph, load_external_data=False), fast=False).SerializeToString()
            sessions[spec.name] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ExportError(f"{spec.name}: ONNX Runtime refuses the graph: {error}") from error

    def run(spec: GraphSpec, tensors: Mapping[str, np.ndarray]) -> Tensors:
        names = [tensor.name for tensor in spec.outputs]
        outputs = sessions[spec.name].run(names, {tensor.name: tensors[tensor.name] for tensor in spec.inputs})
        return dict(zip(names, (np.asarray(output) for output in outputs), strict=True))

    return run


def run_chain(specs: Sequence[GraphSpec], runner: Runner, frames: np.ndarray) -> Tensors:
    """Run all graphs in turn, each on the outputs of those before."""
    tensors: Tensors = {"frame": frames}
    for spec in specs:
        tensors |= runner(spec, tensors)
    return tensors
