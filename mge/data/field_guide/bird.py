"""The bird: a body whose looks are drawn from one range for all species, and the head that tells them apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mge.data.field_guide import shapes
from mge.data.field_guide.backdrop import mix
from mge.data.field_guide.canvas import Canvas, Pose
from mge.data.field_guide.shapes import Points
from mge.data.field_guide.species import Colour, Species

__all__ = ["BirdPose", "draw_body", "draw_head", "sample_pose"]

_PLUMAGE: tuple[Colour, ...] = (
    (134, 122, 104),
    (112, 116, 96),
    (128, 128, 132),
    (150, 130, 98),
    (104, 98, 94),
    (142, 144, 124),
)
_PATCHES: tuple[Colour, ...] = ((34, 30, 32), (244, 238, 222), (176, 150, 120), (120, 128, 140))
_DARK: Colour = (34, 30, 32)
_PALE: Colour = (240, 234, 218)

_LENGTHS = (0.45, 0.67)  # of the picture's side
_TILT = np.radians(16)
_HEAD_TURN = np.radians(12)
# A picture may be cut to its central 7/8 on its way to the network (448 of 512): the deciding part stays inside.
_MARGIN = 0.075


@dataclass(frozen=True)
class BirdPose:
    """Where a bird is and how it holds itself."""

    body: Pose
    head: Pose
    part: tuple[float, float, float, float]  # the deciding part: left, top, right, bottom in pixels
    foot: Points  # [2], pixels, between the feet
    plump: float  # the body's height against the outline's


def sample_pose(rng: np.random.Generator, size: int) -> BirdPose:
    """Draw a pose: length, direction, tilt, turn of the head, position; the deciding part lies inside the picture."""
    length = size * rng.uniform(*_LENGTHS)
    mirrored = bool(rng.integers(2))
    tilt, turn = rng.uniform(-_TILT, _TILT), rng.uniform(-_HEAD_TURN, _HEAD_TURN)
    plump = rng.uniform(0.92, 1.12)
    where = rng.uniform(0, 1, 2)

    def at(offset: Points) -> tuple[Pose, Pose]:
        body = Pose.place(offset, length, tilt, mirrored)
        return body, body.joint(shapes.HEAD, turn)

    body, head = at(np.zeros(2))
    part = head.apply(shapes.PART)
    feet = body.apply(_plump(shapes.FEET[:, 1], plump))
    outline = np.concatenate([body.apply(_plump(shapes.BODY, plump)), body.apply(shapes.TAIL), feet, part])
    # The tail may leave the picture by a little.
    low = np.maximum(size * np.array((-0.03, 0.01)) - outline.min(0), _MARGIN * size - part.min(0))
    high = np.minimum(size * np.array((1.03, 0.98)) - outline.max(0), (1 - _MARGIN) * size - part.max(0))
    offset = low + (high - low) * where
    body, head = at(offset)
    part = head.apply(shapes.PART)
    foot = body.apply(_plump(shapes.FEET[:, 1], plump)).mean(0)
    (x0, y0), (x1, y1) = part.min(0), part.max(0)
    return BirdPose(body, head, (float(x0), float(y0), float(x1), float(y1)), foot, plump)


def draw_body(canvas: Canvas, rng: np.random.Generator, pose: BirdPose) -> None:
    """Draw all but the head, in colours that say nothing about the species."""
    plumage = mix(_choose(rng, _PLUMAGE), _choose(rng, _PLUMAGE), rng.uniform(0, 1))
    belly = mix(mix(plumage, _PALE, rng.uniform(0.35, 0.85)), _choose(rng, _PATCHES), rng.uniform(0, 0.25))
    wing = mix(plumage, _DARK, rng.uniform(0.12, 0.5))
    length = float(np.hypot(*pose.body.matrix[0]))

    def fill(points: Points, colour: Colour) -> None:
        canvas.polygon(pose.body.apply(_plump(points, pose.plump)), colour)

    def stroke(points: Points, colour: Colour, width: float) -> None:
        canvas.line(pose.body.apply(_plump(points, pose.plump)), colour, width * length)

    leg = mix((120, 88, 60), _DARK, rng.uniform(0, 0.8))
    for hip, toe in shapes.FEET:
        stroke(np.array([hip, toe]), leg, 0.013)
        stroke(toe + np.array([(-0.025, 0.004), (0.0, 0.0), (0.035, -0.002)]), leg, 0.013)
    fill(shapes.TAIL, mix(wing, _DARK, 0.15))
    stroke(np.array([(-0.24, 0.03), (-0.48, 0.105)]), mix(wing, _DARK, 0.45), 0.008)
    fill(shapes.BODY, plumage)
    fill(shapes.BELLY, belly)
    streak = mix(belly, _DARK, rng.uniform(0.2, 0.6))
    for x, y in rng.uniform((0.02, 0.06), (0.24, 0.14), (int(rng.integers(0, 9)), 2)):
        stroke(np.array([(x, y), (x - 0.012, y + 0.022)]), streak, 0.009)
    fill(shapes.WING, wing)
    patch = mix(_choose(rng, _PATCHES), wing, rng.uniform(0, 0.5))
    for bar in range(int(rng.integers(0, 3))):
        top = np.array([0.1 - 0.075 * bar, -0.075 + 0.014 * bar])
        stroke(top + np.array([(0.0, 0.0), (0.02, 0.055), (0.0, 0.12)]), patch, 0.022)
    dark = mix(wing, _DARK, 0.5)
    for y in (0.025, 0.055, 0.082):
        stroke(np.array([(-0.02 - y, y), (-0.33, 0.088)]), dark, 0.007)


def draw_head(canvas: Canvas, pose: BirdPose, species: Species) -> None:
    """Draw the head. It uses no random number: with one generator, birds of two species differ in the part alone."""

    def fill(points: Points, colour: Colour) -> None:
        canvas.polygon(pose.head.apply(points), colour)

    fill(shapes.BEAKS[species.beak], _DARK)
    fill(shapes.DISC * shapes.HEAD_RADIUS, species.hood)
    if species.ring is not None:
        fill(shapes.EYE + shapes.DISC * shapes.RING_RADIUS, species.ring)
    fill(shapes.EYE + shapes.DISC * shapes.EYE_RADIUS, (18, 14, 16))
    fill(shapes.EYE + (0.008, -0.009) + shapes.DISC * 0.007, (250, 250, 250))


def _plump(points: Points, factor: float) -> Points:
    """Stretch the body downwards from the line of the neck."""
    stretched = np.array(points)
    stretched[..., 1] += (factor - 1) * np.maximum(stretched[..., 1] + 0.1, 0)
    return stretched


def _choose(rng: np.random.Generator, colours: tuple[Colour, ...]) -> Colour:
    return colours[int(rng.integers(len(colours)))]
