"""The memory layout that a model is trained in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["to_training_layout"]

FRAGILE_CHANNELS = 16  # input channels from which on no damage was seen


def to_training_layout(model: nn.Module, device: torch.device) -> None:
    """Put a model into channels_last, in place: 1.5 times faster on CPUs, and what tensor cores want.

    On a CPU, 1x1 convolutions of stride 2 over few channels (stems of RepVGG, MobileOne, FastViT) keep out of it: their
    backward pass writes past its buffers in channels_last (torch 2.14.1; 1 to 15 input channels, 16 and more hold, so
    do strides 3 and 4). The layers around them stay as they are.
    """
    model.to(memory_format=torch.channels_last)
    if device.type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_fragile(module):
            # A clone: a 1x1 kernel counts as contiguous whatever its strides, by which PyTorch chooses the layout.
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
            if _to_contiguous not in module._forward_pre_hooks.values():  # a second `fit` finds them there
                module.register_forward_pre_hook(_to_contiguous)
                module.register_forward_hook(_to_channels_last)


def _to_contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def _to_channels_last(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.contiguous(memory_format=torch.channels_last)


def _is_fragile(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.in_channels < FRAGILE_CHANNELS
