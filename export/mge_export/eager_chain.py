"""The chain in PyTorch the way the authors' published code runs it: what the runtime is measured against.

It follows what their code does, not how ours does it better (Zhang et al., ICCV 2019; github.com/lbzhang/MGE-CNN):

- Attention is autograd's. The upper part of the trunk runs a second time from c4, now with gradients, a hook on its
  features keeps d score / d c5, and `backward` goes on through all of it, weights included, since they are parameters.
- The part convolution has its padding of 1 and its ReLU before the maximum.
- The map is upsampled whole, and box, crop and resize are a Python loop over the images: `nonzero`, two minima, two
  maxima, a slice and an interpolation each.
- All heads are computed, those that only training needs too; the gate comes last.

Numbers may differ from `MGENet` by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mge.model import NORM_SCALE, Expert, GlobalHead, MGENet
from mge_export.eager_trunk import split_trunk

__all__ = ["AuthorsChain", "EagerAnswer"]

FLAT = (
    1e-6  # relative range below which MGENet calls a map flat (mge.attention); the authors' code stops there at 0 / 0
)


class EagerAnswer(NamedTuple):
    """What the chain says."""

    logits: Tensor  # [B, C], the mixture
    gate: Tensor  # [B, K], rows sum to 1
    boxes: list[list[list[Tensor]]]  # by crop, by image: x0, y0, x1, y1 in pixels of what the expert before saw


class AuthorsChain:
    """An `MGENet` computed as the authors' code does.

    Args:
        model: in evaluation mode, on the device it is to run on; its weights are shared, not copied.
        compile_module: wraps each network (the halves of the trunks, the heads); None: they run as they are.
        retain_graph: whether `backward` keeps the graph, as the authors' call asks for; nothing reads it afterwards.

    Raises:
        EagerUnavailable: a trunk cannot be cut at c4.
    """

    def __init__(
        self,
        model: MGENet,
        compile_module: Callable[[nn.Module], Any] | None = None,
        *,
        retain_graph: bool = True,
    ) -> None:
        wrap = compile_module or (lambda module: module)
        size = model.config.image_size
        self._model = model
        self._retain_graph = retain_graph
        self._experts: list[_Networks] = []
        for k, expert in enumerate(model.experts):
            assert isinstance(expert, Expert)  # noqa: S101 - tells the type checker what the ModuleList holds
            lower, upper = split_trunk(expert.trunk, size)
            upper = nn.Sequential(*upper, expert.norm5)
            self._experts.append(
                _Networks(wrap(lower), wrap(upper), wrap(_Heads(expert).eval()), model.attention_head(k))
            )
        self._gate = None if model.gate is None else wrap(model.gate)

    def __call__(self, images: Tensor) -> EagerAnswer:
        """Answer normalised images [B, 3, S, S]; call it under `torch.no_grad`, as the authors' test does."""
        config = self._model.config
        seen = images
        answers: list[Tensor] = []
        boxes: list[list[list[Tensor]]] = []
        for k, networks in enumerate(self._experts):
            c4 = networks.lower(seen)
            c5 = networks.upper(c4)
            answers.append(networks.heads(c4, c5)[-1])
            if k < config.experts - 1:
                weights = self._channel_weights(networks, c4)
                seen, found = _crop_each(seen, c5, weights, config.box_thresholds[k])
                boxes.append(found)
        gate = images.new_ones(images.shape[0], 1) if self._gate is None else self._gate(images)
        logits = (torch.stack(answers, -1) * gate[:, None]).sum(-1)
        return EagerAnswer(logits, gate, boxes)

    def _channel_weights(self, networks: _Networks, c4: Tensor) -> Tensor:
        """Grad-CAM's weights mean_hw(ReLU(d score_t / d c5)), [B, D], for the class t with the largest score."""
        gradients: list[Tensor] = []
        with torch.enable_grad():
            c5 = networks.upper(c4.detach().requires_grad_())
            c5.register_hook(gradients.append)
            scores = networks.attention(c5)
            one_hot = torch.zeros_like(scores)
            one_hot[torch.arange(len(scores)), scores.argmax(-1)] = 1
            # backward adds to what it finds.
            self._model.zero_grad()
            (one_hot * scores).sum().backward(retain_graph=self._retain_graph)
        return gradients[-1].relu().mean(-1).mean(-1)


class _Networks(NamedTuple):
    """One expert, maybe compiled."""

    lower: Any  # image [B, 3, S, S] -> c4 [B, D4, S/16, S/16]
    upper: Any  # c4 -> c5 [B, D5, S/32, S/32], normalised where the model does
    heads: Any  # c4, c5 -> three logits [B, C]; the last is the answer
    attention: GlobalHead  # the head whose scores are differentiated


class _Heads(nn.Module):
    """The three heads of one expert, with the padded part convolution."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.norm4, self.part_conv = expert.norm4, expert.part_conv
        self.global_head, self.part_head, self.concat_head = expert.global_head, expert.part_head, expert.concat_head

    def forward(self, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C4 [B, D4, h, w] and c5 [B, D5, h/2, w/2] to global, part and concatenated logits, each [B, C]."""
        pooled = F.adaptive_avg_pool2d(c5, 1).flatten(1)
        response = F.conv2d(self.norm4(c4), self.part_conv.weight, self.part_conv.bias, padding=1)
        parts = F.adaptive_max_pool2d(response.relu(), 1).flatten(1)
        halves = [NORM_SCALE * F.normalize(pooled), NORM_SCALE * F.normalize(parts)]
        return self.global_head.fc(pooled), self.part_head(parts), self.concat_head(torch.cat(halves, 1))


def _crop_each(images: Tensor, c5: Tensor, weights: Tensor, threshold: float) -> tuple[Tensor, list[list[Tensor]]]:
    """Box, crop and resize, one image after the other.

    Args:
        images: [B, 3, S, S].
        c5: [B, D, h, w].
        weights: [B, D], of its channels.
        threshold: in [0, 1), of the normalised map.

    Returns:
        [B, 3, S, S] and each image's box.
    """
    size = images.shape[-1]
    cam = (c5.clone().flatten(2) * weights[:, :, None]).sum(1).view(len(c5), 1, *c5.shape[2:])
    cam = F.interpolate(cam, size=(size, size), mode="bilinear", align_corners=True).flatten(1)
    low, high = cam.min(-1, keepdim=True)[0], cam.max(-1, keepdim=True)[0]
    span = high - low
    flat = span <= FLAT * torch.maximum(low.abs(), high.abs())
    cam = torch.where(flat, 0, cam - low) / torch.where(flat, 1, span)
    mask = torch.sign(torch.sign(cam - threshold) + 1).view(-1, size, size)
    crops = torch.zeros_like(images)
    boxes: list[list[Tensor]] = []
    for k in range(len(images)):
        kept = mask[k].nonzero()
        x0 = y0 = kept.new_zeros(())
        x1 = y1 = kept.new_full((), size)
        if len(kept):
            (top, left), (bottom, right) = kept.min(0)[0], kept.max(0)[0]
            if left != right and top != bottom:
                x0, y0, x1, y1 = left, top, right, bottom
        crop = images[k, :, y0:y1, x0:x1]
        crops[k] = F.interpolate(crop[None], size=(size, size), mode="bilinear", align_corners=True)[0]
        boxes.append([x0, y0, x1, y1])
    return crops, boxes
