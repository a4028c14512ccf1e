"""`best.pt`: weights, config and class names in one file; the authors' files are read, too.

The file is a `torch.save` of a dict of plain values and tensors, so `torch.load(weights_only=True)` opens it:

| key | holds |
|---|---|
| `format`, `version` | "mge", 1 |
| `config` | `MGEConfig.to_dict()`, class names included |
| `model` | the state dict of `MGENet`; a shared backbone is in it once, as that of expert 0 |
| `training` | what a training needs to go on (optional) |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mge.archive import read_archive
from mge.authors import describe_foreign, is_authors_state, is_counter, read_authors_state
from mge.config import PAPER_THRESHOLD, MGEConfig, read_labels
from mge.model import MGENet
from mge_runtime.errors import CheckpointError, OutputError, TrainingError
from mge_runtime.files import atomic_path

FORMAT = "mge"
VERSION = 1  # of the layout above; raised when an older mge could no longer read the file
_HEADS = ("global_head.", "part_conv.", "part_head.", "concat_head.")  # sized by the number of classes


def save_checkpoint(path: str | os.PathLike[str], model: MGENet, *, training: Mapping[str, Any] | None = None) -> None:
    """Write a model, whole or not at all.

    Args:
        path: replaced if it exists.
        model: on any device, not wrapped for distribution.
        training: nested dicts, lists and tuples of tensors and plain values, for `read_training`.

    Raises:
        OutputError: the place cannot be written.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in _weights(model).items()}
    content = {"format": FORMAT, "version": VERSION, "config": model.config.to_dict(), "model": weights}
    if training is not None:
        content["training"] = dict(training)
    # Through a file object the entries inside are called "archive/...", not after the temporary file, so that the same
    # model gives the same bytes.
    with atomic_path(path) as part, part.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch's writer turns a full disk into one
            raise OutputError(f"cannot write {path}: {error}; the old file, if any, is unchanged") from error


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    box_threshold: float | None = None,
    resize: int | None = None,
    image_size: int | None = None,
) -> MGENet:
    """Load the model of our own checkpoint or of one of the authors', in eval mode on the CPU.

    The options replace what the file says. The authors' files say nothing: without options they mean a threshold of
    0.2, 512 and 448 pixels, and classes called "class_0", "class_1", ...

    Args:
        path: the file.
        labels: a text file with one class name a line, in the order of the class indices.
        box_threshold: in [0, 1), for every crop.
        resize: pixels, the shorter side before the center crop; it follows `image_size` in proportion.
        image_size: pixels, a multiple of 16, the side of the first expert's input; those of the others follow it.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, newer than this code or holds code; its weights are not
            finite or do not fit its config; or it disagrees with an option.
    """
    source = os.fspath(path)
    content = read_archive(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} holds a {type(content).__name__}; expected a checkpoint that mge-train wrote")
    config, state = (_own if content.get("format") == FORMAT else _authors)(content, source)
    try:
        model = MGENet(config)
    except CheckpointError as error:  # a backbone that this timm does not have
        raise CheckpointError(f"{source}: {error}") from error
    _fill(model, state, source)
    classes = None if labels is None else read_labels(labels)
    if classes is not None and len(classes) != config.num_classes:
        raise CheckpointError(
            f"{source} has {config.num_classes} classes, {labels} names {len(classes)}; "
            "expected one name a line for each class, in the order of the class indices"
        )
    changes = {
        "classes": classes,
        "box_thresholds": None if box_threshold is None else (box_threshold,),
        "image_size": image_size,
        "resize": resize,
    }
    model.config = config.changed(**{name: value for name, value in changes.items() if value is not None})
    return model.eval()


