"""Attention, written once: training, evaluation and export call these functions.

All shapes are static and the batch is an ordinary axis (no `nonzero`, no loop over images), so that the same code
trains and traces. Source: Zhang et al., "Learning a Mixture of Granularity-Specific Experts for Fine-Grained
Categorization", ICCV 2019, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mge_runtime.errors import TrainingError

FLAT = 1e-6  # of its largest value: a smaller range is what rounding leaves of a flat map that is upsampled


@runtime_checkable
class StatesGradient(Protocol):
    """A head that says the gradient of its scores in closed form, so that nothing has to be differentiated."""

    def __call__(self, features: Tensor, /) -> Tensor:
        """Features [B, D, h, w] to scores [B, C]."""
        ...

    def class_gradient(self, features: Tensor, class_index: Tensor) -> Tensor:
        """The gradient d score_t / d features: [B, D, h, w], or [B, D, 1, 1] where it is the same at every cell.

        Args:
            features: [B, D, h, w].
            class_index: [B] int64, the class t of each image.
        """
        ...


def class_gradient(
    head: Callable[[Tensor], Tensor], features: Tensor, class_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of a head and the gradient of one class's score with respect to the features.

    Args:
        head: features [B, D, h, w] -> scores [B, C], each image by itself; `StatesGradient`, or differentiable.
        features: [B, D, h, w].
        class_index: [B] int64, the class t of each image; None: the class with the largest score.

    Returns:
        Scores [B, C] and d score_t / d features [B, D, h, w] ([B, D, 1, 1] where the head states it so).

    Raises:
        TrainingError: autograd gives a gradient of zeros although the scores depend on the features.
    """
    if isinstance(head, StatesGradient):
        scores = head(features)
        return scores, head.class_gradient(features, scores.argmax(1) if class_index is None else class_index)
    scores, gradient = differentiate(head, features, class_index)
    if not gradient.any() and _depends(head, features):
        raise TrainingError(
            f"the gradient of {type(head).__name__} is zero everywhere although its scores depend on the features "
            f"(torch {torch.__version__}, inference mode {'on' if torch.is_inference_mode_enabled() else 'off'}); "
            "expected autograd's: compute under torch.no_grad(), or give the head a method class_gradient"
        )
    return scores, gradient


