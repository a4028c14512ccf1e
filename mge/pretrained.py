"""Start every trunk from the same ImageNet weights, as the paper does."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mge.model import Expert, Gate, MGENet, create_trunk
from mge_runtime.errors import CheckpointError

__all__ = ["has_linear_features", "initialize_trunks"]


def has_linear_features(arch: str) -> bool:
    """Whether a trunk's last features can be negative, so that its heads need `normalize_features`."""
    trunk, _, _ = create_trunk(arch)
    with torch.inference_mode():
        return bool(trunk.eval()(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[-1].min() < 0)


def initialize_trunks(model: MGENet, source: str) -> None:
    """Copy one set of weights into every trunk of `model`.

    Args:
        model: to fill in place.
        source: "timm" for timm's pretrained weights of the architecture (downloaded), or a .safetensors file with the
            names of the timm classification model, float16 or float32.

    Raises:
        CheckpointError: the weights cannot be had, or belong to another architecture.
    """
    state = _downloaded(model.config.arch) if source == "timm" else _from_file(model, Path(source))
    for module in model.modules():
        if isinstance(module, Expert | Gate):
            module.trunk.load_state_dict(state, strict=False)


def _downloaded(arch: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(arch, pretrained=True, features_only=True, out_indices=(-2, -1)).state_dict()
    except Exception as error:  # the hub's client raises many kinds, all of them "not to be had"
        raise CheckpointError(
            f"timm's weights for {arch!r} cannot be had ({type(error).__name__}); expected a network connection and "
            "an architecture with weights: name a local file with --init FILE.safetensors, or --init none"
        ) from error


def _from_file(model: MGENet, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"no file {path}; expected timm, none or a .safetensors file for --init")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); expected weights for --init") from error
    trunk, _, _ = create_trunk(model.config.arch)
    state: dict[str, Tensor] = {}
    for name, parameter in trunk.state_dict().items():
        # timm flattens `stages.0` to `stages_0` when it cuts a network into feature levels.
        tensor = stored.get(name, stored.get(name.replace("_", ".", 1)))
        if tensor is None and name.endswith("num_batches_tracked"):
            continue
        if tensor is None or tensor.shape != parameter.shape:
            found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{path}: {found} for {name} of {model.config.arch}; expected shape {tuple(parameter.shape)}: "
                "these are weights of another architecture"
            )
        state[name] = tensor.to(parameter.dtype)
    return state
