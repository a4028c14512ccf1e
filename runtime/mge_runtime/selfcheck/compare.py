"""Compare what two runs of a chain put out for the same frames, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.fields import JsonValue
from mge_runtime.manifest import Manifest
from mge_runtime.preprocess import Viewport, compose_boxes
from mge_runtime.selfcheck.limits import FEW_IMAGES, Limits

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Comparison", "compare", "compared_tensors", "expectation"]

_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and what not."""

    failures: list[str]  # everything out of limits, one line each
    summary: str  # one line
    numbers: dict[str, JsonValue] = field(default_factory=dict[str, JsonValue])


def compared_tensors(manifest: Manifest) -> list[str]:
    """Names of the tensors that `compare` looks at: the answer, every view's logits and box, the gate."""
    names = [manifest.answer, *(view.logits for view in manifest.views), *_boxes(manifest)]
    return list(dict.fromkeys([*names, *([manifest.gate] if manifest.gate is not None else [])]))


def expectation(limits: Limits) -> str:
    """What is expected of two runs, for people."""
    boxes = "all boxes" if limits.chain_boxes else "the first box"
    return (
        f"the same classes; logits and gate within {limits.relative:g} of their largest value where the crops are the "
        f"same; {boxes} with a median IoU of at least {limits.box_iou_median:g}"
    )


def compare(found: Mapping[str, Any], reference: Mapping[str, Any], manifest: Manifest, limits: Limits) -> Comparison:
    """Hold one run to another.

    What depends on the frame alone (the first view's logits, the gate, the first box) is held on every image. An image
    cropped by another box is another image, so the answer's logits are held where all boxes are the same; its class
    is held on every image.

    Args:
        found: tensors by name, those of `compared_tensors`; the first axis is the image.
        reference: what they should be.
        manifest: of the chain.
        limits: how far they may be apart.
    """
    names = compared_tensors(manifest)
    boxes, images = _boxes(manifest), len(reference[manifest.answer])
    failures = [f"{name} holds numbers that are not finite" for name in names if not np.isfinite(found[name]).all()]
    same_view = np.ones(images, bool)
    for name in boxes:
        same_view &= (found[name] == reference[name]).all(1)
    numbers: dict[str, JsonValue] = {
        "images": images,
        "identical": all(np.array_equal(found[name], reference[name]) for name in names),
        "same_crops": int(same_view.sum()),
    }
    failures += _classes(found[manifest.answer], reference[manifest.answer], limits, numbers)
    first = manifest.views[0].logits
    everywhere = np.ones(images, bool)
    held = {first: everywhere, manifest.answer: same_view if boxes else everywhere}
    if manifest.gate is not None:
        held[manifest.gate] = everywhere
    for name, where in held.items():
        failures += _relative(name, found[name][where], reference[name][where], limits, numbers)
    for number, (name, values) in enumerate(_ious(found, reference, manifest).items()):
        failures += _iou(name, values, limits, numbers, held=number == 0 or limits.chain_boxes)
    return Comparison(failures, _summary(numbers), numbers)


def _boxes(manifest: Manifest) -> list[str]:
    return [view.box for view in manifest.views if view.box is not None]


def _classes(
    found: NDArray[np.float32], reference: NDArray[np.float32], limits: Limits, numbers: dict[str, JsonValue]
) -> list[str]:
    theirs = reference.astype(np.float64)
    changed = found.argmax(1) != theirs.argmax(1)
    # How far the reference's own class leads the one that was found: nothing on a tie.
    lead = theirs.max(1) - np.take_along_axis(theirs, found.argmax(1)[:, None], 1)[:, 0]
    tie = lead / np.maximum(np.abs(theirs).max(1), _TINY) <= limits.relative
    images, allowed = len(found), limits.allowed_changes(len(found))
    counted = int((changed & ~tie).sum() if allowed == 0 else changed.sum())
    numbers["class_changes"] = int(changed.sum())
    numbers["class_changes_on_ties"] = int((changed & tie).sum())
    if counted <= allowed:
        return []
    return [f"{counted} of {images} images change their class; expected at most {allowed}"]


