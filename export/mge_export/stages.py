"""The chain as separate modules: what each stage takes in, computes and puts out.

`ingest` -> `expert_1` .. `expert_K` -> `gate` -> `mixture`. Each becomes one small graph with a dynamic batch; tensor
names wire them, so that whatever runs the chain needs no knowledge of experts. The arithmetic of attention, heads and
mixture is the model's own code.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mge.attention import attention_box, crop_resize, grad_cam
from mge.config import MGEConfig
from mge.model import Expert, Gate, MGENet
from mge_export.dual_head import DualHead
from mge_export.precision import Precision
from mge_export.typed import TypedTrunk, half_heads, typed_expert, typed_gate
from mge_runtime.spec import BATCH, Preprocess, SegmentSpec, StageSpec, TensorSpec, ViewSpec

__all__ = ["ExpertStage", "GateStage", "IngestStage", "MixtureStage", "Stage", "build_stages", "segments", "views"]


@dataclass(frozen=True)
class Stage:
    """A stage's border and the module behind it."""

    spec: StageSpec
    module: nn.Module  # takes the spec's inputs in order, returns a tuple of its outputs in order
    precision: Precision  # of the trunk and the part convolution; FP32 for stages that have neither
    has_trunk: bool  # False: no convolution is expected in its graph

    @property
    def underflowed(self) -> int:
        """How many of the trunk's weights became zero in this precision."""
        return sum(part.underflowed for part in self.module.modules() if isinstance(part, TypedTrunk))


class IngestStage(nn.Module):
    """Frames as they come from the host, normalised."""

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1))

    def forward(self, frame: Tensor) -> tuple[Tensor]:
        """Uint8 [B, S, S, 3] to float32 [B, 3, S, S]."""
        # The cast comes first: TensorRT takes uint8 at the border alone and refuses to transpose it.
        image = frame.to(torch.float32).permute(0, 3, 1, 2)
        return ((image / 255 - self.mean) / self.std,)


class ExpertStage(nn.Module):
    """Expert k: its answer, the chain's answer so far, its attention and (k < K) the crop for the next one."""

    def __init__(
        self,
        expert: Expert,
        attention_head: nn.Module,
        config: MGEConfig,
        k: int,
        precision: Precision,
        half_linear: bool = False,
    ) -> None:
        super().__init__()
        self.k = k
        self.size = config.image_size
        self.threshold = config.box_thresholds[k - 1] if k < config.experts else None
        self.expert = typed_expert(expert, precision, self.size)
        _, c5 = self.expert.features(torch.zeros(1, 3, self.size, self.size))
        self.map_shape = tuple(c5.shape[2:])  # h, w of the heat map
        if half_linear:
            half_heads(self.expert)
            half_heads(attention_head)
        self.dual_head = DualHead(attention_head, c5)

    def forward(self, image: Tensor, answer: Tensor | None = None) -> tuple[Tensor, ...]:
        """Image [B, 3, S, S] and the answer so far [B, C] to the outputs that the stage's specification names."""
        c4, c5 = self.expert.features(image)
        logits = self.expert.concat_logits(c5, self.expert.part_features(c4))
        _, gradient = self.dual_head(c5)
        heatmap = grad_cam(c5, gradient)
        # The mean over experts 1..k as a running mean, so that a stage needs one tensor of its predecessors.
        mean = logits.clone() if answer is None else (answer * (self.k - 1) + logits) / self.k
        if self.threshold is None:
            return logits, mean, heatmap
        box = attention_box(heatmap, self.size, self.threshold)
        return logits, mean, heatmap, box, crop_resize(image, box, self.size)


class GateStage(nn.Module):
    """How far each expert is trusted, from the whole image."""

    def __init__(self, gate: Gate, config: MGEConfig, precision: Precision, half_linear: bool = False) -> None:
        super().__init__()
        self.gate = typed_gate(gate, precision, config.image_size)
        if half_linear:
            half_heads(self.gate)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """[B, 3, S, S] to [B, K], rows sum to 1."""
        return (self.gate(image),)


