"""`best.pt`: weights, config and class names in one file; the authors' files are read, too.

The file is a `torch.save` of a dict of plain values and tensors, so `torch.load(weights_only=True)` opens it:

| key | holds |
|---|---|
| `format`, `version` | "mge", 1 |
| `config` | `MGEConfig.to_dict()`, class names included |
| `model` | the state dict of `MGENet` |
| `training` | what a training needs to go on (optional) |
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mge.archive import read_archive
from mge.authors import is_authors_state, is_counter, read_authors_state
from mge.config import PAPER_THRESHOLD, MGEConfig
from mge.foreign import describe_foreign
from mge.labels import read_labels
from mge.model import MGENet
from mge_runtime.errors import CheckpointError, OutputError
from mge_runtime.files import atomic_path

__all__ = ["FORMAT", "VERSION", "Checkpoint", "load_checkpoint", "read_checkpoint", "save_checkpoint"]

FORMAT = "mge"
VERSION = 1  # of the layout above; raised when an older mge could no longer read the file
_STRIDE = 16  # pixels, of c4, as MGEConfig demands
_PAPER_SIZE, _PAPER_RESIZE = 448, 512  # pixels, the authors' test transform


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds."""

    model: MGENet  # with its weights, in eval mode, on the CPU
    training: dict[str, Any] | None  # the state that `save_checkpoint` was given; None in the authors' files


def save_checkpoint(path: str | os.PathLike[str], model: MGENet, *, training: Mapping[str, Any] | None = None) -> None:
    """Write a model, whole or not at all.

    Args:
        path: replaced if it exists.
        model: on any device, not wrapped for distribution.
        training: nested dicts, lists and tuples of tensors and plain values, for `--resume`.

    Raises:
        OutputError: the place cannot be written.
        TypeError: `training` holds something that could not be read back.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "config": model.config.to_dict(),
        "model": {name: _compact(tensor) for name, tensor in model.state_dict().items()},
    }
    if training is not None:
        _require_plain(training, "training")
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
    """Load the model of our own checkpoint or of one of the authors'.

    The options stand for what the authors' file does not hold; for our own they replace what it does.

    Args:
        path: the file.
        labels: a text file with one class name a line, in the order of the class indices. None: the checkpoint's own
            names, "class_0", "class_1", ... for the authors'.
        box_threshold: in [0, 1), for every crop. None: the checkpoint's own, 0.2 for the authors'.
        resize: pixels, the shorter side before the centre crop. None: the checkpoint's own (512 for the authors'), in
            proportion where `image_size` changes.
        image_size: pixels, a multiple of 16, the side of every expert's input. None: the checkpoint's own, 448 for the
            authors'.

    Returns:
        The model in eval mode on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, newer than this code or holds code; its weights are not
            finite or do not fit its config; or it disagrees with an option.
    """
    return read_checkpoint(path, labels=labels, box_threshold=box_threshold, resize=resize, image_size=image_size).model


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    box_threshold: float | None = None,
    resize: int | None = None,
    image_size: int | None = None,
) -> Checkpoint:
    """As `load_checkpoint`, with the training state."""
    source = os.fspath(path)
    content = read_archive(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} holds a {type(content).__name__}; expected a checkpoint that mge-train wrote")
    training = None
    if content.get("format") == FORMAT:
        config, state, training = _own(content, source)
    else:
        config, state = _authors(content, source)
    config = _with_options(config, source, labels, box_threshold, resize, image_size)
    try:
        model = MGENet(config)
    except CheckpointError as error:  # a trunk that this timm does not have
        raise CheckpointError(f"{source}: {error}") from error
    _fill(model, state, source)
    return Checkpoint(model.eval(), training)


def _own(content: dict[str, Any], source: str) -> tuple[MGEConfig, dict[str, Tensor], dict[str, Any] | None]:
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{source} has format version {version!r}; expected a number from 1 to {VERSION}")
    if version > VERSION:
        raise CheckpointError(
            f"{source} has format version {version}; this mge reads up to version {VERSION}, upgrade it"
        )
    for key in ("config", "model"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"{source} has no {key!r}; expected a checkpoint that mge-train wrote")
    training = content.get("training")
    if training is not None and not isinstance(training, dict):
        raise CheckpointError(f"{source}: 'training' is a {type(training).__name__}; expected a dict")
    try:
        config = MGEConfig.from_dict(content["config"])
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return config, _tensors(content["model"], source), training


def _authors(content: dict[str, Any], source: str) -> tuple[MGEConfig, dict[str, Tensor]]:
    # The dict that their code writes, or its weights alone.
    inner = content.get("state_dict")
    state = inner if isinstance(inner, dict) else content
    if not all(isinstance(name, str) for name in state) or not is_authors_state(state):
        raise CheckpointError(f"{source} {describe_foreign(content)}")
    found = read_authors_state(_tensors(state, source), source)
    config = MGEConfig(
        arch=found.arch,
        classes=tuple(f"class_{index}" for index in range(found.num_classes)),
        experts=3,
        image_size=_PAPER_SIZE,
        resize=_PAPER_RESIZE,
        box_thresholds=(PAPER_THRESHOLD, PAPER_THRESHOLD),
        parts_per_class=found.parts_per_class,
        gate_width=found.gate_width,
        normalize_features=False,
        attention_head="first",  # their Grad-CAM is handed each expert's classifier but calls `model.classifier`
    )
    return config, found.state


def _tensors(state: dict[Any, Any], source: str) -> dict[str, Tensor]:
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{source}: weight {name!r} is a {type(value).__name__}; expected a tensor")
        for kind, found in (
            (value.layout, value.layout is not torch.strided),
            (value.device, value.is_meta),
            (value.dtype, value.is_quantized or value.is_complex()),
        ):
            if found:
                raise CheckpointError(f"{source}: weight {name!r} is a tensor of kind {kind}; expected plain numbers")
    return state


def _with_options(
    config: MGEConfig,
    source: str,
    labels: str | os.PathLike[str] | None,
    box_threshold: float | None,
    resize: int | None,
    image_size: int | None,
) -> MGEConfig:
    changes: dict[str, Any] = {}
    if labels is not None:
        names = read_labels(labels)
        if len(names) != config.num_classes:
            raise CheckpointError(
                f"{source} has {config.num_classes} classes, {os.fspath(labels)} names {len(names)}; "
                "expected one name a line for each class, in the order of the class indices"
            )
        changes["classes"] = names
    if box_threshold is not None:
        changes["box_thresholds"] = (float(box_threshold),) * (config.experts - 1)
    if image_size is not None and image_size != config.image_size:
        if image_size < 2 * _STRIDE or image_size % _STRIDE:
            raise CheckpointError(
                f"image size {image_size} does not fit {source}; expected a multiple of {_STRIDE} pixels, "
                f"such as its own {config.image_size}"
            )
        changes["image_size"] = image_size
        changes["resize"] = round(image_size * config.resize / config.image_size)
    if resize is not None:
        changes["resize"] = resize
    return replace(config, **changes)


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model: every name known, none left out, every shape right, every number finite."""
    wanted = model.state_dict()
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


def _compact(tensor: Tensor) -> Tensor:
    """On the CPU, and with no more storage than its own: `torch.save` writes the whole storage behind a view."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _require_plain(value: object, where: str) -> None:
    """Refuse what `weights_only=True` would refuse when the file is read, while it can still be mended."""
    if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, Tensor):
        return
    if type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]
            _require_plain(item, f"{where}[{index}]")
    elif type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():  # type: ignore[attr-defined]
            _require_plain(key, f"a key of {where}")
            _require_plain(item, f"{where}[{key!r}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values alone")
