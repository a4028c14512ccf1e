"""The way from a decoded image to the chain's input, and of boxes in it back to pixels of the image.

Positions are *edge coordinates*: pixel j covers [j, j + 1], its center lies at j + 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.decode import rgb_array
from mge_runtime.manifest import Crops, Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image


# Pixels of the whole resized image; a longer strip (256:1 at 512) is resized only where the center crop needs it.
MAX_RESIZED_PIXELS = 2**26


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


def to_frame(image: np.ndarray | Image, spec: Preprocess) -> tuple[np.ndarray, Viewport]:
    """Resize the shorter side to `spec.resize` and crop the center `spec.size` x `spec.size`.

    Byte for byte what torchvision's `Resize(spec.resize)` and `CenterCrop(spec.size)` do to a Pillow image: bilinear
    with antialiasing, the longer side truncated to whole pixels, the crop's corner rounded half to even. (Strips whose
    resized form would exceed `MAX_RESIZED_PIXELS` are equal within one gray level and need no such memory.)

    Args:
        image: uint8 RGB [H, W, 3] or a Pillow image of mode RGB, any size from 1 x 1.
        spec: sides in pixels, 1 <= size <= resize.

    Returns:
        The frame, uint8 [S, S, 3], C-contiguous, and where it lies in `image`.

    Raises:
        InputError: the array is of another type or shape.
    """
    from PIL.Image import fromarray

    if isinstance(image, np.ndarray):
        image = fromarray(rgb_array(image))
    size, (width, height) = spec.size, image.size
    resized = resized_size(width, height, spec.resize)
    left, top = (round((side - size) / 2) for side in resized)
    frame = crop_resized(image, resized, (left, top), size)
    x, y = width / resized[0], height / resized[1]  # source pixels for one resized pixel
    return frame, Viewport(left * x, top * y, (left + size) * x, (top + size) * y, width, height)


def crop_resized(image: Image, resized: tuple[int, int], corner: tuple[int, int], size: int) -> np.ndarray:
    """Resize to `resized` (width, height) and cut `size` x `size` at `corner` (left, top): uint8 [size, size, 3]."""
    from PIL.Image import Resampling

    (width, height), (left, top) = resized, corner
    if width * height <= MAX_RESIZED_PIXELS:
        whole = image.resize(resized, Resampling.BILINEAR)
        return np.array(whole.crop((left, top, left + size, top + size)))
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return np.array(image.resize((size, size), Resampling.BILINEAR, box=box))


def resized_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height with the shorter side at `side`; torchvision truncates the longer one."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def compose_boxes(boxes: np.ndarray, viewport: Viewport, crops: Crops) -> np.ndarray:
    """Find what each expert saw, in pixels of the source image.

    Where crops are cut from the frame, each box is in its pixels. Else box k is half-open in pixels of view k: its crop
    `image[y0:y1, x0:x1]` is resized to the S pixels of view k + 1 with align_corners=True, so pixel center j there lies
    on pixel center x0 + j * (x1 - x0 - 1) / (S - 1) of view k; in edge coordinates e:
    x0 + 0.5 + (e - 0.5) * (x1 - x0 - 1) / (S - 1), clipped to [x0, x1]. (A crop one pixel wide stays that pixel.) So
    boxes nest and none is empty.

    Args:
        boxes: [K - 1, 4] (x0, y0, x1, y1), none empty; of fewer experts than there are where the chain stopped.
        viewport: where the frame lies in the source image.
        crops: what they are pixels of.

    Returns:
        float32 [K, 4]; the first row is what the frame shows.
    """
    boxes = np.asarray(boxes, np.float64)
    size = crops.frame or crops.sizes[0]
    seen = [np.array([0.0, 0.0, size, size])]
    for k, edges in enumerate(boxes):  # edges of view k + 2, first in pixels of view k + 1, then of each earlier view
        for number in range(k)[::-1] if not crops.frame else ():
            edges = _to_outer(edges, boxes[number], crops.sizes[number + 1])
        seen.append(edges)
    return viewport.to_source(np.stack(seen), size).astype(np.float32)


def _to_outer(edges: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Map edges [4] in pixels of a view of `size` pixels to pixels of the view that `box` [4] cut it from."""
    low, high = np.tile(box[:2], 2), np.tile(box[2:], 2)
    outer = np.clip(low + 0.5 + (edges - 0.5) * (high - low - 1) / (size - 1), low, high)
    # One pixel spread over a whole view: every part of the view shows that pixel.
    return np.where(high - low <= 1, box, outer)
