"""Fold BatchNorms into the convolutions before them.

In half precision a folded weight is rounded once, from its FP32 value; unfolded, the convolution's weight, the running
variance and the scale are rounded each by itself, and a large variance overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold_batch_norms"]

RELATIVE_TOLERANCE = 1e-3  # of the largest output; folding reorders FP32 sums through some hundred layers, seen: 1e-5


@dataclass(frozen=True)
class _Call:
    name: str
    source: Tensor  # the module's input
    result: Tensor


@torch.no_grad()
def fold_batch_norms(trunk: nn.Module, example: Tensor) -> int:
    """Fold every BatchNorm2d that directly follows a convolution, in place.

    Pairs are found by running the trunk: the BatchNorm's input is the very tensor that a convolution put out. The
    folded trunk must answer the example as before, else (a convolution that feeds something else too) nothing is
    folded.

    Args:
        trunk: in evaluation mode, FP32, returns a list of tensors.
        example: [B, 3, S, S].

    Returns:
        How many BatchNorms were folded.
    """
    pairs, before = _find_pairs(trunk, example)
    originals = {name: trunk.get_submodule(name) for pair in pairs for name in pair}
    for conv_name, norm_name in pairs:
        conv, norm = originals[conv_name], originals[norm_name]
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            raise TypeError(f"{conv_name}, {norm_name}: expected a convolution and a BatchNorm")
        trunk.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        trunk.set_submodule(norm_name, _rest(norm))
    after = trunk(example)
    if all(_close(a, b) for a, b in zip(after, before, strict=True)):
        return len(pairs)
    for name, module in originals.items():
        trunk.set_submodule(name, module)
    return 0


def _find_pairs(trunk: nn.Module, example: Tensor) -> tuple[list[tuple[str, str]], list[Tensor]]:
    """Return (convolution, BatchNorm) names and the trunk's outputs."""
    convs: list[_Call] = []
    norms: list[_Call] = []
    handles = []
    for name, module in trunk.named_modules():
        calls = convs if type(module).__name__.startswith("Conv2d") and isinstance(module, nn.Conv2d) else None
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            calls = norms
        if calls is not None:

            def record(_: nn.Module, inputs: tuple[Tensor, ...], result: Tensor, name=name, calls=calls) -> None:
                calls.append(_Call(name, inputs[0], result))

            handles.append(module.register_forward_hook(record))
    try:
        outputs = list(trunk(example))
    finally:
        for handle in handles:
            handle.remove()
    once = [call for call in convs if sum(other.name == call.name for other in convs) == 1]
    pairs = [(conv.name, norm.name) for norm in norms for conv in once if norm.source is conv.result]
    return pairs, outputs


def _rest(norm: nn.BatchNorm2d) -> nn.Module:
    """What is left of a BatchNorm once its affine map is folded: timm's variant carries an activation."""
    if not isinstance(norm, BatchNormAct2d):
        return nn.Identity()
    return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))


def _close(after: Tensor, before: Tensor) -> bool:
    return bool((after - before).abs().max() <= RELATIVE_TOLERANCE * before.abs().max())
