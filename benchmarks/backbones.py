"""The bare backbones of a model: what a chain costs at least, heads, attention and crops left out.

Each is exported by itself as anybody would export a classifier's backbone, from image to c5 as the heads read it, and
runs as a plain ONNX Runtime session, on an image that stays in the device's memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mge.model import Expert, Gate, MGENet
from mge_export.graph import OPSET
from mge_runtime.backends.onnxruntime import load_onnxruntime


class _Backbone(nn.Module):
    """Image [B, 3, S, S] to c5 [B, D5, S/32, S/32] of an expert or the gate."""

    def __init__(self, network: Expert | Gate) -> None:
        super().__init__()
        self.backbone, self.norm5 = network.backbone, network.norm5

    def forward(self, image: Tensor) -> Tensor:
        return self.norm5(self.backbone(image)[-1])


class BareBackbones:
    """Every backbone of a model in turn, on one image each.

    Args:
        model: in evaluation mode, on the CPU.
        batch: images in a run.
        threads: of each session on a CPU; 0: all processors.
        device: "cpu" or "cuda:0" (not run so far).
        half: compute in FP16, as an FP16 bundle does on a GPU.
    """

    def __init__(self, model: MGENet, batch: int, *, threads: int = 0, device: str = "cpu", half: bool = False) -> None:
        ort: Any = load_onnxruntime()
        kind, _, index = device.partition(":")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # As the chain's: sessions that run in turn must not spin while the next one computes, which costs up to half.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        provider = "CPUExecutionProvider" if kind == "cpu" else ("CUDAExecutionProvider", {"device_id": index})
        size = model.config.image_size
        image = torch.rand((batch, 3, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1
        image = image.half() if half else image
        self._runs: list[tuple[Any, Any]] = []
        with TemporaryDirectory() as folder:
            for number, backbone in enumerate(_backbones(model)):
                path = Path(folder) / f"{number}.onnx"
                _export(backbone.half() if half else backbone, image, path)
                session = ort.InferenceSession(str(path), options, providers=[provider])
                value = ort.OrtValue.ortvalue_from_numpy(image.numpy(), kind, int(index or 0))
                binding = session.io_binding()
                binding.bind_ortvalue_input("image", value)
                binding.bind_output("c5", kind, int(index or 0))
                self._runs.append((session, binding))

    def __len__(self) -> int:
        return len(self._runs)

    def __call__(self) -> None:
        """Run every backbone."""
        for session, binding in self._runs:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

    def outputs(self) -> list[Any]:
        """c5 of each backbone after a run, [B, D5, S/32, S/32]."""
        return [binding.copy_outputs_to_cpu()[0] for _, binding in self._runs]


def _backbones(model: MGENet) -> Iterator[_Backbone]:
    for network in (*model.experts, model.gate):
        if isinstance(network, Expert | Gate):
            yield _Backbone(network).eval()


def _export(backbone: nn.Module, image: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(
            backbone,
            (image,),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["c5"],
            external_data=True,
            verbose=False,
        )
