"""Three ways to compute the same chain: the model itself, its typed modules, and their ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mge.data.folder import normalize
from mge.model import MGENet
from mge_calibration.int8.cpu import cpu_graph
from mge_export.experts import ExpertGraph
from mge_runtime.backends.onnxruntime import import_onnxruntime, integer_entries
from mge_runtime.errors import ExportError
from mge_runtime.manifest import FRAME, GraphSpec

Tensors = dict[str, np.ndarray]  # by name, batch first
Runner = Callable[[GraphSpec, Mapping[str, np.ndarray]], Tensors]  # a graph and its inputs -> its outputs

FP16_MAX = 65504.0
_SUMS = frozenset({"convolution", "mm", "addmm", "bmm", "baddbmm", "linear"})


@torch.no_grad()
def reference_tensors(model: MGENet, frames: np.ndarray) -> Tensors:
    """All tensors of the chain as the checkpoint's own model computes them in FP32, neither split nor folded.

    Args:
        model: in evaluation mode.
        frames: uint8 [B, S, S, 3].
    """
    images = normalize(frames, model.config).contiguous()
    output = model(images)
    tensors: dict[str, Tensor] = {"gate": output.gate, "logits": output.logits}
    logits = torch.stack([expert.logits for expert in output.experts])
    for k, expert in enumerate(output.experts, 1):
        tensors |= {f"logits_{k}": expert.logits, f"heatmap_{k}": expert.heatmap}
        if k > 1:
            tensors[f"image_{k}"] = expert.image
        if expert.box is not None:
            tensors |= {f"box_{k}": expert.box, f"mean_logits_{k}": logits[:k].mean(0)}
            if model.config.gate == "shared":
                tensors[f"features_{k}"] = expert.pooled
    return {FRAME: frames} | {name: tensor.numpy() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Peak:
    """The largest activation that was seen."""

    value: float  # absolute; inf or nan if one was not finite
    operator: str  # PyTorch's name of the operator that computed it


class TypedRun(TorchDispatchMode):
    """Run an expert's typed module in PyTorch, which rounds every half-precision activation as a GPU does.

    Sums of products of FP16 tensors are computed in FP32 and rounded once, as a GPU's matrix units do; PyTorch's own
    FP16 kernels do nearly the same, ten to thirty times more slowly on a CPU without FP16 arithmetic. Every tensor
    stays FP16; all other operators are PyTorch's own. On the way the largest value is recorded of all maps
    [B, C, h, w] in the graph's type but those of the image's normalization: FP16 ends at 65504.
    """

    def __init__(self, graph: ExpertGraph) -> None:
        super().__init__()
        self.peak = Peak(0.0, "")
        self._graph = graph
        self._watching = True

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, np.ndarray]) -> Tensors:
        """From the graph's inputs, among others, to its outputs."""
        spec, aside = self._graph.spec, self._graph.normalize
        inputs = [torch.from_numpy(tensors[tensor.name]) for tensor in spec.inputs]
        hooks = [] if aside is None else [
            aside.register_forward_pre_hook(lambda *_: setattr(self, "_watching", False)),
            aside.register_forward_hook(lambda *_: setattr(self, "_watching", True)),
        ]  # fmt: skip
        try:
            with self:
                outputs = self._graph(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return {tensor.name: output.numpy() for tensor, output in zip(spec.outputs, outputs, strict=True)}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operator and look at its results."""
        del types
        half = [isinstance(value, Tensor) and value.dtype is torch.float16 for value in args]
        if str(func).split(".")[1] in _SUMS and any(half):
            wide = [value.float() if narrow else value for value, narrow in zip(args, half, strict=True)]
            result = func(*wide, **(kwargs or {})).half()
        else:
            result = func(*args, **(kwargs or {}))
        if self._watching:
            for value in result if isinstance(result, (tuple, list)) else (result,):
                self._watch(value, str(func))
        return result

    def _watch(self, value: object, operator: str) -> None:
        # Maps of another type are those of an FP32 island, which cannot overflow FP16.
        dtype = self._graph.precision.dtype
        if isinstance(value, Tensor) and value.dtype is dtype and value.ndim == 4 and value.numel():
            low, high = torch.aminmax(value)
            largest = max(abs(float(low)), abs(float(high)))
            # Not `>`: a NaN must be kept, and stays.
            if not largest <= self.peak.value and self.peak.value == self.peak.value:
                self.peak = Peak(largest, operator)


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