class MixtureStage(nn.Module):
    """The answer of the whole chain, a mixture of logits."""

    def forward(self, gate: Tensor, *logits: Tensor) -> tuple[Tensor]:
        """Gate [B, K] and K times [B, C] to [B, C]."""
        return ((gate[:, :, None] * torch.stack(logits, 1)).sum(1),)


@torch.no_grad()
def build_stages(model: MGENet, precision: Precision, *, half_linear: bool = False) -> tuple[Stage, ...]:
    """Split a model into stages, in the order they run.

    Args:
        model: left as it is; the stages own copies of its weights.
        precision: of trunks and part convolutions.
        half_linear: compute linear heads in half too, as TensorRT-RTX on Turing needs.

    Raises:
        ExportError: a weight is not finite in this precision, or a head cannot be traced.
    """
    config = model.config
    frame = TensorSpec("frame", "uint8", (BATCH, config.image_size, config.image_size, 3))
    stages = [_stage("ingest", (frame,), (_image(config, 1),), IngestStage(config.preprocess), Precision.FP32)]
    for k, expert in enumerate(model.experts, 1):
        # Not always the expert's own: see MGEConfig.attention_head.
        head = copy.deepcopy(model.attention_head(k - 1))
        module = ExpertStage(cast(Expert, expert), head, config, k, precision, half_linear)
        previous = (_vector(f"answer_{k - 1}", config.num_classes),) if k > 1 else ()
        outputs = [
            _vector(f"logits_{k}", config.num_classes),
            _vector(f"answer_{k}", config.num_classes),
            TensorSpec(f"heatmap_{k}", "float32", (BATCH, *module.map_shape)),
        ]
        # The last expert's map is looked at, but nothing is cropped by it: it has no threshold and no box.
        if k < config.experts:
            outputs += [_vector(f"box_{k}", 4), _image(config, k + 1)]
        stages.append(_stage(f"expert_{k}", (_image(config, k), *previous), tuple(outputs), module, precision))
    if model.gate is not None:
        weights = _vector("gate", config.experts)
        answers = tuple(_vector(f"logits_{k}", config.num_classes) for k in range(1, config.experts + 1))
        gate = GateStage(model.gate, config, precision, half_linear)
        stages.append(_stage("gate", (_image(config, 1),), (weights,), gate, precision))
        mixed = (_vector("logits", config.num_classes),)
        stages.append(_stage("mixture", (weights, *answers), mixed, MixtureStage(), Precision.FP32))
    return tuple(stages)


def segments(config: MGEConfig) -> tuple[SegmentSpec, ...]:
    """Cut the chain after each expert; the gate runs in the last segment alone, so an early exit saves its trunk."""
    cuts = [SegmentSpec((f"expert_{k}",), f"answer_{k}") for k in range(1, config.experts + 1)]
    cuts[0] = SegmentSpec(("ingest", *cuts[0].stages), cuts[0].answer)
    if config.experts > 1:
        cuts[-1] = SegmentSpec((*cuts[-1].stages, "gate", "mixture"), "logits")
    return tuple(cuts)


def views(config: MGEConfig) -> tuple[ViewSpec, ...]:
    """What each expert saw and said: expert k looks through the box of expert k - 1."""
    return tuple(
        ViewSpec(f"logits_{k}", f"heatmap_{k}", f"box_{k - 1}" if k > 1 else None) for k in range(1, config.experts + 1)
    )


def _stage(
    name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], module: nn.Module, precision: Precision
) -> Stage:
    has_trunk = isinstance(module, (ExpertStage, GateStage))
    return Stage(StageSpec(name, inputs, outputs), module.eval().requires_grad_(False), precision, has_trunk)


def _image(config: MGEConfig, k: int) -> TensorSpec:
    return TensorSpec(f"image_{k}", "float32", (BATCH, 3, config.image_size, config.image_size))


def _vector(name: str, length: int) -> TensorSpec:
    return TensorSpec(name, "float32", (BATCH, length))
