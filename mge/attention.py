"""Attention, written once: training, evaluation and export call these functions.

All shapes are static and the batch is an ordinary axis (no `nonzero`, no loop over images), so that the same code
trains and traces. Source: Zhang et al., "Learning a Mixture of Granularity-Specific Experts for Fine-Grained
Categorization", ICCV 2019, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["attention_box", "class_gradient", "crop_resize", "extent_box", "grad_cam", "normalized_maxima"]

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


def normalized_maxima(cam: Tensor, size: int) -> Tensor:
    """Largest value of each column and of each row of a map that is upsampled and scaled to [0, 1].

    The map is upsampled to `size` x `size` pixels, bilinear with corners aligned (`F.interpolate`), but only the pixels
    that can be the largest or smallest of a row or column are computed: between two cells of the map a row is straight,
    so its extremes are the first and the last pixel there.

    Args:
        cam: [B, h, w].
        size: pixels, > 1.

    Returns:
        [B, 2, size]: columns (along x), then rows (along y); all 0 where the map is flat.
    """
    height, width = cam.shape[1:]
    across = _upsample(cam, 2, _Pixels.all(width, size))  # [B, h, size]
    columns = _upsample(across, 1, _Pixels.extreme(height, size))  # [B, few, size]
    few = across.index_select(2, cam.new_tensor(_Pixels.extreme(width, size).numbers, dtype=torch.int64))
    rows = _upsample(few, 1, _Pixels.all(height, size))  # [B, size, few]
    maxima = torch.stack((columns.amax(1), rows.amax(2)), 1)
    low, high = rows.amin((1, 2))[:, None, None], maxima.amax((1, 2), keepdim=True)
    span = high - low
    flat = span <= FLAT * torch.maximum(low.abs(), high.abs())
    return torch.where(flat, 0, maxima - low) / torch.where(flat, 1, span)


def extent_box(kept: Tensor) -> Tensor:
    """Smallest box around all kept pixels, the last kept row and column outside it.

    The end is exclusive *and* the last kept pixel, as in the authors' slice `image[:, y1:y2, x1:x2]`. A box without
    width or height becomes the whole image.

    Args:
        kept: bool [B, 2, S]: columns and rows that hold a kept pixel.

    Returns:
        [B, 4] float32: x0, y0, x1, y1 in pixels, whole numbers, half-open.
    """
    size = kept.shape[-1]
    index = torch.arange(size, device=kept.device, dtype=torch.float32)
    first = torch.where(kept, index, float(size)).amin(2)
    last = torch.where(kept, index, -1.0).amax(2)
    whole = torch.tensor((0.0, 0.0, size, size), device=kept.device)
    usable = (last - first).amin(1, keepdim=True) > 0
    return torch.where(usable, torch.cat((first, last), 1), whole)


def attention_box(cam: Tensor, size: int, threshold: float) -> Tensor:
    """Box around everything that an attention map holds above a share of its range.

    Args:
        cam: [B, h, w].
        size: pixels, the side of the image that the map looks at.
        threshold: in [0, 1); a pixel is kept where the normalised map is at least this.

    Returns:
        [B, 4] float32, see `extent_box`; the whole image where the map is flat.
    """
    return extent_box(normalized_maxima(cam, size) >= threshold)


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
    start, last = box[:, :2, None], box[:, 2:, None] - 1
    steps = torch.arange(size, device=image.device, dtype=torch.float32)
    # Rounding may push the last position past the box by one ulp; the pixel there is not part of the crop.
    position = torch.minimum(start + steps * ((last - start) / (size - 1)), last)  # [B, 2, size]
    low = position.floor()
    fraction = (position - low).to(image.dtype)
    low, high = low.long(), torch.minimum(low + 1, last).long()
    tall = _resample_rows(image, low[:, 1], high[:, 1], fraction[:, 1])
    return _resample_rows(tall.transpose(2, 3), low[:, 0], high[:, 0], fraction[:, 0]).transpose(2, 3)


def _resample_rows(image: Tensor, low: Tensor, high: Tensor, fraction: Tensor) -> Tensor:
    """Between rows `low` and `high` [B, S] of each image [B, C, H, W], `fraction` of the way: [B, C, S, W].

    Whole rows are taken from all images at once: an index for each row, not for each value, and rows are copied.
    """
    batch, channels, height, width = image.shape
    rows = image.reshape(-1, width)
    first = height * torch.arange(batch * channels, device=image.device).view(-1, channels, 1)  # of each channel

    def take(index: Tensor) -> Tensor:
        return rows.index_select(0, (first + index[:, None]).reshape(-1)).view(-1, channels, index.shape[1], width)

    below = take(low)
    return below + (take(high) - below) * fraction[:, None, :, None]


@dataclass(frozen=True)
class _Pixels:
    """Pixels along one axis of an upsampled map, and the cells that they lie between."""

    numbers: list[int]
    low: list[int]  # cell
    high: list[int]
    fraction: list[float]  # of the way from low to high

    @classmethod
    def all(cls, cells: int, size: int) -> _Pixels:
        """Every pixel, as `F.interpolate` with corners aligned places them."""
        position = np.arange(size, dtype=np.float32) * (np.float32(cells - 1) / np.float32(size - 1))
        low = np.minimum(position.astype(np.int64), cells - 1)
        high = np.minimum(low + 1, cells - 1)
        return cls(list(range(size)), low.tolist(), high.tolist(), (position - low).tolist())

    @classmethod
    def extreme(cls, cells: int, size: int) -> _Pixels:
        """The first and the last pixel between each two cells."""
        pixels = cls.all(cells, size)
        ends = [n for n in range(size) if n in (0, size - 1) or pixels.low[n - 1] < pixels.low[n]]
        chosen = sorted({*ends, *(n - 1 for n in ends if n > 0)})
        pick = lambda values: [values[n] for n in chosen]  # noqa: E731
        return cls(chosen, pick(pixels.low), pick(pixels.high), pick(pixels.fraction))


def _upsample(cam: Tensor, axis: int, pixels: _Pixels) -> Tensor:
    """Interpolate one axis (1 or 2) of a map [B, h, w] at some pixels."""
    low, high = (
        cam.index_select(axis, cam.new_tensor(cells, dtype=torch.int64)) for cells in (pixels.low, pixels.high)
    )
    fraction = cam.new_tensor(pixels.fraction)
    if axis == 1:
        fraction = fraction[:, None]
    return low * (1 - fraction) + high * fraction
