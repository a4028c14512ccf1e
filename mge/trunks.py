"""A trunk small enough to learn from nothing within minutes on a CPU.

Importing this module adds `plainnet_w16` and `plainnet_w24` to timm's registry. timm's own small networks are made for
few multiplications, not for quick training: forward and backward of 112 x 112 pixels take `plainnet_w16` a third of the
time of `lcnet_050` on one core, and without depthwise convolutions it learns from fewer images.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["PlainNet"]  # register_model appends the names of the models

_WIDTHS = (1, 2, 4, 8, 8)  # channels of the five stages, in units of the width

default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 112, 112),
            "pool_size": (4, 4),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "stage1.0",
            "classifier": "fc",
        }
        for name in ("plainnet_w16", "plainnet_w24")
    }
)


class PlainNet(nn.Module):
    """Five 3 x 3 convolutions of stride 2, each with BatchNorm and ReLU; 8 x width channels at the last two strides."""

    def __init__(self, width: int, in_chans: int = 3, num_classes: int = 1000) -> None:
        super().__init__()
        self.feature_info: list[dict[str, Any]] = []  # what timm's features_only reads
        channels = in_chans
        for number, factor in enumerate(_WIDTHS, 1):
            convolution = nn.Conv2d(channels, width * factor, 3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            channels = width * factor
            self.add_module(f"stage{number}", nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU()))
            self.feature_info.append({"num_chs": channels, "reduction": 2**number, "module": f"stage{number}"})
        self.num_classes, self.num_features = num_classes, channels
        self.fc = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, 8 x width, H/32, W/32]."""
        for number in range(1, len(_WIDTHS) + 1):
            x = self.get_submodule(f"stage{number}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to scores [B, num_classes]."""
        return self.fc(torch.mean(self.forward_features(x), (2, 3)))


@register_model
def plainnet_w16(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """16 to 128 channels, 0.24 M weights."""
    return build_model_with_cfg(PlainNet, "plainnet_w16", pretrained, width=16, **kwargs)


@register_model
def plainnet_w24(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """24 to 192 channels, 0.55 M weights."""
    return build_model_with_cfg(PlainNet, "plainnet_w24", pretrained, width=24, **kwargs)
