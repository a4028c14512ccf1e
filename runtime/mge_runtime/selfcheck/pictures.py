"""The frames that are checked with: photographs that were named, or pictures drawn here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.manifest import Preprocess

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DRAWN", "Frames", "drawn_frames"]

DRAWN = 12  # a batch of eight and a remainder


@dataclass(frozen=True)
class Frames:
    """Frames, and where they come from."""

    frames: NDArray[np.uint8]  # [N, S, S, 3], RGB
    source: str  # for people


def drawn_frames(spec: Preprocess, count: int = DRAWN) -> Frames:
    """Draw soft colour fields with a few bright shapes, the same at every call.

    A network looks at them with less certainty than at photographs, so differences change classes sooner.
    """
    from PIL import Image

    from mge_runtime.preprocess import to_frame

    rng = np.random.default_rng(2019)
    frames: list[NDArray[np.uint8]] = []
    for _ in range(count):
        cells = rng.integers(0, 256, (*rng.integers(3, 9, 2), 3), np.uint8)
        side = spec.resize + int(rng.integers(0, 64))
        picture = np.array(
            Image.fromarray(cells).resize((side + int(rng.integers(0, 64)), side), Image.Resampling.BICUBIC)
        )
        for _ in range(int(rng.integers(1, 4))):
            y, x = rng.integers(0, side // 2, 2)
            height, width = rng.integers(side // 8, side // 2, 2)
            picture[y : y + height, x : x + width] //= 2
            picture[y : y + height, x : x + width] += rng.integers(0, 128, 3, np.uint8)
        frames.append(to_frame(picture, spec)[0])
    return Frames(np.stack(frames), f"{count} drawn pictures; name photographs to check with them")
