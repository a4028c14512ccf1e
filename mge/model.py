"""The mixture of granularity-specific experts: K experts chained by attention crops, mixed by a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mge.attention import (
    attention_box,
    class_gradient,
    compose_view,
    crop_frame,
    crop_resize,
    grad_cam,
    shrink,
    whole_view,
)
from mge.backbones import create_backbone, pretrained_weights
from mge.config import MGEConfig

NORM_SCALE = 10.0  # length of each normalized half of the concatenated features (authors' code)


class ExpertOutput(NamedTuple):
    """What one expert saw and predicted; a named tuple, which distribution wrappers can walk."""

    image: Tensor  # [B, 3, S_k, S_k], its input
    global_logits: Tensor  # [B, C], of the global head
    part_logits: Tensor  # [B, C], of the part head; for training only
    logits: Tensor  # [B, C], of the concatenated head: the expert's prediction
    heatmap: Tensor  # [B, h, w], its attention (Grad-CAM), of any sign and scale
    box: Tensor | None  # [B, 4], what the next expert sees, in pixels of `image`, with a source of the frame's; None
    # for the last
    pooled: Tensor  # [B, D], the mean of its c5, cut from the graph: what a shared gate reads


class MGEOutput(NamedTuple):
    """Outputs of the whole chain."""

    experts: tuple[ExpertOutput, ...]  # K of them
    gate: Tensor  # [B, K], rows sum to 1
    logits: Tensor  # [B, C], sum over experts of gate_k * logits_k, times the scale of an `Average`

    @property
    def average(self) -> Tensor:
        """[B, C], the plain mean of the experts' logits."""
        return torch.stack([expert.logits for expert in self.experts]).mean(0)


class GlobalHead(nn.Module):
    """Class scores from the average of the features; what Grad-CAM differentiates, here in closed form."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, c5: Tensor) -> Tensor:
        """Features [B, D, h, w] to scores [B, C]."""
        return self.fc(c5.mean((2, 3)))

    def class_gradient(self, c5: Tensor, class_index: Tensor) -> Tensor:
        """W[t] / (h w), the same at every cell: features [B, D, h, w] and classes t [B] to [B, D, 1, 1]."""
        row = F.embedding(class_index, self.fc.weight)
        # In the wider type: the weights of an export may be in half, the features under autocast.
        row = row.to(torch.promote_types(row.dtype, c5.dtype))
        return (row / c5.shape[2:].numel())[:, :, None, None]


class Expert(nn.Module):
    """A backbone with three heads.

    Args:
        config: of the model.
        backbone: what `create_backbone` made for all experts; None: it has one of its own.
    """

    def __init__(self, config: MGEConfig, backbone: tuple[nn.Module, int, int] | None = None) -> None:
        super().__init__()
        self.backbone, channels4, channels5 = backbone or create_backbone(config.arch)
        self.norm4, self.norm5 = _feature_norms(config, channels4, channels5)
        parts = config.parts_per_class * config.num_classes
        self.global_head = GlobalHead(channels5, config.num_classes)
        self.part_conv = nn.Conv2d(channels4, parts, 1)
        self.part_head = nn.Linear(parts, config.num_classes)
        self.concat_head = nn.Linear(channels5 + parts, config.num_classes)

    def features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image [B, 3, S, S] to c4 [B, D4, S/16, S/16] and c5 [B, D5, S/32, S/32], both as the heads read them.

        The part head must not train the backbone, so c4 is cut from the graph here.
        """
        c4, c5 = self.backbone(image)
        return self.norm4(c4.detach()), self.norm5(c5)

    def part_features(self, c4: Tensor) -> Tensor:
        """GMP(ReLU(Conv1x1(c4))) with the authors' padding of 1: [B, D4, h, w] -> [B, P].

        The cells of the padding hold ReLU(bias), and ReLU and the maximum commute, so this equals
        max(max_hw(W c4) + b, b, 0) without the padding. P = C * `parts_per_class`, the channels of the convolution.
        """
        response = F.conv2d(c4, self.part_conv.weight).amax((2, 3))
        return (response.relu() + cast("Tensor", self.part_conv.bias)).relu()

    def concat_logits(self, pooled: Tensor, parts: Tensor) -> Tensor:
        """The concatenated head: pooled features [B, D5] and parts [B, P] to scores [B, C].

        Both halves are normalized to length 10; neither is trained through.
        """
        halves = (NORM_SCALE * _unit(pooled), NORM_SCALE * _unit(parts.detach()))
        return self.concat_head(torch.cat(halves, 1))


