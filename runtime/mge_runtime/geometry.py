"""Where the pixels of the frame and of every expert's view lie in the source image.

Positions are *edge coordinates*: pixel j covers [j, j + 1], its centre lies at j + 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mge_runtime.errors import InputError

__all__ = ["Viewport", "compose_boxes"]


@dataclass(frozen=True)
class Viewport:
    """The rectangle of the source image that the frame shows, an axis-aligned affine map."""

    left: float  # source pixels, edge coordinate of the frame's left edge; slightly off an integer by the resizing
    top: float  # source pixels
    right: float  # source pixels, > left
    bottom: float  # source pixels, > top
    width: int  # pixels of the whole source image (upright, after EXIF orientation)
    height: int  # pixels of the whole source image

    def to_source(self, boxes: np.ndarray, size: int) -> np.ndarray:
        """Map boxes from the frame to the source image.

        Args:
            boxes: [..., 4] (x0, y0, x1, y1), edge coordinates in pixels of the frame.
            size: side of the frame in pixels.

        Returns:
            float64 [..., 4] in pixels of the source image.
        """
        scale_x, scale_y = (self.right - self.left) / size, (self.bottom - self.top) / size
        scale = np.array([scale_x, scale_y, scale_x, scale_y])
        return np.asarray(boxes, np.float64) * scale + np.array([self.left, self.top, self.left, self.top])


def compose_boxes(boxes: np.ndarray, viewport: Viewport, size: int) -> np.ndarray:
    """Find what each expert saw, in pixels of the source image.

    Box k is half-open in pixels of view k: its crop `image[y0:y1, x0:x1]` is resized to `size` x `size` with
    align_corners=True, so pixel centre j of view k + 1 lies on pixel centre x0 + j * (x1 - x0 - 1) / (size - 1) of
    view k; in edge coordinates e: x0 + 0.5 + (e - 0.5) * (x1 - x0 - 1) / (size - 1), clipped to [x0, x1].
    (A crop one pixel wide stays that pixel.) So boxes nest and none is empty.

    Args:
        boxes: [K - 1, 4] (x0, y0, x1, y1); row k in pixels of view k, 0 <= x0 < x1 <= size.
        viewport: where view 1, the frame, lies in the source image.
        size: side of every view in pixels, at least 2.

    Returns:
        float32 [K, 4]; the first row is what the frame shows.

    Raises:
        InputError: `boxes` has another shape, or `size` is below 2.
    """
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(f"cannot compose boxes of shape {list(boxes.shape)}; expected [K - 1, 4]")
    if size < 2:
        raise InputError(f"cannot compose boxes in views of {size} pixels; expected at least 2")
    seen = np.empty((len(boxes) + 1, 4))
    seen[0] = (0, 0, size, size)
    for k in range(len(boxes)):
        view = boxes[k]  # edges of view k + 2, first in pixels of view k + 1, then of each earlier view
        for earlier in boxes[:k][::-1]:
            view = _to_outer(view, earlier, size)
        seen[k + 1] = view
    return viewport.to_source(seen, size).astype(np.float32)


def _to_outer(edges: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Map edges [4] in pixels of a view to pixels of the view that `box` [4] cut it from."""
    low, high = np.tile(box[:2], 2), np.tile(box[2:], 2)
    outer = np.clip(low + 0.5 + (edges - 0.5) * (high - low - 1) / (size - 1), low, high)
    # One pixel spread over a whole view: every part of the view shows that pixel.
    return np.where(high - low <= 1, box, outer)
