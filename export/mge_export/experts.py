"""The chain as one module for each expert: its inputs, what it computes, its outputs.

Each becomes one graph with a dynamic batch; tensor names wire them, so that whatever runs the chain needs no knowledge
of experts. The last one also holds the gate and the mixture, so an early exit saves the gate's backbone. The arithmetic
of attention, heads and mixture is the model's own code.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mge.attention import attention_box, compose_view, crop_frame, crop_resize, grad_cam, shrink, whole_view
from mge.config import MGEConfig
from mge.model import Expert, Gate, MGENet, SharedGate, mix
from mge_export.dual_head import DualHead
from mge_export.precision import Precision
from mge_export.typed import TypedBackbone, half_heads, typed_copy
from mge_runtime.manifest import BATCH, FRAME, GraphSpec, Preprocess, TensorSpec, ViewSpec


class Normalize(nn.Module):
    """Images of pixels 0 to 255, normalized."""

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Float32 [B, 3, S, S] to the same."""
        # Flat, since ONNX Runtime would move the transposition behind these: channels last they take ten times as long.
        return ((image.flatten(2) / 255 - self.mean) / self.std).unflatten(2, image.shape[2:])


class ExpertGraph(nn.Module):
    """Expert k: its logits, its attention and the crop for the next one; the last: the logits of the whole chain.

    Args:
        model: left as it is; the graph owns copies of its weights.
        k: which expert, from 1.
        precision: of backbones and the part convolution.
        half_linear: compute linear heads in half too, as TensorRT-RTX on Turing needs.

    Raises:
        ExportError: a weight is not finite in this precision, or the head cannot be traced.
    """

    def __init__(self, model: MGENet, k: int, precision: Precision, *, half_linear: bool = False) -> None:
        super().__init__()
        config = model.config
        last = k == config.experts
        gate = model.gate if last else None
        self.k = k
        self.precision = precision
        self.size = config.sizes[k - 1]
        self.next_size = None if last else config.sizes[k]
        self.first_size = config.sizes[0]
        self.crops_frame = config.source_size > 0
        self.threshold = None if last else config.box_thresholds[k - 1]
        self.normalize = Normalize(config.preprocess)
        self.expert = typed_copy(cast(Expert, model.experts[k - 1]), precision, self.size)
        self.gate = typed_copy(gate, precision, config.sizes[0]) if isinstance(gate, Gate) else copy.deepcopy(gate)
        # Not always the expert's own: see MGEConfig.attention_head.
        attention_head = copy.deepcopy(model.attention_head(k - 1))
        with FakeTensorMode(allow_non_fake_inputs=True):  # computes shapes alone
            shape = self.expert.features(torch.zeros(1, 3, self.size, self.size))[1].shape
        if half_linear:
            for module in (self.expert, self.gate, attention_head):
                if module is not None:
                    half_heads(module)
        self.dual_head = DualHead(attention_head, torch.zeros(shape))
        self.spec = _spec(config, k, features_shape=tuple(shape[1:]))

    @property
    def underflowed(self) -> int:
        """How many of the backbones' weights became zero in this precision."""
        return sum(part.underflowed for part in self.modules() if isinstance(part, TypedBackbone))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """From the specification's inputs to its outputs, in its order."""
        k = self.k
        tensors = dict(zip([tensor.name for tensor in self.spec.inputs], inputs, strict=True))
        # TensorRT knows uint8 as the input of a cast alone.
        frame = tensors[FRAME].to(torch.float32) if FRAME in tensors else torch.empty(0)
        if k == 1:
            tensors["image_1"] = self._first_image(frame)
        image = tensors[f"image_{k}"]
        c4, c5 = self.expert.features(image)
        tensors[f"features_{k}"] = pooled = c5.mean((2, 3))
        logits = self.expert.concat_logits(pooled, self.expert.part_features(c4))
        _, gradient = self.dual_head(c5)
        heatmap = grad_cam(c5, gradient)
        tensors |= {f"logits_{k}": logits, f"heatmap_{k}": heatmap}
        if self.gate is not None:
            logits = torch.stack([tensors[f"logits_{number}"] for number in range(1, k + 1)], 1)
            if isinstance(self.gate, Gate):
                # The frame is made an image once more: that is cheaper than to keep the first expert's.
                weights = self.gate(self._first_image(frame))
            elif isinstance(self.gate, SharedGate):
                weights = self.gate([tensors[f"features_{number}"] for number in range(1, k + 1)])
            else:
                weights = self.gate(logits)
            tensors |= {"gate": weights, self.spec.logits: mix(self.gate, weights, logits)}
        else:
            # The mean over experts 1..k as a running mean, so that a graph needs one tensor of its predecessors.
            mean = logits.clone() if k == 1 else (tensors[f"mean_logits_{k - 1}"] * (k - 1) + logits) / k
            tensors[self.spec.logits] = mean
        if self.threshold is not None and self.next_size is not None:
            box = attention_box(heatmap, self.size, self.threshold)
            if self.crops_frame:
                view = tensors[f"box_{k - 1}"] if k > 1 else whole_view(frame.permute(0, 3, 1, 2))
                box = compose_view(view, box, self.size)
                crop = self.normalize(crop_frame(frame, box, self.next_size))
            else:
                crop = crop_resize(image, box, self.next_size)
            tensors |= {f"box_{k}": box, f"image_{k + 1}": crop}
        return tuple(tensors[tensor.name] for tensor in self.spec.outputs)

    def _first_image(self, frame: Tensor) -> Tensor:
        """What the first expert and the gate see of a frame, float32 [B, N, N, 3]."""
        return self.normalize(shrink(frame, self.first_size) if self.crops_frame else frame.permute(0, 3, 1, 2))