class Gate(nn.Module):
    """How far each expert is trusted, from the whole image, by a backbone of its own (the paper's)."""

    def __init__(self, config: MGEConfig) -> None:
        super().__init__()
        self.backbone, channels4, channels5 = create_backbone(config.arch)
        _, self.norm5 = _feature_norms(config, channels4, channels5)
        self.hidden = nn.Linear(channels5, config.gate_width)
        self.output = nn.Linear(config.gate_width, config.experts)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] to weights [B, K], rows sum to 1. There is no ReLU between the layers (the authors')."""
        pooled = self.norm5(self.backbone(image)[-1]).mean((2, 3))
        return self.output(self.hidden(pooled)).softmax(1)


class SharedGate(nn.Module):
    """How far each expert is trusted, from what the experts saw: no backbone of its own."""

    def __init__(self, config: MGEConfig, channels5: int) -> None:
        super().__init__()
        self.output = nn.Linear(config.experts * channels5, config.experts)
        nn.init.zeros_(self.output.weight)  # begins as the plain average
        nn.init.zeros_(self.output.bias)

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Pooled features, K of [B, D], to weights [B, K], rows sum to 1; each is normalized to length 1 first."""
        return self.output(torch.cat([_unit(one) for one in pooled], 1)).softmax(1)


class Average(nn.Module):
    """The same trust for every image: K weights, equal until `fit_average` learns them on held-out images."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weights: Tensor
        self.scale: Tensor
        self.register_buffer("weights", torch.full((experts,), 1 / experts))  # sum to 1
        self.register_buffer("scale", torch.ones(()))  # 1 / temperature of the weighted sum

    def forward(self, logits: Tensor) -> Tensor:
        """Logits [B, K, C] to weights [B, K]; what they are makes no difference."""
        return self.weights.expand(logits.shape[0], -1)


def mix(gate: nn.Module | None, weights: Tensor, logits: Tensor) -> Tensor:
    """The mixture: weights [B, K] and the experts' logits [B, K, C] to logits [B, C]."""
    mixed = (weights[:, :, None] * logits).sum(1)
    return mixed * gate.scale if isinstance(gate, Average) else mixed


class MGENet(nn.Module):
    """K experts and what weighs them, randomly initialized; `initialize_backbones` and `mge.checkpoint` have weights.

    A single expert needs no gate: its logits are the final ones (`gate` is None and the gate's weights are ones).
    A backbone that experts share is one module, which `parameters()` lists once and `state_dict()` once for each.
    """

    def __init__(self, config: MGEConfig) -> None:
        super().__init__()
        self.config = config
        shared = create_backbone(config.arch) if config.sharing == "backbone" else None
        self.experts = nn.ModuleList(Expert(config, shared) for _ in range(config.experts))
        self.gate: Gate | SharedGate | Average | None = None
        if config.experts > 1 and config.gate == "network":
            self.gate = Gate(config)
        elif config.experts > 1 and config.gate == "shared":
            self.gate = SharedGate(config, self.attention_head(0).fc.in_features)
        elif config.experts > 1:
            self.gate = Average(config.experts)

    def attention_head(self, k: int) -> GlobalHead:
        """The global head whose class scores and gradient make the attention of expert k (from 0).

        The paper's method is each expert's own; the authors' code calls expert 1's head on every expert's features.
        """
        expert = self.experts[k if self.config.attention_head == "own" else 0]
        assert isinstance(expert, Expert)  # noqa: S101 - tells the type checker what the ModuleList holds
        return expert.global_head

    def forward(self, images: Tensor, labels: Tensor | None = None) -> MGEOutput:
        """Predict a batch of normalized images.

        Args:
            images: [B, 3, S, S], S the side of the frame, normalized with the config's mean and std.
            labels: [B] int64: attention looks for these classes (training); None: for its head's own first guess.

        Returns:
            What each expert saw and predicted, the gate's weights [B, K] and the final logits [B, C]. The mixture
            trains the gate alone: the experts' logits enter it detached.
        """
        outputs: list[ExpertOutput] = []
        sizes, crops_frame = self.config.sizes, self.config.source_size > 0
        frame = images.permute(0, 2, 3, 1)
        image = first = shrink(frame, sizes[0]) if crops_frame else images
        view = whole_view(images)
        for k, expert in enumerate(self.experts):
            assert isinstance(expert, Expert)  # noqa: S101 - tells the type checker what the ModuleList holds
            c4, c5 = expert.features(image)
            parts, pooled = expert.part_features(c4), c5.detach().mean((2, 3))
            with torch.no_grad():
                _, gradient = class_gradient(self.attention_head(k), c5.detach(), labels)
                heatmap = grad_cam(c5.detach(), gradient)
                box = None
                if k < self.config.experts - 1:
                    box = attention_box(heatmap, sizes[k], self.config.box_thresholds[k])
                    if crops_frame:
                        box = view = compose_view(view, box, sizes[k])
            outputs.append(
                ExpertOutput(
                    image=image,
                    global_logits=expert.global_head(c5),
                    part_logits=expert.part_head(parts),
                    logits=expert.concat_logits(pooled, parts),
                    heatmap=heatmap,
                    box=box,
                    pooled=pooled,
                )
            )
            if box is not None:
                with torch.no_grad():
                    crop, source = (crop_frame, frame) if crops_frame else (crop_resize, image)
                    image = crop(source, box, sizes[k + 1])
        logits = torch.stack([output.logits.detach() for output in outputs], 1)
        if isinstance(self.gate, Gate):
            weights = self.gate(first)
        elif isinstance(self.gate, SharedGate):
            weights = self.gate([output.pooled for output in outputs])
        else:
            weights = logits.new_ones(len(images), 1) if self.gate is None else self.gate(logits)
        return MGEOutput(tuple(outputs), weights, mix(self.gate, weights, logits))


def initialize_backbones(model: MGENet, source: str) -> None:
    """Copy one set of weights into every backbone of `model`; `source` as in `pretrained_weights`."""
    state = pretrained_weights(model.config.arch, source)
    for module in model.modules():
        if isinstance(module, Expert | Gate):
            module.backbone.load_state_dict(state, strict=False)


def _feature_norms(config: MGEConfig, channels4: int, channels5: int) -> tuple[nn.Module, nn.Module]:
    """Normalization before the heads: identity unless the backbone's features are linear."""
    if not config.normalize_features:
        return nn.Identity(), nn.Identity()
    return nn.BatchNorm2d(channels4), nn.Sequential(nn.BatchNorm2d(channels5), nn.ReLU())


def _unit(vector: Tensor) -> Tensor:
    """`F.normalize` without its expansion of the norm, which would be an operator of its own in the exported graph."""
    return vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp_min(1e-12)
