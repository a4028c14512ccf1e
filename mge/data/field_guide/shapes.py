"""The outlines of a bird and of leaves, in units of the bird's length.

A bird faces right, x grows to the right and y downwards; from the tip of the beak (x = 0.5) to the tip of the tail
(x = -0.5) it is one unit long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BEAKS",
    "BELLY",
    "BODY",
    "DISC",
    "EYE",
    "EYE_RADIUS",
    "FEET",
    "HEAD",
    "HEAD_RADIUS",
    "LEAF",
    "PART",
    "RING_RADIUS",
    "TAIL",
    "WING",
    "Points",
]

Points = NDArray[np.floating[Any]]  # [n, 2], x and y

HEAD = np.array([0.31, -0.165])  # the head's centre; the head turns around it
HEAD_RADIUS = 0.115
EYE = np.array([0.038, -0.016])  # from the head's centre
EYE_RADIUS = 0.024
RING_RADIUS = 0.048


def _smooth(points: list[tuple[float, float]], steps: int = 6) -> Points:
    """Return a closed Catmull-Rom curve through the points, `steps` straight pieces between two of them."""
    knots = np.array(points)
    before, after, beyond = np.roll(knots, 1, 0), np.roll(knots, -1, 0), np.roll(knots, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    p0, p1, p2, p3 = (array[:, None, :] for array in (before, knots, after, beyond))
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return curve.reshape(-1, 2)


def _arc(radius: float, start: float, stop: float, steps: int) -> Points:
    """Return points on a circle around the origin, angles in degrees, counted clockwise from the right."""
    angles = np.radians(np.linspace(start, stop, steps))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


DISC = _arc(1.0, 0, 345, 24)
BODY = _smooth(
    [
        (0.25, -0.24),
        (0.16, -0.155),
        (0.02, -0.115),
        (-0.12, -0.06),
        (-0.27, 0.015),
        (-0.27, 0.07),
        (-0.14, 0.125),
        (0.01, 0.175),
        (0.15, 0.17),
        (0.27, 0.1),
        (0.335, 0.0),
        (0.385, -0.11),
    ]
)
BELLY = _smooth(
    [
        (0.36, -0.095),
        (0.3, -0.04),
        (0.2, 0.04),
        (0.0, 0.1),
        (-0.2, 0.085),
        (-0.12, 0.122),
        (0.01, 0.17),
        (0.15, 0.165),
        (0.262, 0.1),
        (0.325, 0.0),
    ]
)
WING = _smooth(
    [
        (0.2, -0.055),
        (0.12, -0.095),
        (-0.03, -0.06),
        (-0.2, 0.01),
        (-0.37, 0.095),
        (-0.2, 0.085),
        (0.0, 0.1),
        (0.14, 0.06),
    ]
)
TAIL = np.array([(-0.2, -0.02), (-0.49, 0.075), (-0.478, 0.11), (-0.5, 0.14), (-0.22, 0.085)])
FEET = np.array([[(0.0, 0.15), (0.02, 0.24)], [(0.06, 0.16), (0.085, 0.24)]])  # two legs, each from the hip to the toe
LEAF = _smooth([(0.0, 0.0), (0.35, -0.17), (0.75, -0.12), (1.0, 0.0), (0.75, 0.12), (0.35, 0.17)], steps=3)

# From the head's centre.
BEAKS: dict[str, Points] = {
    "warbler": np.array([(0.102, -0.024), (0.135, -0.008), (0.168, 0.01), (0.135, 0.018), (0.102, 0.022)]),
    "finch": np.array([(0.088, -0.058), (0.125, -0.038), (0.156, 0.012), (0.122, 0.042), (0.088, 0.056)]),
    "creeper": np.array(
        [(0.1, -0.03), (0.138, -0.022), (0.165, 0.018), (0.167, 0.07), (0.146, 0.034), (0.125, 0.014), (0.1, 0.014)]
    ),
}

# What decides, from the head's centre: the head and room for any beak. The same for every species, so that its box says
# nothing about the class.
PART = np.concatenate([HEAD_RADIUS * DISC, [(0.088, -0.058), (0.168, 0.008), (0.167, 0.07)]])
