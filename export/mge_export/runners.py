"""Three ways to compute the same chain: the model itself, its typed stages, and their ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mge.data.folder import normalize
from mge.model import MGENet
from mge_export.activations import ActivationWatch
from mge_export.half_kernels import HalfKernels
from mge_export.stages import Stage
from mge_runtime.backends.ort import import_onnxruntime
from mge_runtime.bundle.cpu_graph import cpu_graph, integer_entries
from mge_runtime.errors import ExportError
from mge_runtime.spec import StageSpec

__all__ = ["Runner", "Tensors", "onnx_runner", "reference_tensors", "run_chain", "torch_runner"]

Tensors = dict[str, np.ndarray]  # by name, batch first
Runner = Callable[[StageSpec, Mapping[str, np.ndarray]], Tensors]  # a stage and what it takes in -> what it puts out


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
    answers = torch.stack([expert.logits for expert in output.experts])
    for k, expert in enumerate(output.experts, 1):
        tensors |= {f"image_{k}": expert.image, f"logits_{k}": expert.logits, f"heatmap_{k}": expert.heatmap}
        tensors[f"answer_{k}"] = answers[:k].mean(0)
        if expert.box is not None:
            tensors[f"box_{k}"] = expert.box
    return {"frame": frames} | {name: tensor.numpy() for name, tensor in tensors.items()}


def torch_runner(stages: Sequence[Stage], watches: Mapping[str, ActivationWatch], *, fast_half: bool = True) -> Runner:
    """Run the typed modules in PyTorch, which rounds every half-precision activation as a GPU does.

    Args:
        stages: the chain.
        watches: by stage, of those that are watched; each sees what its stage computes.
        fast_half: FP16 sums by `HalfKernels`; False: by PyTorch's own kernels, slow on most CPUs.
    """
    modules = {stage.spec.name: stage.module for stage in stages}

    @torch.no_grad()
    def run(spec: StageSpec, tensors: Mapping[str, np.ndarray]) -> Tensors:
        inputs = [torch.from_numpy(tensors[tensor.name]) for tensor in spec.inputs]
        with HalfKernels() if fast_half else nullcontext(), watches.get(spec.name, nullcontext()):
            outputs = modules[spec.name](*inputs)
        return {tensor.name: output.numpy() for tensor, output in zip(spec.outputs, outputs, strict=True)}

    return run


def onnx_runner(folder: Path, specs: Sequence[StageSpec], int8: Literal["exact", "fast"] | None = None) -> Runner:
    """Run `<stage>.onnx` files of a folder with ONNX Runtime on the CPU.

    Args:
        folder: with `<stage>.onnx` of each.
        specs: the chain.
        int8: re-encode the graphs as `cpu_graph` does: "exact" computes as TensorRT does, "fast" as the runtime's
            backend does on a CPU. None: as they are.

    Raises:
        ExportError: ONNX Runtime refuses a graph.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if int8 is not None:  # read from bytes, so their weights must be told where they lie
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        for key, value in (integer_entries() if int8 == "fast" else {"session.disable_quant_qdq": "1"}).items():
            options.add_session_config_entry(key, value)
    sessions: dict[str, Any] = {}
    for spec in specs:
        try:
            path = folder / f"{spec.name}.onnx"
            graph = path if int8 is None else cpu_graph(path.read_bytes(), fast=int8 == "fast")
            sessions[spec.name] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ExportError(f"{spec.name}: ONNX Runtime refuses the graph: {error}") from error

    def run(spec: StageSpec, tensors: Mapping[str, np.ndarray]) -> Tensors:
        names = [tensor.name for tensor in spec.outputs]
        outputs = sessions[spec.name].run(names, {tensor.name: tensors[tensor.name] for tensor in spec.inputs})
        return dict(zip(names, (np.asarray(output) for output in outputs), strict=True))

    return run


def run_chain(specs: Sequence[StageSpec], runner: Runner, frames: np.ndarray) -> Tensors:
    """Run all stages in turn, each on what the ones before put out."""
    tensors: Tensors = {"frame": frames}
    for spec in specs:
        tensors |= runner(spec, tensors)
    return tensors
