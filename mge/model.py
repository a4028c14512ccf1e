"""The mixture of granularity-specific experts: K experts chained by attention crops, mixed by a gate."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mge.attention import attention_box, class_gradient, crop_resize, grad_cam
from mge.backbones import create_backbone, pretrained_weights
from mge.config import MGEConfig

__all__ = ["Expert", "ExpertOutput", "Gate", "GlobalHead", "MGENet", "MGEOutput", "initialize_backbones"]

NORM_SCALE = 10.0  # length of each normalized half of the concatenated features (authors' code)


class ExpertOutput(NamedTuple):
    """What one expert saw and predicted; a named tuple, which distribution wrappers can walk."""

    image: Tensor  # [B, 3, S, S], its input
    global_logits: Tensor  # [B, C], of the global head
    part_logits: Tensor  # [B, C], of the part head; for training only
    logits: Tensor  # [B, C], of the concatenated head: the expert's prediction
    heatmap: Tensor  # [B, h, w], its attention (Grad-CAM), of any sign and scale
    box: Tensor | None  # [B, 4] in pixels of `image`, what the next expert sees; None for the last


class MGEOutput(NamedTuple):
    """Outputs of the whole chain."""

    experts: tuple[ExpertOutput, ...]  # K of them
    gate: Tensor  # [B, K], rows sum to 1
    logits: Tensor  # [B, C], sum over experts of gate_k * logits_k

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
    """One backbone with its three heads."""

    def __init__(self, config: MGEConfig) -> None:
        super().__init__()
        self.backbone, channels4, channels5 = create_backbone(config.arch)
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

    def concat_logits(self, c5: Tensor, parts: Tensor) -> Tensor:
        """The concatenated head: features [B, D5, h, w] and parts [B, P] to scores [B, C].

        Both halves, the pooled features and the parts, are normalized to length 10; neither is trained through.
        """
        halves = (NORM_SCALE * _unit(c5.detach().mean((2, 3))), NORM_SCALE * _unit(parts.detach()))
        return self.concat_head(torch.cat(halves, 1))


class Gate(nn.Module):
    """How far each expert is trusted, from the whole image."""

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


class MGENet(nn.Module):
    """K experts and a gate, randomly initialized; see `initialize_backbones` and `mge.checkpoint` for weights.

    A single expert needs no gate: its logits are the final ones (`gate` is None and the gate's weights are ones).
    """

    def __init__(self, config: MGEConfig) -> None:
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.experts))
        self.gate = Gate(config) if config.experts > 1 else None

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
            images: [B, 3, S, S], normalized with the config's mean and std.
            labels: [B] int64: attention looks for these classes (training); None: for its head's own first guess.

        Returns:
            What each expert saw and predicted, the gate's weights [B, K] and the final logits [B, C]. The mixture
            trains the gate alone: the experts' logits enter it detached.
        """
        outputs: list[ExpertOutput] = []
        image = images
        for k, expert in enumerate(self.experts):
            assert isinstance(expert, Expert)  # noqa: S101 - tells the type checker what the ModuleList holds
            c4, c5 = expert.features(image)
            parts = expert.part_features(c4)
            with torch.no_grad():
                _, gradient = class_gradient(self.attention_head(k), c5.detach(), labels)
                heatmap = grad_cam(c5.detach(), gradient)
                box = None
                if k < self.config.experts - 1:
                    box = attention_box(heatmap, self.config.image_size, self.config.box_thresholds[k])
            outputs.append(
                ExpertOutput(
                    image=image,
                    global_logits=expert.global_head(c5),
                    part_logits=expert.part_head(parts),
                    logits=expert.concat_logits(c5, parts),
                    heatmap=heatmap,
                    box=box,
                )
            )
            if box is not None:
                with torch.no_grad():
                    image = crop_resize(image, box, self.config.image_size)
        gate = self.gate(images) if self.gate is not None else images.new_ones(images.shape[0], 1)
        logits = torch.stack([output.logits.detach() for output in outputs], 1)
        return MGEOutput(tuple(outputs), gate, (gate[:, :, None] * logits).sum(1))


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
