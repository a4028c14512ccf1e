"""Attention, written once: training, evaluation and export call these functions.

All shapes are static and the batch is an ordinary axis (no `nonzero`, no loop over images), so that the same code
trains and traces. Source: Zhang et al., "Learning a Mixture of Granularity-Specific Experts for Fine-Grained
Categorization", ICCV 2019, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_box", "class_gradient", "crop_resize", "grad_cam", "mask_box", "normalized_map"]

# Of a map's largest value: a smaller range is what rounding leaves of a flat map when it is upsampled (some 1e-7).
FLAT = 1e-6  # relative range below which a map is flat: a few float32 roundings


def class_gradient(
    head: Callable[[Tensor], Tensor], features: Tensor, class_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of a head and the gradient of one class's score with respect to the features.

    Args:
        head: differentiable, features [B, D, h, w] -> scores [B, C], each image by itself.
        features: [B, D, h, w].
        class_index: [B] int64, the class t of each image; None: the class with the largest score.

    Returns:
        Scores [B, C] and d score_t / d features [B, D, h, w].
    """
    scores, pullback, *_ = torch.func.vjp(head, features)
    index = scores.argmax(1) if class_index is None else class_index
    # A one-hot product picks the class: the backward of a gather would be a ScatterElements, which TensorRT refuses.
    one_hot = (torch.arange(scores.shape[1], device=scores.device) == index[:, None]).to(scores.dtype)
    (gradient,) = pullback(one_hot)
    return scores, gradient


def grad_cam(features: Tensor, gradient: Tensor) -> Tensor:
    """Class activation map A = sum_k w_k f_k with w_k = mean_hw(ReLU(G_k)).

    The ReLU stands on the gradient, before the mean (the authors' code; Selvaraju et al. 2017 put it on the map).

    Args:
        features: [B, D, h, w].
        gradient: [B, D, h, w], d score_t / d features.

    Returns:
        [B, h, w], of any sign and scale.
    """
    weights = gradient.relu().mean((2, 3), keepdim=True)
    return (weights * features).sum(1)


def normalized_map(cam: Tensor, size: int) -> Tensor:
    """Upsample a map to `size` x `size` (bilinear, corners aligned) and scale each to [0, 1].

    Args:
        cam: [B, h, w].
        size: pixels.

    Returns:
        [B, size, size]; all 0 where the map is flat.
    """
    upsampled = F.interpolate(cam[:, None], (size, size), mode="bilinear", align_corners=True)[:, 0]
    low, high = upsampled.amin((1, 2), keepdim=True), upsampled.amax((1, 2), keepdim=True)
    span = high - low
    flat = span <= FLAT * torch.maximum(low.abs(), high.abs())
    return torch.where(flat, 0, upsampled - low) / torch.where(flat, 1, span)


def mask_box(mask: Tensor) -> Tensor:
    """Smallest box around all kept pixels, the last kept row and column outside it.

    The end is exclusive *and* the last kept pixel, as in the authors' slice `image[:, y1:y2, x1:x2]`. A box without
    width or height becomes the whole image.

    Args:
        mask: [B, S, S], above 0 where a pixel is kept.

    Returns:
        [B, 4] float32: x0, y0, x1, y1 in pixels, whole numbers, half-open.
    """
    size = mask.shape[-1]
    index = torch.arange(size, device=mask.device, dtype=torch.float32)

    def first_and_last(kept: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.where(kept > 0, index, float(size)).amin(1)
        last = torch.where(kept > 0, index, -1.0).amax(1)
        return first, last

    x0, x1 = first_and_last(mask.amax(1))
    y0, y1 = first_and_last(mask.amax(2))
    box = torch.stack((x0, y0, x1, y1), 1)
    whole = torch.tensor((0.0, 0.0, size, size), device=mask.device)
    usable = (x1 > x0) & (y1 > y0)
    return torch.where(usable[:, None], box, whole)


def attention_box(cam: Tensor, size: int, threshold: float) -> Tensor:
    """Box around everything that an attention map holds above a share of its range.

    Args:
        cam: [B, h, w].
        size: pixels, the side of the image that the map looks at.
        threshold: in [0, 1); a pixel is kept where the normalised map is at least this.

    Returns:
        [B, 4] float32, see `mask_box`; the whole image where the map is flat.
    """
    return mask_box((normalized_map(cam, size) >= threshold).to(torch.float32))


def crop_resize(image: Tensor, box: Tensor, size: int) -> Tensor:
    """Cut a box out of each image and resize it, bilinear with corners aligned.

    Equals `F.interpolate(image[:, :, y0:y1, x0:x1], (size, size), mode="bilinear", align_corners=True)` image by image:
    output pixel j takes its value at x0 + j (x1 - x0 - 1) / (size - 1). Bilinear weights are separable, so rows are
    resampled first, then columns.

    Args:
        image: [B, 3, H, W].
        box: [B, 4] float32: x0, y0, x1, y1 in pixels, whole numbers, half-open, not empty.
        size: pixels, > 1.

    Returns:
        [B, 3, size, size]. No gradient reaches `box`.
    """
    x0, y0, x1, y1 = box.unbind(1)
    return _resample(_resample(image, y0, y1, 2, size), x0, x1, 3, size)


def _resample(image: Tensor, start: Tensor, end: Tensor, axis: int, size: int) -> Tensor:
    """Resample [start, end) of one axis (2 or 3) to `size` by linear interpolation; start and end are [B]."""
    last = end - 1
    steps = torch.arange(size, device=image.device, dtype=torch.float32)
    position = start[:, None] + steps * ((last - start) / (size - 1))[:, None]
    # Rounding may push the last position past the box by one ulp; the pixel there is not part of the crop.
    position = torch.minimum(position, last[:, None])
    low = position.floor()
    high = torch.minimum(low + 1, last[:, None])
    view = (-1, 1, size, 1) if axis == 2 else (-1, 1, 1, size)
    shape = [*image.shape[:2], size, image.shape[3]] if axis == 2 else [*image.shape[:3], size]
    fraction = (position - low).view(view).to(image.dtype)
    below = image.gather(axis, low.long().view(view).expand(shape))
    above = image.gather(axis, high.long().view(view).expand(shape))
    return below + (above - below) * fraction
