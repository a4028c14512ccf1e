"""Weights to start from: the same of ImageNet for every backbone, as in the paper, or a trained model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mge.checkpoint import load_checkpoint
from mge.model import Expert, Gate, MGENet, create_trunk
from mge_runtime.errors import CheckpointError, TrainingError

__all__ = ["fine_tuned", "has_linear_features", "initialize_trunks"]

_HEADS = ("global_head.", "part_conv.", "part_head.", "concat_head.")  # their sizes hang on the number of classes


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


def fine_tuned(path: Path, classes: tuple[str, ...], changes: Mapping[str, Any]) -> tuple[MGENet, str]:
    """A trained model to go on with, for other classes too: then its heads begin anew, from torch's generator.

    Args:
        path: a checkpoint.
        classes: of the new model.
        changes: fields of its config that shall differ from the file's; one box threshold stands for all crops.

    Returns:
        The model, and half a sentence that says what it has from the file.

    Raises:
        CheckpointError: the file is no checkpoint, or a changed field is out of its range.
        TrainingError: the file's weights do not fit a changed field.
    """
    source = load_checkpoint(path)
    same = source.config.classes == classes
    if "image_size" in changes and "resize" not in changes:
        resize = round(changes["image_size"] * source.config.resize / source.config.image_size)
        changes = {**changes, "resize": resize}
    if len(thresholds := changes.get("box_thresholds", ())) == 1:
        changes = {**changes, "box_thresholds": thresholds * (source.config.experts - 1)}
    for name in ("arch", "experts", "normalize_features", *(("parts_per_class",) if same else ())):
        own = getattr(source.config, name)
        if changes.get(name, own) != own:
            raise TrainingError(f"{path} has {name} {own}, not {changes[name]}; leave the option out")
    model = MGENet(replace(source.config, classes=classes, **changes))
    state = source.state_dict()
    model.load_state_dict(
        {name: state[name] for name in state if same or not any(head in name for head in _HEADS)}, strict=False
    )
    if same:
        return model, f", all weights from {path}"
    before = source.config.num_classes
    return model, f"; backbones and gate from {path}, heads anew for {len(classes)} classes (it knows {before})"


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
