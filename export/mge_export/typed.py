"""Experts and gates typed for export: the backbone and the part convolution in the asked precision, the rest in FP32.

Precision is written into the modules (weights and casts), so the exported graph is strongly typed and the same modules
run in half in PyTorch, which rounds activations as a GPU does. The arithmetic stays the model's own. BatchNorms are
folded into the convolutions before them: a folded weight is rounded once, from its FP32 value; unfolded, the
convolution's weight, the running variance and the scale are rounded each by itself, and a large variance overflows.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mge.model import Expert, Gate
from mge_export.precision import Precision
from mge_runtime.errors import ExportError

M = TypeVar("M", Expert, Gate)
FOLD_TOLERANCE = 1e-3  # of the largest output; folding reorders FP32 sums through some hundred layers, seen: 1e-5


class TypedBackbone(nn.Module):
    """A backbone that takes an FP32 image and computes in the type of its weights.

    c4 stays in that type, for the part convolution; c5 leaves in FP32, for the heads and the attention.
    """

    def __init__(self, backbone: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = backbone
        self.underflowed = sum(_cast(tensor, dtype) for tensor in (*backbone.parameters(), *backbone.buffers()))
        self.dtype = dtype

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 image [B, 3, S, S] to c4 and c5."""
        c4, c5 = self.layers(image.to(self.dtype))
        return c4, c5.to(torch.float32)


class Float32Island(nn.Module):
    """A module computed in FP32 amid another type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, value: Tensor) -> Tensor:
        """Return the module's output in the type of `value`."""
        return self.module(value.to(torch.float32)).to(value.dtype)


class HalfLinear(nn.Module):
    """A linear layer computed in half amid FP32; its gradient is computed in half, too."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float16), requires_grad=False)
        self.bias = (
            None if linear.bias is None else nn.Parameter(linear.bias.detach().to(torch.float16), requires_grad=False)
        )

    def forward(self, value: Tensor) -> Tensor:
        """Float32 [B, D] to float32 [B, C]."""
        return F.linear(value.to(torch.float16), self.weight, self.bias).to(torch.float32)


def half_heads(module: nn.Module) -> None:
    """Put the linear layers of a head, an expert or a gate into half, in place; its backbone is left alone.

    TensorRT-RTX has no FP32 matrix products for Turing (SM75). On every other target they cost next to nothing in FP32
    and keep class scores apart that are close.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, HalfLinear(child))
        elif not isinstance(child, TypedBackbone):
            half_heads(child)


def typed_copy(part: M, precision: Precision, size: int) -> M:
    """Copy an expert or a gate for export.

    Args:
        part: left as it is.
        precision: of its backbone, into which BatchNorms are folded, and of its part convolution.
        size: pixels, S.

    Raises:
        ExportError: a weight is not finite in this precision.
    """
    typed = copy.deepcopy(part).eval().requires_grad_(False)
    example = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1
    fold_batch_norms(typed.backbone, example)
    typed.backbone = TypedBackbone(typed.backbone, precision.dtype)
    if isinstance(typed, Expert):
        if not isinstance(typed.norm4, nn.Identity):
            typed.norm4 = Float32Island(typed.norm4)
        # The weight alone: the bias is added to the maximum, which is FP32 by type promotion.
        typed.backbone.underflowed += _cast(typed.part_conv.weight, precision.dtype)
    _check_finite(typed, precision)
    return typed


@torch.no_grad()
def fold_batch_norms(backbone: nn.Module, example: Tensor) -> int:
    """Fold every BatchNorm2d that directly follows a convolution, in place.

    Pairs are found by running the backbone: the BatchNorm's input is the very tensor that a convolution computed. The
    folded backbone must compute the same from the example, else (a convolution that feeds something else too) nothing
    is folded.

    Args:
        backbone: in evaluation mode, FP32, returns a list of tensors.
        example: [B, 3, S, S].

    Returns:
        How many BatchNorms were folded.
    """
    pairs, before = _find_pairs(backbone, example)
    originals = {name: backbone.get_submodule(name) for pair in pairs for name in pair}
    for conv_name, norm_name in pairs:
        norm = cast(nn.BatchNorm2d, originals[norm_name])
        backbone.set_submodule(conv_name, fuse_conv_bn_eval(cast(nn.Conv2d, originals[conv_name]), norm))
        backbone.set_submodule(norm_name, _rest(norm))
    after = backbone(example)
    if all((a - b).abs().max() <= FOLD_TOLERANCE * b.abs().max() for a, b in zip(after, before, strict=True)):
        return len(pairs)
    for name, module in originals.items():
        backbone.set_submodule(name, module)
    return 0


def _find_pairs(backbone: nn.Module, example: Tensor) -> tuple[list[tuple[str, str]], list[Tensor]]:
    """Names of the convolutions and their BatchNorms, and the backbone's outputs."""
    names = {module: name for name, module in backbone.named_modules()}
    convs: dict[nn.Module, list[Tensor]] = {}  # outputs of every call
    norms: list[tuple[nn.Module, Tensor]] = []  # with their input

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and type(module).__name__.startswith("Conv2d"):
            convs.setdefault(module, []).append(output)
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            norms.append((module, inputs[0]))

    handle = register_module_forward_hook(watch)
    try:
        outputs = list(backbone(example))
    finally:
        handle.remove()
    called_once = [(conv, found[0]) for conv, found in convs.items() if len(found) == 1]
    pairs = [(names[conv], names[norm]) for norm, given in norms for conv, made in called_once if made is given]
    return pairs, outputs


def _rest(norm: nn.Module) -> nn.Module:
    """What is left of a BatchNorm once its affine map is folded: timm's variant carries an activation."""
    if not isinstance(norm, BatchNormAct2d):
        return nn.Identity()
    return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))


def _cast(tensor: Tensor, dtype: torch.dtype) -> int:
    """Cast a floating tensor in place; return how many of its values became zero."""
    if not tensor.is_floating_point() or tensor.dtype is dtype:
        return 0
    zeros = int((tensor == 0).sum())
    tensor.data = tensor.data.to(dtype)
    return int((tensor == 0).sum()) - zeros


def _check_finite(module: nn.Module, precision: Precision) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not torch.isfinite(tensor).all():
            raise ExportError(
                f"weight {name} is not finite in {precision.value}; "
                f"expected numbers within {torch.finfo(tensor.dtype).max:g}: "
                + (
                    "train again from a finite checkpoint"
                    if precision is Precision.FP32
                    else f"export without --{precision.value}"
                )
            )
