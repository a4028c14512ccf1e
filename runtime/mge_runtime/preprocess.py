"""From a decoded image to the chain's input, and from boxes in it back to pixels of the image.

Positions are *edge coordinates*: pixel j covers [j, j + 1], its centre lies at j + 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.errors import InputError
from mge_runtime.manifest import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_RESIZED_PIXELS", "Viewport", "compose_boxes", "crop_resized", "resized_size", "to_frame"]

# Pixels of the whole resized image; a longer strip (256:1 at 512) is resized only where the centre crop needs it.
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
    """Resize the shorter side to `spec.resize` and crop the centre `spec.size` x `spec.size`.

    Byte for byte what torchvision's `Resize(spec.resize)` and `CenterCrop(spec.size)` do to a Pillow image: bilinear
    with antialiasing, the longer side truncated to whole pixels, the crop's corner rounded half to even. (Strips whose
    resized form would exceed `MAX_RESIZED_PIXELS` are equal within one grey level and need no such memory.)

    Args:
        image: uint8 RGB [H, W, 3] or a Pillow image of mode RGB, any size from 1 x 1.
        spec: sides in pixels, 1 <= size <= resize.

    Returns:
        The frame, uint8 [S, S, 3], C-contiguous, and where it lies in `image`.

    Raises:
        InputError: `image` is neither, or `spec` is out of range.
    """
    picture = _picture(image)
    size = spec.size
    if not 1 <= size <= spec.resize:
        raise InputError(f"cannot crop {size} of a side resized to {spec.resize}; expected 1 <= size <= resize")
    width, height = picture.size
    new_width, new_height = resized_size(width, height, spec.resize)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    scale_x, scale_y = width / new_width, height / new_height
    box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
    frame = crop_resized(picture, (new_width, new_height), (left, top), size)
    return frame, Viewport(*box, width=width, height=height)


def crop_resized(picture: Image, resized: tuple[int, int], corner: tuple[int, int], size: int) -> np.ndarray:
    """Resize to `resized` (width, height) and cut `size` x `size` at `corner` (left, top): uint8 [size, size, 3]."""
    from PIL.Image import Resampling

    (width, height), (left, top) = resized, corner
    if width * height <= MAX_RESIZED_PIXELS:
        whole = picture.resize(resized, Resampling.BILINEAR)
        return np.array(whole.crop((left, top, left + size, top + size)))
    x, y = picture.width / width, picture.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return np.array(picture.resize((size, size), Resampling.BILINEAR, box=box))


def _picture(image: np.ndarray | Image) -> Image:
    from PIL.Image import fromarray

    if not isinstance(image, np.ndarray):
        if image.mode != "RGB":
            raise InputError(f"cannot make a frame of a Pillow image of mode {image.mode}; expected RGB")
        return image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(
            f"cannot make a frame of type {image.dtype} and shape {list(image.shape)}; expected uint8 RGB [H, W, 3]"
        )
    return fromarray(image)


def resized_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height with the shorter side at `side`; torchvision truncates the longer one."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


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
