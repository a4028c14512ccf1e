"""A trunk cut in two at c4, as the authors hold it: their Grad-CAM runs the upper half once more, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mge_runtime.errors import BackendError

__all__ = ["EagerUnavailable", "split_trunk"]


class EagerUnavailable(BackendError):  # noqa: N818 - names a state that the report lists, like one of its rows
    """A way of running the model in PyTorch that does not work here; its text is the reason."""

    name = ""  # of the way, as a contender would be named; empty where it is not known


def split_trunk(trunk: nn.Module, size: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut a trunk into image -> c4 and c4 -> c5.

    timm's trunks are a row of modules, or a row with one level of `Sequential` inside. That this one is, and where c4
    lies in it, is found by running it: the halves hold the trunk's own modules and give bit for bit what it gives.

    Args:
        trunk: in evaluation mode, image [B, 3, S, S] -> c4 and c5.
        size: pixels, S.

    Raises:
        EagerUnavailable: the trunk is more than a row of modules.
    """
    modules: list[nn.Module] = []
    for child in trunk.children():
        modules += list(child) if isinstance(child, nn.Sequential) else [child]
    device = next(trunk.parameters()).device
    image = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    with torch.no_grad():
        c4, c5 = trunk(image)
        try:
            cut = _first_equal(modules, image, c4)
            end = cut + _first_equal(modules[cut:], c4, c5)
        except (RuntimeError, TypeError, LookupError) as error:
            raise EagerUnavailable(
                f"{type(trunk).__name__} cannot be cut at c4, which Grad-CAM the authors' way needs; "
                "expected a trunk that is a row of modules"
            ) from error
    return nn.Sequential(*modules[:cut]), nn.Sequential(*modules[cut:end])


def _first_equal(modules: list[nn.Module], value: Tensor, wanted: Tensor) -> int:
    """How many modules, run one after the other, lead from a value to the wanted one."""
    # Activations may work in place, and the value is needed again.
    value = value.clone()
    for count, module in enumerate(modules, 1):
        value = module(value)
        if torch.equal(value, wanted):
            return count
    raise LookupError