def _relative(
    name: str,
    found: NDArray[np.float32],
    reference: NDArray[np.float32],
    limits: Limits,
    numbers: dict[str, JsonValue],
) -> list[str]:
    if not len(found):
        return []
    theirs = reference.astype(np.float64)
    difference = np.abs(found - theirs).max(1)
    relative = difference / np.maximum(np.abs(theirs).max(1), _TINY)
    numbers[f"{name}_relative"] = _number(relative.max())
    spread = np.maximum(theirs.max(1) - theirs.min(1), _TINY)
    numbers[f"{name}_of_range"] = _number((difference / spread).max())
    beyond = int((~(relative <= limits.relative)).sum())
    if not beyond:
        return []
    return [
        f"{name} differs by {relative.max():.1e} of its largest value on {beyond} of {len(found)} images; "
        f"expected at most {limits.relative:g}"
    ]


def _ious(found: Mapping[str, Any], reference: Mapping[str, Any], manifest: Manifest) -> dict[str, NDArray[np.float64]]:
    """Intersection over union by box and image, in pixels of the frame: a later box means nothing without the first."""
    names, size = _boxes(manifest), manifest.preprocess.size
    images = len(reference[manifest.answer])
    values = np.empty((len(names), images))
    for image in range(images):
        ours, theirs = (_seen([tensors[name][image] for name in names], size) for tensors in (found, reference))
        values[:, image] = _box_iou(ours, theirs)
    return dict(zip(names, values, strict=True))


def _seen(boxes: list[Any], size: int) -> NDArray[np.float32]:
    frame = Viewport(0, 0, size, size, size, size)
    return compose_boxes(np.array(boxes, np.float32).reshape(-1, 4), frame, size)[1:]


def _box_iou(boxes: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    low, high = np.maximum(boxes[:, :2], others[:, :2]), np.minimum(boxes[:, 2:], others[:, 2:])
    inner = _area(low, high)
    return inner / (_area(boxes[:, :2], boxes[:, 2:]) + _area(others[:, :2], others[:, 2:]) - inner)


def _area(low: NDArray[np.float32], high: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.maximum(high.astype(np.float64) - low, 0).prod(1)


def _iou(
    name: str, values: NDArray[np.float64], limits: Limits, numbers: dict[str, JsonValue], *, held: bool
) -> list[str]:
    median, least = float(np.median(values)), float(values.min())
    numbers[f"{name}_iou_median"], numbers[f"{name}_iou_least"] = _number(median), _number(least)
    if not held:
        return []
    failures: list[str] = []
    if not median >= limits.box_iou_median:
        failures.append(f"{name}: median IoU {median:.3f}; expected at least {limits.box_iou_median:g}")
    if len(values) >= FEW_IMAGES:
        low = float(np.percentile(values, 1))
        if not low >= limits.box_iou_p1:
            failures.append(f"{name}: 1st percentile of IoU {low:.3f}; expected at least {limits.box_iou_p1:g}")
    elif (below := int((~(values >= limits.box_iou_p1)).sum())) > 1:
        failures.append(
            f"{name}: {below} of {len(values)} boxes with an IoU below {limits.box_iou_p1:g}; expected at most 1"
        )
    return failures


def _summary(numbers: Mapping[str, JsonValue]) -> str:
    parts = [f"{numbers['images']} images, {numbers['class_changes']} change their class"]
    parts += ["identical bit by bit"] if numbers["identical"] else []
    parts += [
        f"{name.removesuffix('_relative')} differs by {value:.1e} of its largest value"
        for name, value in numbers.items()
        if name.endswith("_relative") and isinstance(value, float) and not numbers["identical"]
    ]
    least = [value for name, value in numbers.items() if name.endswith("_iou_least") and isinstance(value, float)]
    if least and not numbers["identical"]:
        parts.append(f"least box IoU {min(least):.3f}")
    return ", ".join(parts)


def _number(value: Any) -> float | str:
    """JSON has no infinity: six digits of a number, or its name."""
    return float(f"{value:.6g}") if np.isfinite(value) else str(float(value))
