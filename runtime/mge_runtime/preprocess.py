"""From a decoded image to the chain's input: resize the shorter side, crop the centre."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.errors import InputError
from mge_runtime.geometry import Viewport
from mge_runtime.spec import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_RESIZED_PIXELS", "crop_resized", "resized_size", "to_frame"]

# Pixels of the whole resized image; a longer strip (256:1 at 512) is resized only where the centre crop needs it.
MAX_RESIZED_PIXELS = 2**26


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