def differentiate(
    head: Callable[[Tensor], Tensor], features: Tensor, class_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `class_gradient` by autograd alone, in operators that `make_fx` traces; zeros are not looked for."""
    # `torch.func.vjp` inside inference mode gives zeros with torch up to 2.11, without a word.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = features.detach().clone().requires_grad_()
        scores = head(leaf)
        index = scores.argmax(1) if class_index is None else class_index
        # A one-hot product picks the class: the backward of a gather is a ScatterElements, which TensorRT refuses.
        one_hot = (torch.arange(scores.shape[1], device=scores.device) == index[:, None]).to(scores.dtype)
        (gradient,) = torch.autograd.grad(scores, leaf, one_hot)
    return scores.detach(), gradient


@torch.no_grad()
def _depends(head: Callable[[Tensor], Tensor], features: Tensor) -> bool:
    """Whether the scores change when the features are moved a little, each by another amount."""
    step = 1e-2 * features.abs().amax().clamp_min(1)
    moves = torch.linspace(-1, 1, features.numel(), device=features.device).view_as(features)
    return not torch.equal(head(features + step * moves), head(features))


def grad_cam(features: Tensor, gradient: Tensor) -> Tensor:
    """Class activation map A = sum_k w_k f_k with w_k = mean_hw(ReLU(G_k)).

    The ReLU stands on the gradient, before the mean (the authors' code; Selvaraju et al. 2017 put it on the map).

    Args:
        features: [B, D, h, w].
        gradient: [B, D, h, w] or [B, D, 1, 1], d score_t / d features.

    Returns:
        [B, h, w], of any sign and scale.
    """
    weights = gradient.relu()
    if weights.shape[2:].numel() > 1:  # else one cell stands for all, and the exported graph needs no mean
        weights = weights.mean((2, 3), keepdim=True)
    return (weights * features).sum(1)


def normalized_maxima(cam: Tensor, size: int) -> Tensor:
    """Largest value of each column and of each row of a map that is upsampled and scaled to [0, 1].

    Upsampled to `size` x `size` pixels, bilinear with corners aligned (`F.interpolate`); but between two cells of the
    map a row is straight, so only the first and the last pixel there, its extremes, are computed. Columns and rows are
    computed at once, the map and its transpose side by side.

    Args:
        cam: [B, h, h].
        size: pixels, > 1.

    Returns:
        [B, size, 2]: at each pixel, of the column there (x) and of the row there (y); all 0 where the map is flat.

    Raises:
        ValueError: the map is not square.
    """
    _, cells, width = cam.shape
    if cells != width:
        raise ValueError(f"an attention map of {cells} x {width} cells; expected a square one")
    both = torch.cat((cam, cam.transpose(1, 2)), 2)
    few = _upsample(both, size, extremes=True)  # [B, few, 2h], across the axis that is kept
    lines = few.unflatten(2, (2, cells)).permute(0, 3, 2, 1).flatten(2)  # [B, h, 2few]
    pixels = _upsample(lines, size).unflatten(2, (2, -1))  # [B, size, 2, few]
    maxima = pixels.amax(3)
    low, high = pixels.amin((1, 2, 3), keepdim=True)[..., 0], maxima.amax((1, 2), keepdim=True)
    span = high - low
    flat = span <= FLAT * torch.maximum(high, -low)
    return (maxima - low) / torch.where(flat, torch.inf, span)


def extent_box(kept: Tensor) -> Tensor:
    """Smallest box around all kept pixels, the last kept row and column outside it.

    The end is exclusive *and* the last kept pixel, as in the authors' slice `image[:, y1:y2, x1:x2]`. A box without
    width or height becomes the whole image.

    Args:
        kept: bool [B, S, 2]: columns and rows that hold a kept pixel.

    Returns:
        [B, 4] float32: x0, y0, x1, y1 in pixels, whole numbers, half-open.
    """
    size = kept.shape[1]
    index = torch.arange(size, device=kept.device, dtype=torch.float32)[:, None]
    first = torch.where(kept, index, float(size)).amin(1)
    last = torch.where(kept, index, -1.0).amax(1)
    whole = constant((0.0, 0.0, float(size), float(size)), torch.float32, kept.device)
    usable = (last - first).amin(1, keepdim=True) > 0
    return torch.where(usable, torch.cat((first, last), 1), whole)


def attention_box(cam: Tensor, size: int, threshold: float) -> Tensor:
    """Box around everything that an attention map holds above a share of its range.

    Args:
        cam: [B, h, h].
        size: pixels, the side of the image that the map looks at.
        threshold: in [0, 1); a pixel is kept where the normalized map is at least this.

    Returns:
        [B, 4] float32, see `extent_box`; the whole image where the map is flat.

    Raises:
        ValueError: the map is not square.
    """
    return extent_box(normalized_maxima(cam, size) >= threshold)


def propose_threshold(heatmaps: Tensor, size: int, target: float) -> float:
    """The lowest of 0.05, 0.10 .. 0.95 whose median crop keeps at most `target` of the image; where none does, 0.95.

    Args:
        heatmaps: [N, h, w], attention on validation images.
        size: pixels, the side of the images.
        target: share of the image, in (0, 1].
    """
    candidates = [step / 20 for step in range(1, 20)]
    columns: list[Tensor] = []
    for chunk in heatmaps.split(64):  # to bound memory
        maxima = normalized_maxima(chunk, size)
        boxes = torch.stack([extent_box(maxima >= threshold) for threshold in candidates])
        columns.append((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) / size**2)
    medians = torch.cat(columns, 1).median(1).values.tolist()
    small = (threshold for threshold, area in zip(candidates, medians, strict=True) if area <= target)
    return next(small, candidates[-1])


def crop_resize(image: Tensor, box: Tensor, size: int) -> Tensor:
    """Cut a box out of each image and resize it, bilinear with corners aligned.

    Equals `F.interpolate(image[:, :, y0:y1, x0:x1], (size, size), mode="bilinear", align_corners=True)` image by image:
    output pixel j takes its value at x0 + j (x1 - x0 - 1) / (size - 1). Bilinear weights are separable: columns are
    resampled first, then rows, each time with the axis turned to the front, so that whole lines are copied.

    Args:
        image: [B, 3, H, W], H and W > 1.
        box: [B, 4] float32: x0, y0, x1, y1 in pixels, whole numbers, half-open, not empty.
        size: pixels, > 1.

    Returns:
        [B, 3, size, size]. No gradient reaches `box`.
    """
    height, width = image.shape[2:]
    # One vector holds the columns, then the rows.
    # (No repeat_interleave: exporters up to torch 2.11 cannot write it, or write a wrong shape.)
    is_row = torch.arange(2 * size, device=image.device) >= size
    axis = is_row.long()
    steps = torch.arange(size, device=image.device, dtype=torch.float32).repeat(2)
    before_last = torch.where(is_row, height - 2.0, width - 2.0)
    start, last = box.index_select(1, axis), box.index_select(1, axis + 2) - 1
    # Rounding may push the last position past the box by one ulp; the pixel there is not part of the crop.
    position = torch.minimum(start + steps * ((last - start) / (size - 1)), last)  # [B, 2 size]
    low = torch.minimum(position.floor(), before_last)
    columns, rows = (position - low).to(image.dtype)[:, :, None].split(size, 1)
    # Lines of all images lie in one table, those of each behind those of the one before.
    lines = torch.where(is_row, height, width)
    number = low.long() + torch.arange(image.shape[0], device=image.device)[:, None] * lines
    first_columns, first_rows = number.split(size, 1)
    turned = _between(image.permute(0, 3, 1, 2), first_columns, columns)  # [B, size, 3, H]
    return _between(turned.permute(0, 3, 1, 2), first_rows, rows).permute(0, 3, 1, 2)


def shrink(frame: Tensor, size: int) -> Tensor:
    """Average square blocks of a frame: what the first expert sees where crops are taken from a larger frame.

    Args:
        frame: [B, N, N, 3] floating point, N a multiple of `size`.
        size: pixels, S.

    Returns:
        [B, 3, S, S].
    """
    block = frame.shape[1] // size
    rows = frame.unflatten(1, (size, block)).flatten(3).mean(2)  # rows first: each is one run of memory
    # A pool, since for a mean over an axis that the channels follow ONNX Runtime takes five times as long.
    return F.avg_pool2d(rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2), (1, block))


def whole_view(images: Tensor) -> Tensor:
    """Edges of whole images [B, 3, H, W], in pixels: [B, 4]."""
    height, width = images.shape[2:]
    edges = constant((0.0, 0.0, float(width), float(height)), torch.float32, images.device)
    return edges.expand(images.shape[0], -1)


def compose_view(view: Tensor, box: Tensor, size: int) -> Tensor:
    """Where a box of an expert's image lies in the frame.

    Args:
        view: [B, 4], edges of what the expert saw, in pixels of the frame.
        box: [B, 4], edges in pixels of its image.
        size: pixels, the side of that image.

    Returns:
        [B, 4], edges in pixels of the frame; what `crop_frame` shows there is exactly what lies in the box.
    """
    scale = (view[:, 2:] - view[:, :2]) / size
    return torch.cat((view[:, :2] + box[:, :2] * scale, view[:, :2] + box[:, 2:] * scale), 1)


def crop_frame(frame: Tensor, view: Tensor, size: int) -> Tensor:
    """Cut a part out of a frame and resize it: each pixel is the mean of 2 x 2 bilinear samples.

    Sample j of the 2 S of an axis lies at x0 + (j + 1/2) (x1 - x0) / (2 S), in edge coordinates, so that a view that
    is shrunk up to fourfold has little aliasing, and one that is enlarged is smooth.

    Args:
        frame: [B, N, N, 3] floating point.
        view: [B, 4]: x0, y0, x1, y1, edges in pixels, 0 <= x0 < x1 <= N.
        size: pixels, S.

    Returns:
        [B, 3, S, S]. No gradient reaches `view`.
    """
    steps = (torch.arange(2 * size, device=frame.device, dtype=torch.float32) + 0.5) / (2 * size)
    start, extent = view[:, :2, None], (view[:, 2:] - view[:, :2])[:, :, None]
    position = (start + extent * steps - 0.5).clamp(0, frame.shape[1] - 1)  # [B, 2, 2S]: columns, rows
    low = position.floor().clamp_max(frame.shape[1] - 2)
    fraction = (position - low).to(frame.dtype)[..., None]
    number = low.long() + torch.arange(frame.shape[0], device=frame.device)[:, None, None] * frame.shape[1]
    rows = _between(frame, number[:, 1], fraction[:, 1]).unflatten(1, (size, 2)).mean(2)  # [B, S, N, 3]
    # Turned as one matrix, [B, N, 3, S]: pixel by pixel ONNX Runtime takes six times as long.
    turned = rows.flatten(2).transpose(1, 2).unflatten(1, (-1, 3))
    return _between(turned, number[:, 0], fraction[:, 0]).unflatten(1, (size, 2)).mean(2).permute(0, 2, 3, 1)


def _between(lines: Tensor, low: Tensor, fraction: Tensor) -> Tensor:
    """Between some lines of all images [B, L, a, b] and the next ones, `fraction` of the way: [B, S, a, b].

    `low` [B, S] numbers the lines of all images, `fraction` is [B, S, 1]; at the end of a box 0 of the next is taken.
    A line is copied whole, by one index: as a Gather along the first axis, which every runtime has and can capture.
    """
    table = lines.reshape(-1, lines.shape[2] * lines.shape[3])
    below = F.embedding(low, table)
    return (below + (F.embedding(low + 1, table) - below) * fraction).unflatten(2, lines.shape[2:])


def _upsample(maps: Tensor, size: int, *, extremes: bool = False) -> Tensor:
    """Interpolate axis 1 of maps [B, h, n] at `size` pixels, or at the few that can be extreme: [B, pixels, n]."""
    cells, weights = _taps(maps.shape[1], size, extremes)
    index = constant(cells, torch.int64, maps.device)
    taps = maps.index_select(1, index) * constant(weights, maps.dtype, maps.device)[:, None]
    return taps.unflatten(1, (2, -1)).sum(1)


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values on a device, copied there once: a copy from Python waits for everything that a GPU still has to do."""
    if torch.compiler.is_compiling():  # or exporting: the trace keeps them itself
        return torch.tensor(values, dtype=dtype, device=device)
    return _kept(values, dtype, device)


@cache
@torch.inference_mode(False)  # what is made in inference mode is of no use to training
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@torch.compiler.assume_constant_result  # NumPy is not traced
def _taps(cells: int, size: int, extremes: bool) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return _place(cells, size, extremes)


@cache
def _place(cells: int, size: int, extremes: bool) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Cells below all pixels, then those above, and how much of each; placed as `F.interpolate` with corners aligned.

    `extremes`: only the first and the last pixel between each two cells.
    """
    position = np.arange(size, dtype=np.float32) * (np.float32(cells - 1) / np.float32(size - 1))
    low = np.minimum(position.astype(np.int64), cells - 1)
    high = np.minimum(low + 1, cells - 1)
    above = position - low
    chosen = np.arange(size)
    if extremes:
        first = np.diff(low, prepend=-1) > 0  # pixel at or behind a cell
        first[-1] = True
        chosen = np.flatnonzero(first | np.append(first[1:], True))
    taps = np.concatenate((low[chosen], high[chosen])), np.concatenate((1 - above[chosen], above[chosen]))
    return tuple(taps[0].tolist()), tuple(taps[1].tolist())