@torch.no_grad()
def build_graphs(model: MGENet, precision: Precision, *, half_linear: bool = False) -> tuple[ExpertGraph, ...]:
    """Split a model into the graphs of its experts, in the order they run; see `ExpertGraph`."""
    graphs = (ExpertGraph(model, k, precision, half_linear=half_linear) for k in range(1, model.config.experts + 1))
    return tuple(graph.eval().requires_grad_(False) for graph in graphs)


def views(config: MGEConfig) -> tuple[ViewSpec, ...]:
    """What each expert saw and said: expert k looks through the box of expert k - 1."""
    return tuple(
        ViewSpec(f"logits_{k}", f"heatmap_{k}", f"box_{k - 1}" if k > 1 else None) for k in range(1, config.experts + 1)
    )


def _spec(config: MGEConfig, k: int, *, features_shape: tuple[int, ...]) -> GraphSpec:
    side, sizes, classes, last = config.frame_size, config.sizes, config.num_classes, k == config.experts
    channels, *map_shape = features_shape
    gate = config.gate if last and k > 1 else None
    frame = TensorSpec(FRAME, "uint8", (BATCH, side, side, 3))
    images = [_tensor(f"image_{number}", 3, size, size) for number, size in enumerate(sizes, 1)]
    inputs = [frame] if k == 1 else [images[k - 1]]
    if gate is not None:
        inputs += [frame] if gate == "network" else []
        inputs += [_tensor(f"features_{number}", channels) for number in range(1, k) if gate == "shared"]
        inputs += [_tensor(f"logits_{number}", classes) for number in range(1, k)]
    elif k > 1:
        inputs += [frame, _tensor(f"box_{k - 1}", 4)] if config.source_size else []
        inputs.append(_tensor(f"mean_logits_{k - 1}", classes))
    logits = "logits" if last else f"mean_logits_{k}"
    outputs = [_tensor(f"logits_{k}", classes), _tensor(f"heatmap_{k}", *map_shape)]
    # The last expert's map is looked at, but nothing is cropped by it: it has no threshold and no box.
    outputs += [] if last else [_tensor(f"box_{k}", 4), images[k]]
    outputs += [_tensor("gate", config.experts)] if gate is not None else []
    outputs += [_tensor(f"features_{k}", channels)] if config.gate == "shared" and not last else []
    return GraphSpec(f"expert_{k}", tuple(inputs), (*outputs, _tensor(logits, classes)), logits)


def _tensor(name: str, *axes: int) -> TensorSpec:
    return TensorSpec(name, "float32", (BATCH, *axes))
