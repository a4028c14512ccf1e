"""Checkpoints of others: those of the authors' published code (`lbzhang/MGE-CNN`) are read, the rest is described.

The authors' file is a dict with the weights under `state_dict` (beside `epoch`, `optimizer` and `scheduler`); it holds
neither class names, nor the box threshold, nor the preprocessing. Here the weights are renamed and everything that
shapes tell is told: backbone, classes, parts, experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mge.config import MGEConfig
from mge_runtime.errors import CheckpointError

# What is appended to the authors' names for expert 1, 2, 3: (backbone and global head; part and concatenated heads).
_EXPERT_SUFFIXES = (("", ""), ("_box", "_1"), ("_box_2", "_2"))
# `conv4*` is a Sequential of the children of a torchvision ResNet; 2 and 3 (ReLU, max pooling) have no weights.
_CONV4_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3"}
_UNUSED = "cls_cat_a."  # a head over all experts that their forward never calls
_TRACKED = ".num_batches_tracked"  # a counter of BatchNorm that torch before 0.4.1 did not keep
_ARCHS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}  # blocks in layer1..4
_NESTS = ("state_dict", "model", "model_state_dict", "net", "weights")  # where others keep their weights


def _backbone_names(theirs: str, ours: str) -> dict[str, str]:
    names = {f"conv4{theirs}.{child}.": f"{ours}.backbone.{name}." for child, name in _CONV4_CHILDREN.items()}
    return names | {f"conv5{theirs}.": f"{ours}.backbone.layer4."}


def _all_names() -> dict[str, str]:
    names: dict[str, str] = {}
    for k, (backbone, part) in enumerate(_EXPERT_SUFFIXES):
        ours = f"experts.{k}"
        names |= _backbone_names(backbone, ours)
        names |= {
            f"classifier{backbone}.fc.": f"{ours}.global_head.fc.",
            f"conv6{part}.": f"{ours}.part_conv.",
            f"cls_part{part}.fc.": f"{ours}.part_head.",
            f"cls_cat{part}.fc.": f"{ours}.concat_head.",
        }
    names |= _backbone_names("_gate", "gate")
    return names | {"cls_gate.0.fc.": "gate.hidden.", "cls_gate.1.fc.": "gate.output."}


_PREFIXES = _all_names()  # their prefix -> ours; no prefix is the beginning of another


def is_authors_state(state: Mapping[str, object]) -> bool:
    """Whether a state dict has the authors' names (with or without DataParallel's `module.`)."""
    names = {name.removeprefix("module.") for name in state}
    return {"classifier.fc.weight", "cls_cat.fc.weight"} <= names


def read_authors_state(state: Mapping[str, Tensor], source: str) -> tuple[MGEConfig, dict[str, Tensor]]:
    """Rename the authors' weights and read the architecture from their shapes.

    Args:
        state: their state dict, with or without `module.` before each name.
        source: what to call the file in errors.

    Returns:
        A config whose sizes and thresholds are the paper's, and the weights by the names of `mge.model.MGENet`: all of
        the model's but BatchNorm's counters.

    Raises:
        CheckpointError: a name is unknown or missing, or shapes are of no ResNet-50 or -101 with their heads.
    """
    theirs = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    ours = {_our_name(name, source): tensor for name, tensor in theirs.items() if not name.startswith(_UNUSED)}
    classes, _ = _shape(theirs, "classifier.fc.weight", 2, source)
    parts, *_ = _shape(theirs, "conv6.weight", 4, source)
    gate_width, _ = _shape(theirs, "cls_gate.0.fc.weight", 2, source)
    if classes == 0 or parts == 0 or parts % classes:
        raise CheckpointError(
            f"{source}: conv6 has {parts} channels for {classes} classes; expected a multiple (10 a class in the paper)"
        )
    config = MGEConfig(
        arch=_arch(ours, source),
        classes=tuple(f"class_{index}" for index in range(classes)),
        parts_per_class=parts // classes,
        gate_width=gate_width,
        attention_head="first",  # their Grad-CAM is handed each expert's classifier but calls `model.classifier`
    )
    return config, ours


def is_counter(name: str) -> bool:
    """Whether a name is BatchNorm's count of batches, which changes no output and which old files lack."""
    return name.endswith(_TRACKED)


def _our_name(name: str, source: str) -> str:
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    raise CheckpointError(
        f"{source}: {name!r} is no name of the authors' LocalCamNet; expected their state_dict unchanged"
    )


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int, source: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(
            f"{source}: {name!r} is missing; expected the whole state_dict of the authors' LocalCamNet"
        )
    shape = tuple(state[name].shape)
    if len(shape) != dimensions:
        raise CheckpointError(f"{source}: {name!r} is {list(shape)}; expected {dimensions} dimensions")
    return shape


def _arch(ours: Mapping[str, Tensor], source: str) -> str:
    found = {match[0] for name in ours if (match := re.match(r"experts\.0\.backbone\.layer[1-4]\.\d+\.", name))}
    blocks = tuple(sum(f".layer{layer}." in block for block in found) for layer in (1, 2, 3, 4))
    if blocks not in _ARCHS:
        raise CheckpointError(
            f"{source}: the backbone has {'-'.join(map(str, blocks))} blocks; "
            "expected 3-4-6-3 (ResNet-50) or 3-4-23-3 (ResNet-101)"
        )
    return _ARCHS[blocks]


def describe_foreign(content: Mapping[Any, Any]) -> str:
    """Describe a loaded file that is neither ours nor the authors', to follow its name in an error.

    Args:
        content: the dict that the file holds.
    """
    state = next((content[nest] for nest in _NESTS if isinstance(content.get(nest), dict)), content)
    weights = {str(name).removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    expected = "expected a checkpoint that mge-train or the authors' code wrote"
    if not weights:
        keys = ", ".join(repr(str(key)) for key in list(content)[:4]) or "nothing"
        return f"is a dict of {keys} without weights; {expected}"
    if "conv5.0.weight" in weights and "classifier.weight" in weights:
        return f"is the authors' baseline, a single ResNet without experts; {expected} for LocalCamNet"
    if "conv1.weight" in weights and "layer1.0.conv1.weight" in weights:
        return (
            f"looks like a bare ResNet, a backbone without experts; {expected} "
            "(mge-train --init starts from such weights, saved as .safetensors)"
        )
    return f"holds {len(weights)} weights of another model, such as {next(iter(weights))!r}; {expected}"
