"""Experts and gates typed for export: the trunk and the part convolution in the asked precision, the rest in FP32.

Precision is written into the modules (weights and casts), so the exported graph is strongly typed and the same modules
run in half in PyTorch, which rounds activations as a GPU does. The arithmetic stays the model's own.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mge.model import Expert, Gate
from mge_export.fold import fold_batch_norms
from mge_export.precision import Precision
from mge_runtime.errors import ExportError

__all__ = ["HalfLinear", "TypedTrunk", "half_heads", "typed_expert", "typed_gate"]

M = TypeVar("M", bound=nn.Module)


class TypedTrunk(nn.Module):
    """A trunk that takes an FP32 image and computes in the type of its weights.

    c4 stays in that type, for the part convolution; c5 leaves in FP32, for the heads and the attention.
    """

    def __init__(self, trunk: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = trunk
        self.underflowed = sum(_cast(tensor, dtype) for tensor in (*trunk.parameters(), *trunk.buffers()))
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
        """Return the module's answer in the type of `value`."""
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


def half_heads(module: M) -> M:
    """Put the linear layers of a head, an expert or a gate into half, in place; its trunk is left alone.

    TensorRT-RTX has no FP32 matrix products for Turing (SM75). On every other target they cost next to nothing in FP32
    and keep class scores apart that are close.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, HalfLinear(child))
        elif not isinstance(child, TypedTrunk):
            half_heads(child)
    return module


def typed_expert(expert: Expert, precision: Precision, size: int) -> Expert:
    """Copy an expert for export, BatchNorms folded into the trunk's convolutions.

    Args:
        expert: left as it is.
        precision: of the trunk and the part convolution.
        size: pixels, S.

    Raises:
        ExportError: a weight is not finite in this precision.
    """
    typed = _frozen_copy(expert)
    typed.trunk = _typed_trunk(typed.trunk, precision, size)
    if not isinstance(typed.norm4, nn.Identity):
        typed.norm4 = Float32Island(typed.norm4)
    # The weight alone: the bias is added to the maximum, which is FP32 by type promotion.
    typed.trunk.underflowed += _cast(typed.part_conv.weight, precision.dtype)
    _check_finite(typed, precision)
    return typed


def typed_gate(gate: Gate, precision: Precision, size: int) -> Gate:
    """Copy a gate for export; see `typed_expert`."""
    typed = _frozen_copy(gate)
    typed.trunk = _typed_trunk(typed.trunk, precision, size)
    _check_finite(typed, precision)
    return typed


def _cast(tensor: Tensor, dtype: torch.dtype) -> int:
    """Cast a floating tensor in place; return how many of its values became zero."""
    if not tensor.is_floating_point():
        return 0
    zeros = int((tensor == 0).sum())
    tensor.data = tensor.data.to(dtype)
    return int((tensor == 0).sum()) - zeros


def _frozen_copy(module: M) -> M:
    return copy.deepcopy(module).eval().requires_grad_(False)


def _typed_trunk(trunk: nn.Module, precision: Precision, size: int) -> TypedTrunk:
    generator = torch.Generator().manual_seed(0)
    fold_batch_norms(trunk, torch.rand((1, 3, size, size), generator=generator) * 2 - 1)
    return TypedTrunk(trunk, precision.dtype)


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
