"""Backbones: timm's CNNs, cut into two levels of features, and a network that trains within minutes on a CPU.

The latter, `plainnet_w16`, is added to timm's registry. timm's own small networks are made for few multiplications, not
for quick training: forward and backward of 112 x 112 pixels take it a third of the time of `lcnet_050` on one core, and
without depthwise convolutions it learns from fewer images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mge_runtime.errors import CheckpointError


def create_backbone(arch: str) -> tuple[nn.Module, int, int]:
    """A timm backbone that returns its last two feature levels, randomly initialized.

    Returns:
        The backbone and the channels of its features at stride 16 and at stride 32.

    Raises:
        CheckpointError: timm has no such model, or it offers no features at stride 16 and 32.
    """
    if not timm.is_model(arch.partition(".")[0]):
        raise CheckpointError(
            f"arch is {arch!r}; expected a CNN of timm itself, nothing is fetched (timm.list_models() names them)"
        )
    try:
        backbone: Any = timm.create_model(arch, pretrained=False, features_only=True, out_indices=(-2, -1))
        strides = backbone.feature_info.reduction()
    except (RuntimeError, AttributeError, NotImplementedError, ValueError, AssertionError, IndexError) as error:
        raise CheckpointError(
            f"arch is {arch!r}; expected a timm CNN that offers features_only (see timm.list_models()): {error}"
        ) from error
    if strides != [16, 32]:
        raise CheckpointError(f"arch {arch!r} ends at strides {strides}; expected features at 16 and 32")
    channels4, channels5 = backbone.feature_info.channels()
    return backbone, channels4, channels5


def has_linear_features(arch: str) -> bool:
    """Whether a backbone's last features can be negative, so that its heads need `normalize_features`."""
    backbone, _, _ = create_backbone(arch)
    with torch.inference_mode():
        image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        return bool(backbone.eval()(image)[-1].min() < 0)


def pretrained_weights(arch: str, source: str) -> dict[str, Tensor]:
    """Weights of a backbone.

    Args:
        arch: the backbone's name in timm.
        source: "timm" for timm's pretrained weights of the architecture (downloaded), or a .safetensors file with the
            names of the timm classification model, float16 or float32.

    Raises:
        CheckpointError: the weights cannot be had, or belong to another architecture.
    """
    if source == "timm":
        try:
            return timm.create_model(arch, pretrained=True, features_only=True, out_indices=(-2, -1)).state_dict()
        except Exception as error:  # the hub's client raises many kinds, all of them "not to be had"
            raise CheckpointError(
                f"timm's weights for {arch!r} cannot be had ({type(error).__name__}); expected a network connection "
                "and an architecture with weights: name a local file with --init FILE.safetensors, or --init none"
            ) from error
    try:
        stored = load_file(Path(source))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{source} is not a safetensors file ({error}); expected weights for --init") from error
    backbone, _, _ = create_backbone(arch)
    state: dict[str, Tensor] = {}
    for name, parameter in backbone.state_dict().items():
        # timm flattens `stages.0` to `stages_0` when it cuts a network into feature levels.
        tensor = stored.get(name, stored.get(name.replace("_", ".", 1)))
        if tensor is None and name.endswith("num_batches_tracked"):
            continue
        if tensor is None or tensor.shape != parameter.shape:
            found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{source}: {found} for {name} of {arch}; expected shape {tuple(parameter.shape)}: "
                "these are weights of another architecture"
            )
        state[name] = tensor.to(parameter.dtype)
    return state


_WIDTHS = (1, 2, 4, 8, 8)  # channels of the five stages, in units of the width

default_cfgs = generate_default_cfgs(
    {"plainnet_w16": {"url": "", "input_size": (3, 112, 112), "first_conv": "stage1.0", "classifier": "fc"}}
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
