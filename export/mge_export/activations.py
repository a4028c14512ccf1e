"""Watch how large activations grow: FP16 ends at 65504."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FP16_MAX", "ActivationWatch", "Peak"]

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Peak:
    """The largest activation that was seen."""

    value: float  # absolute; inf or nan if one was not finite
    operator: str  # PyTorch's name of the operator that put it out


class ActivationWatch(TorchDispatchMode):
    """Record the largest absolute value of the maps [B, C, h, w] that operators put out, functional calls included.

    Args:
        dtype: maps of this type alone are watched; those of an FP32 island cannot overflow FP16.
        aside: a module whose own maps are none of a network's, as it normalises the image.
    """

    def __init__(self, dtype: torch.dtype, aside: nn.Module | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self._paused = False
        if aside is not None:
            aside.register_forward_pre_hook(lambda *_: self._pause(True))
            aside.register_forward_hook(lambda *_: self._pause(False))
        self.peak = Peak(0.0, "")

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, look at what it puts out."""
        del types
        result = func(*args, **(kwargs or {}))
        for value in () if self._paused else result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.dtype is self.dtype and value.ndim == 4 and value.numel():
                low, high = torch.aminmax(value)
                largest = max(abs(float(low)), abs(float(high)))
                # Not `>`: a NaN must be kept, and stays.
                if not largest <= self.peak.value and self.peak.value == self.peak.value:
                    self.peak = Peak(largest, str(func))
        return result

    def _pause(self, paused: bool) -> None:
        self._paused = paused