def read_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that `save_checkpoint` was given beside the model.

    Raises:
        CheckpointError: as for `load_checkpoint`; the model is not looked at.
        TrainingError: the file holds none.
    """
    content = read_archive(path)
    training = content.get("training") if isinstance(content, dict) else None
    if not isinstance(training, dict):
        raise TrainingError(f"{path} holds a model but no training state; expected last.pt of an unfinished run")
    return training


def fine_tuned(path: Path, classes: tuple[str, ...], changes: Mapping[str, Any]) -> tuple[MGENet, str]:
    """A trained model to go on with, for other classes too: then its heads begin anew, from torch's generator.

    A single network starts any chain: every expert and the backbone of a gate begin as it is.

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
    base, same = source.config, source.config.classes == classes
    if base.experts == 1 < (several := len(changes.get("image_sizes", ()))) and "experts" not in changes:
        raise TrainingError(
            f"{path} is a single network, image_sizes are of {several} experts; add --experts {several}, it starts them"
        )
    chain = base.experts == 1 < changes.get("experts", 1)
    fixed = ("arch", "normalize_features", *(() if chain else ("experts", "sharing")))
    for name in (*fixed, *(("parts_per_class",) if same else ())):
        own = getattr(base, name)
        if changes.get(name, own) != own:
            raise TrainingError(f"{path} has {name} {own}, not {changes[name]}; leave the option out")
    if chain:
        base = replace(base, image_sizes=())  # the one that it may name is its image_size
        changes = {"box_thresholds": (PAPER_THRESHOLD,), **changes}
    model = MGENet(base.changed(classes=classes, **changes))
    anew = () if same else _HEADS
    gate = " and gate"
    if model.config.gate != base.gate and not chain:
        anew, gate = (*anew, "gate."), ""
    state = _weights(source)
    if chain:
        single = {name.removeprefix("experts.0."): tensor for name, tensor in state.items()}
        places = [*(f"experts.{k}." for k in range(model.config.experts)), "gate."]
        state = {place + name: tensor for place in places for name, tensor in single.items()}
    model.load_state_dict({name: state[name] for name in state if not any(part in name for part in anew)}, strict=False)
    if chain:
        return model, f"; each begins as the single network {path}" + ("" if same else ", with heads of its own")
    if same:
        return model, f", {'all weights' if gate else 'all weights but the gate'} from {path}"
    before = base.num_classes
    return model, f"; backbones{gate} from {path}, heads anew for {len(classes)} classes (it knows {before})"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without further names of what stands in it: a shared backbone is stored as the first expert's."""
    first = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in model.state_dict().items() if name in first}


def _own(content: dict[str, Any], source: str) -> tuple[MGEConfig, dict[str, Tensor]]:
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{source} has format version {version!r}; this mge reads up to version {VERSION}, upgrade it"
        )
    for key in ("config", "model"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"{source} has no dict {key!r}; expected a checkpoint that mge-train wrote")
    try:
        config = MGEConfig.from_dict(content["config"])
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return config, _tensors(content["model"], source)


def _authors(content: dict[str, Any], source: str) -> tuple[MGEConfig, dict[str, Tensor]]:
    # The dict that their code writes, or its weights alone.
    inner = content.get("state_dict")
    state = inner if isinstance(inner, dict) else content
    if not all(isinstance(name, str) for name in state) or not is_authors_state(state):
        raise CheckpointError(f"{source} {describe_foreign(content)}")
    return read_authors_state(_tensors(state, source), source)


def _tensors(state: dict[Any, Any], source: str) -> dict[str, Tensor]:
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{source}: weight {name!r} is a {type(value).__name__}; expected a tensor")
        if value.layout is not torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            raise CheckpointError(
                f"{source}: weight {name!r} is {value.dtype}, {value.layout}, on {value.device}; expected plain numbers"
            )
    return state


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model: every name known, none left out, every shape right, every number finite."""
    wanted = _weights(model)
    for found in state:
        if found not in wanted:
            raise CheckpointError(f"{source}: weight {found!r} has no place in the model of its config")
    for name, target in wanted.items():
        if name not in state:
            if is_counter(name):
                continue
            raise CheckpointError(f"{source}: weight {name!r} is missing; the file does not hold the whole model")
        tensor = state[name]
        if tensor.shape != target.shape or tensor.is_floating_point() != target.is_floating_point():
            raise CheckpointError(
                f"{source}: weight {name!r} is {_kind(tensor)}; the model of its config expects {_kind(target)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{source}: weight {name!r} has {count} of {tensor.numel()} values NaN or infinite; "
                "its training diverged, use an earlier checkpoint"
            )
    model.load_state_dict(dict(state), strict=False)  # strictness is above; only counters may be missing


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
