"""Half-precision convolutions and products on a CPU at the speed of FP32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HalfKernels"]

_SUMS = frozenset({"convolution", "mm", "addmm", "bmm", "baddbmm", "linear"})


class HalfKernels(TorchDispatchMode):
    """Compute sums of products of FP16 tensors in FP32 and round the result to FP16, once.

    This is what a GPU's matrix units do. PyTorch's own FP16 kernels do nearly the same, but on a CPU without FP16
    arithmetic ten to thirty times more slowly. Every tensor stays FP16; all other operators are PyTorch's own.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operator."""
        del types
        name = str(func).split(".")[1]
        if name not in _SUMS or not any(isinstance(a, Tensor) and a.dtype is torch.float16 for a in args):
            return func(*args, **(kwargs or {}))
        wide = [a.float() if isinstance(a, Tensor) and a.dtype is torch.float16 else a for a in args]
        return func(*wide, **(kwargs or {})).half()
