"""From a seed and a species to one picture with the box of the part that decides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge.data.field_guide.backdrop import draw_backdrop, draw_branch, draw_foliage, draw_ground
from mge.data.field_guide.bird import draw_body, draw_head, sample_pose
from mge.data.field_guide.canvas import Canvas
from mge.data.field_guide.species import Species

__all__ = ["Plate", "draw_plate"]


@dataclass(frozen=True)
class Plate:
    """One picture of the guide."""

    image: NDArray[np.uint8]  # [size, size, 3], RGB
    part: tuple[int, int, int, int]  # the deciding part (head and beak): x0, y0, x1, y1 in pixels, half-open


def draw_plate(rng: np.random.Generator, species: Species, size: int) -> Plate:
    """Draw one bird of the species, `size` pixels a side.

    All randomness comes from `rng`, in the same order for every species: two species drawn from equal generators differ
    inside the part's box and nowhere else.
    """
    pose = sample_pose(rng, size)
    left, top, right, bottom = pose.part
    canvas = Canvas(draw_backdrop(rng), size)
    perch = draw_branch if rng.uniform() < 0.7 else draw_ground
    draw_foliage(canvas, rng, size, int(rng.integers(0, 8)), (-1.0, -1.0, -1.0, -1.0))
    perch(canvas, rng, pose.foot, size)
    draw_body(canvas, rng, pose)
    draw_head(canvas, pose, species)
    draw_foliage(canvas, rng, size, int(rng.integers(0, 7)), (left - 1, top - 1, right + 1, bottom + 1))
    image = _develop(np.asarray(canvas.finish()), rng)
    x0, y0 = max(0, int(np.floor(left))), max(0, int(np.floor(top)))
    return Plate(image, (x0, y0, min(size, int(np.ceil(right))), min(size, int(np.ceil(bottom)))))


def _develop(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light the picture from one side, tint it and add the noise of a sensor."""
    size = picture.shape[0]
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    gain = rng.uniform(0.78, 1.15) * rng.uniform(0.94, 1.06, 3)
    slope = np.linspace(-depth, depth, size, dtype=np.float32)
    light = 1 + np.float32(np.cos(angle)) * slope[None, :] + np.float32(np.sin(angle)) * slope[:, None]
    noise = rng.standard_normal((size, size, 3), dtype=np.float32)
    noise *= np.float32(rng.uniform(1.5, 7.0))
    noise += picture * light[:, :, None] * gain.astype(np.float32)
    return np.clip(np.rint(noise, out=noise), 0, 255, out=noise).astype(np.uint8)
