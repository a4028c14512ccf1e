"""Box thresholds chosen by how much of the image the crops keep on validation images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mge.attention import extent_box, normalized_maxima

__all__ = ["CANDIDATES", "crop_report", "median_area", "propose_threshold"]

CANDIDATES = tuple(round(0.05 * step, 2) for step in range(1, 20))  # 0.05 .. 0.95
PROPOSED_AREA = 0.5  # share of its view that a proposed threshold lets a crop keep
FEW_CELLS, GOOD_CELLS = 5, 7  # a side, of an attention map; the paper's 448 px give 14
STRIDE = 32  # pixels, of the features that attention reads
_CHUNK = 64  # maps upsampled at once, to bound memory


def median_area(heatmaps: Tensor, size: int, threshold: float) -> float:
    """Median share of the image, in (0, 1], that the boxes of these maps [N, h, w] keep at a threshold."""
    return float(_areas(heatmaps, size, (threshold,)).median(1).values[0])


def propose_threshold(heatmaps: Tensor, size: int, target: float) -> tuple[float, float]:
    """The lowest candidate whose median crop keeps at most `target` of the image, in (0, 1], or the highest candidate.

    Args:
        heatmaps: [N, h, w], attention on validation images.
        size: pixels, the side of the images.
        target: share of the image.

    Returns:
        The threshold and the median share that it keeps.
    """
    medians = _areas(heatmaps, size, CANDIDATES).median(1).values.tolist()
    for threshold, area in zip(CANDIDATES, medians, strict=True):
        if area <= target:
            return threshold, area
    return CANDIDATES[-1], medians[-1]


def crop_report(heatmaps: Sequence[Tensor], sizes: Sequence[int], thresholds: Sequence[float]) -> Iterator[str]:
    """Say what crops keep, which thresholds would keep half (98 % is no attention), and whether maps are coarse.

    Args:
        heatmaps: one [N, h, w] for each expert, attention on validation images.
        sizes: pixels, the side of each expert's image.
        thresholds: in use, one for each crop; a model without crops has nothing to report.
    """
    for k, (maps, size, used) in enumerate(zip(heatmaps, sizes, thresholds, strict=False), 1):
        threshold, area = propose_threshold(maps, size, PROPOSED_AREA)
        yield (
            f"crop {k}: threshold {used:.2f} keeps a median of {100 * median_area(maps, size, used):.0f} % of its view "
            f"on the validation images, {threshold:.2f} would keep {100 * area:.0f} %"
        )
    if thresholds:
        height, width = heatmaps[0].shape[1:]
        yield f"attention maps: {height} x {width} cells"
        if min(height, width) < FEW_CELLS:
            yield (
                f"hint: so few cells place a crop only roughly; --image-size {GOOD_CELLS * STRIDE} would give "
                f"{GOOD_CELLS} x {GOOD_CELLS}"
            )


def _areas(heatmaps: Tensor, size: int, thresholds: tuple[float, ...]) -> Tensor:
    """Area of every map's box at every threshold: [T, N], shares of the image."""
    columns = []
    for chunk in heatmaps.split(_CHUNK):
        maxima = normalized_maxima(chunk, size)
        boxes = torch.stack([extent_box(maxima >= threshold) for threshold in thresholds])
        columns.append((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) / size**2)
    return torch.cat(columns, 1)
