"""A drawing surface with an affine map: outlines go in in their own units and come out antialiased by oversampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mge.data.field_guide.shapes import Points
from mge.data.field_guide.species import Colour

__all__ = ["OVERSAMPLING", "Canvas", "Pose"]

OVERSAMPLING = 4  # canvas pixels per pixel of the finished picture, along each side


@dataclass(frozen=True)
class Pose:
    """A map from an outline's own units to pixels of the finished picture: `points @ matrix + offset`."""

    matrix: Points  # [2, 2]
    offset: Points  # [2], pixels

    @staticmethod
    def place(offset: Points, length: float, angle: float = 0.0, mirrored: bool = False) -> Pose:
        """Return the pose that scales by `length` pixels, turns by `angle` radians (clockwise) and then mirrors x."""
        cosine, sine = length * np.cos(angle), length * np.sin(angle)
        side = -1.0 if mirrored else 1.0
        return Pose(np.array([[side * cosine, sine], [-side * sine, cosine]]), np.asarray(offset))

    def apply(self, points: Points) -> Points:
        """Map points [n, 2] of the outline to pixels of the finished picture [n, 2]."""
        return points @ self.matrix + self.offset

    def joint(self, at: Points, angle: float) -> Pose:
        """Return the pose of a limb whose origin is fixed at `at` (own units) and that is turned by `angle` radians."""
        turn = Pose.place(np.zeros(2), 1.0, angle).matrix
        return Pose(turn @ self.matrix, at @ self.matrix + self.offset)


class Canvas:
    """A square RGB picture under construction, `size` pixels a side when finished."""

    def __init__(self, background: Image.Image, size: int) -> None:
        side = size * OVERSAMPLING
        smooth = background.resize((size, size), Image.Resampling.BICUBIC)
        self._image = smooth.resize((side, side), Image.Resampling.NEAREST)  # `finish` averages each block back
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: Points, colour: Colour) -> None:
        """Fill the polygon whose corners are given in pixels of the finished picture, [n, 2]."""
        self._draw.polygon((points * OVERSAMPLING).ravel().tolist(), fill=colour)

    def line(self, points: Points, colour: Colour, width: float) -> None:
        """Draw a chain of strokes through points [n, 2]; all lengths in pixels of the finished picture."""
        self._draw.line(
            (points * OVERSAMPLING).ravel().tolist(), fill=colour, width=max(1, round(width * OVERSAMPLING))
        )

    def finish(self) -> Image.Image:
        """Return the antialiased picture."""
        return self._image.reduce(OVERSAMPLING)
