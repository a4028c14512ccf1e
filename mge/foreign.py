"""Say what a checkpoint of somebody else's is, so that its owner knows what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["describe_foreign"]

_RESNETS: dict[tuple[int, ...], str] = {  # by blocks in layer1..4
    (2, 2, 2, 2): "ResNet-18",
    (3, 4, 6, 3): "ResNet-50",
    (3, 4, 23, 3): "ResNet-101",
    (3, 8, 36, 3): "ResNet-152",
}
_NESTS = ("state_dict", "model", "model_state_dict", "net", "weights")  # where others keep their weights


def describe_foreign(content: Mapping[Any, Any]) -> str:
    """Describe a loaded file that is neither ours nor the authors', to follow its name in an error.

    Args:
        content: the dict that the file holds.
    """
    state: Mapping[Any, Any] = content
    for nest in _NESTS:
        if isinstance(content.get(nest), dict):
            state = content[nest]
            break
    weights = {str(name).removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    expected = "expected a checkpoint that mge-train or the authors' code wrote"
    if not weights:
        keys = ", ".join(repr(str(key)) for key in list(content)[:4]) or "nothing"
        return f"is a dict of {keys} without weights; {expected}"
    if "conv5.0.weight" in weights and "classifier.weight" in weights:
        return f"is the authors' baseline, a single ResNet without experts; {expected} for LocalCamNet"
    if "conv1.weight" in weights and "layer1.0.conv1.weight" in weights:
        head = weights.get("fc.weight")
        classes = "" if head is None or head.ndim == 0 else f" with {head.shape[0]} classes"
        return (
            f"looks like a bare {_resnet(weights)}{classes}, a trunk without experts; {expected} "
            "(mge-train --init starts from such weights, saved as .safetensors)"
        )
    return f"holds {len(weights)} weights of another model, such as {next(iter(weights))!r}; {expected}"


def _resnet(weights: Mapping[str, Tensor]) -> str:
    blocks = tuple(
        len({match[1] for name in weights if (match := re.match(rf"layer{layer}\.(\d+)\.", name))})
        for layer in (1, 2, 3, 4)
    )
    if blocks == (3, 4, 6, 3) and "layer1.0.conv3.weight" not in weights:  # two convolutions a block, not three
        return "ResNet-34"
    return _RESNETS.get(blocks, "ResNet")
