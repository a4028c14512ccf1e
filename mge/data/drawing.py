"""Drawn birds of the field guide: from a seed and a species to one image with the box of the part that decides.

Outlines are in units of the bird's length and come out antialiased by oversampling. A bird faces right, x grows to the
right and y downwards; from the tip of the beak (x = 0.5) to the tip of the tail (x = -0.5) it is one unit long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]  # RGB, 0..255
Points = NDArray[np.floating[Any]]  # [n, 2], x and y

OVERSAMPLING = 4  # canvas pixels per pixel of the finished image, along each side

# Colors that say nothing about the species.
# fmt: off
_PLUMAGE: tuple[Color, ...] = (
    (134, 122, 104), (112, 116, 96), (128, 128, 132), (150, 130, 98), (104, 98, 94), (142, 144, 124),
)
_PATCHES: tuple[Color, ...] = ((34, 30, 32), (244, 238, 222), (176, 150, 120), (120, 128, 140))
_DARK: Color = (34, 30, 32)
_PALE: Color = (240, 234, 218)
# Top and bottom of the far background, then what floats in it.
_MOODS: tuple[tuple[Color, Color, tuple[Color, ...]], ...] = (
    ((181, 199, 211), (127, 145, 118), ((95, 117, 85), (138, 156, 114), (206, 213, 197))),
    ((115, 135, 106), (66, 82, 64), ((86, 108, 77), (145, 160, 117), (48, 63, 49))),
    ((213, 204, 187), (159, 139, 112), ((173, 146, 107), (202, 180, 142), (133, 112, 93))),
    ((209, 214, 217), (161, 165, 168), ((181, 185, 188), (135, 141, 142), (227, 229, 229))),
    ((221, 205, 198), (148, 139, 149), ((188, 171, 175), (226, 213, 199), (121, 117, 130))),
)
_LEAVES: tuple[Color, ...] = (
    (70, 112, 52), (104, 140, 62), (52, 88, 56), (150, 152, 70), (172, 120, 56), (126, 84, 48),
)
# Berries wear the colors of hoods and eye rings, so that a color somewhere in the image decides nothing.
_BERRIES: tuple[Color, ...] = (
    (26, 24, 28), (186, 68, 28), (240, 196, 40), (44, 112, 206), (255, 255, 250), (226, 32, 40),
)
_BARK: tuple[Color, ...] = ((104, 84, 66), (82, 72, 64), (132, 112, 90), (92, 64, 48))
# fmt: on


@dataclass(frozen=True)
class Species:
    """One class of the field guide."""

    name: str  # the class's folder: lower-case words joined by "-"
    hood: Color  # the plumage of the head
    ring: Color | None  # the ring around the eye; None: no ring
    beak: str  # a key of BEAKS: "warbler" (thin), "finch" (cone) or "creeper" (long, bent down)


@dataclass(frozen=True)
class Plate:
    """One image of the guide."""

    image: NDArray[np.uint8]  # [size, size, 3], RGB
    part: tuple[int, int, int, int]  # the deciding part (head and beak): x0, y0, x1, y1 in pixels, half-open


def draw_plate(rng: np.random.Generator, species: Species, size: int) -> Plate:
    """Draw one bird of the species, `size` pixels a side.

    All randomness comes from `rng`, in the same order for every species: two species drawn from equal generators differ
    inside the part's box and nowhere else.
    """
    pose = _sample_pose(rng, size)
    left, top, right, bottom = pose.part
    canvas = Canvas(_draw_backdrop(rng), size)
    perch = _draw_branch if rng.uniform() < 0.7 else _draw_ground
    _draw_foliage(canvas, rng, size, int(rng.integers(0, 8)), (-1.0, -1.0, -1.0, -1.0))
    perch(canvas, rng, pose.foot, size)
    _draw_body(canvas, rng, pose)
    _draw_head(canvas, pose, species)
    _draw_foliage(canvas, rng, size, int(rng.integers(0, 7)), (left - 1, top - 1, right + 1, bottom + 1))
    image = _develop(np.asarray(canvas.finish()), rng)
    x0, y0 = max(0, int(np.floor(left))), max(0, int(np.floor(top)))
    return Plate(image, (x0, y0, min(size, int(np.ceil(right))), min(size, int(np.ceil(bottom)))))


def _develop(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light the image from one side, tint it and add the noise of a sensor."""
    size = image.shape[0]
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    gain = rng.uniform(0.78, 1.15) * rng.uniform(0.94, 1.06, 3)
    slope = np.linspace(-depth, depth, size, dtype=np.float32)
    light = 1 + np.float32(np.cos(angle)) * slope[None, :] + np.float32(np.sin(angle)) * slope[:, None]
    noise = rng.standard_normal((size, size, 3), dtype=np.float32)
    noise *= np.float32(rng.uniform(1.5, 7.0))
    noise += image * light[:, :, None] * gain.astype(np.float32)
    return np.clip(np.rint(noise, out=noise), 0, 255, out=noise).astype(np.uint8)


@dataclass(frozen=True)
class Pose:
    """A map from an outline's own units to pixels of the finished image: `points @ matrix + offset`."""

    matrix: Points  # [2, 2]
    offset: Points  # [2], pixels

    @staticmethod
    def place(offset: Points, length: float, angle: float = 0.0, mirrored: bool = False) -> Pose:
        """Return the pose that scales by `length` pixels, turns by `angle` radians (clockwise) and then mirrors x."""
        cosine, sine = length * np.cos(angle), length * np.sin(angle)
        side = -1.0 if mirrored else 1.0
        return Pose(np.array([[side * cosine, sine], [-side * sine, cosine]]), np.asarray(offset))

    def apply(self, points: Points) -> Points:
        """Map points [n, 2] of the outline to pixels of the finished image [n, 2]."""
        return points @ self.matrix + self.offset

    def joint(self, at: Points, angle: float) -> Pose:
        """Return the pose of a limb whose origin is fixed at `at` (own units) and that is turned by `angle` radians."""
        turn = Pose.place(np.zeros(2), 1.0, angle).matrix
        return Pose(turn @ self.matrix, at @ self.matrix + self.offset)


class Canvas:
    """A square RGB image under construction, `size` pixels a side when finished."""

    def __init__(self, background: Image.Image, size: int) -> None:
        side = size * OVERSAMPLING
        smooth = background.resize((size, size), Image.Resampling.BICUBIC)
        self._image = smooth.resize((side, side), Image.Resampling.NEAREST)  # `finish` averages each block back
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: Points, color: Color) -> None:
        """Fill the polygon whose corners are given in pixels of the finished image, [n, 2]."""
        self._draw.polygon((points * OVERSAMPLING).ravel().tolist(), fill=color)

    def line(self, points: Points, color: Color, width: float) -> None:
        """Draw a chain of strokes through points [n, 2]; all lengths in pixels of the finished image."""
        self._draw.line((points * OVERSAMPLING).ravel().tolist(), fill=color, width=max(1, round(width * OVERSAMPLING)))

    def finish(self) -> Image.Image:
        """Return the antialiased image."""
        return self._image.reduce(OVERSAMPLING)


def _smooth(points: list[tuple[float, float]], steps: int = 6) -> Points:
    """Return a closed Catmull-Rom curve through the points, `steps` straight pieces between two of them."""
    knots = np.array(points)
    before, after, beyond = np.roll(knots, 1, 0), np.roll(knots, -1, 0), np.roll(knots, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    p0, p1, p2, p3 = (array[:, None, :] for array in (before, knots, after, beyond))
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return curve.reshape(-1, 2)


HEAD = np.array([0.31, -0.165])  # the head's center; the head turns around it
HEAD_RADIUS = 0.115
EYE = np.array([0.038, -0.016])  # from the head's center
EYE_RADIUS = 0.024
RING_RADIUS = 0.048
_ANGLES = np.radians(np.linspace(0, 345, 24))
DISC = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
# fmt: off
BODY = _smooth([
    (0.25, -0.24), (0.16, -0.155), (0.02, -0.115), (-0.12, -0.06), (-0.27, 0.015), (-0.27, 0.07),
    (-0.14, 0.125), (0.01, 0.175), (0.15, 0.17), (0.27, 0.1), (0.335, 0.0), (0.385, -0.11),
])
BELLY = _smooth([
    (0.36, -0.095), (0.3, -0.04), (0.2, 0.04), (0.0, 0.1), (-0.2, 0.085),
    (-0.12, 0.122), (0.01, 0.17), (0.15, 0.165), (0.262, 0.1), (0.325, 0.0),
])
WING = _smooth([
    (0.2, -0.055), (0.12, -0.095), (-0.03, -0.06), (-0.2, 0.01),
    (-0.37, 0.095), (-0.2, 0.085), (0.0, 0.1), (0.14, 0.06),
])
TAIL = np.array([(-0.2, -0.02), (-0.49, 0.075), (-0.478, 0.11), (-0.5, 0.14), (-0.22, 0.085)])
FEET = np.array([[(0.0, 0.15), (0.02, 0.24)], [(0.06, 0.16), (0.085, 0.24)]])  # two legs, each from the hip to the toe
LEAF = _smooth([(0.0, 0.0), (0.35, -0.17), (0.75, -0.12), (1.0, 0.0), (0.75, 0.12), (0.35, 0.17)], steps=3)
BEAKS: dict[str, Points] = {  # from the head's center
    "warbler": np.array([(0.102, -0.024), (0.135, -0.008), (0.168, 0.01), (0.135, 0.018), (0.102, 0.022)]),
    "finch": np.array([(0.088, -0.058), (0.125, -0.038), (0.156, 0.012), (0.122, 0.042), (0.088, 0.056)]),
    "creeper": np.array([
        (0.1, -0.03), (0.138, -0.022), (0.165, 0.018), (0.167, 0.07), (0.146, 0.034), (0.125, 0.014), (0.1, 0.014),
    ]),
}
# fmt: on
# What decides, from the head's center: the head and room for any beak. The same for every species, so that its box says
# nothing about the class.
PART = np.concatenate([HEAD_RADIUS * DISC, [(0.088, -0.058), (0.168, 0.008), (0.167, 0.07)]])


def _mix(first: Color, second: Color, share: float) -> Color:
    """Return the color `share` of the way from the first to the second, share in 0..1."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _pick(rng: np.random.Generator, colors: tuple[Color, ...]) -> Color:
    return colors[int(rng.integers(len(colors)))]


def _vary(rng: np.random.Generator, color: Color, spread: float = 14.0) -> Color:
    shifts = rng.uniform(-spread, spread, 3).tolist()
    red, green, blue = (int(min(max(c + shift, 0.0), 255.0)) for c, shift in zip(color, shifts, strict=True))
    return red, green, blue


_LENGTHS = (0.45, 0.67)  # of the image's side
_TILT = np.radians(16)
_HEAD_TURN = np.radians(12)
# An image may be cut to its central 7/8 on its way to the network (448 of 512): the deciding part stays inside.
_MARGIN = 0.075


@dataclass(frozen=True)
class BirdPose:
    """Where a bird is and how it holds itself."""

    body: Pose
    head: Pose
    part: tuple[float, float, float, float]  # the deciding part: left, top, right, bottom in pixels
    foot: Points  # [2], pixels, between the feet
    plump: float  # the body's height against the outline's


def _sample_pose(rng: np.random.Generator, size: int) -> BirdPose:
    """Draw a pose: length, direction, tilt, turn of the head, position; the deciding part lies inside the image."""
    length = size * rng.uniform(*_LENGTHS)
    mirrored = bool(rng.integers(2))
    tilt, turn = rng.uniform(-_TILT, _TILT), rng.uniform(-_HEAD_TURN, _HEAD_TURN)
    plump = rng.uniform(0.92, 1.12)
    where = rng.uniform(0, 1, 2)

    def at(offset: Points) -> tuple[Pose, Pose]:
        body = Pose.place(offset, length, tilt, mirrored)
        return body, body.joint(HEAD, turn)

    body, head = at(np.zeros(2))
    part = head.apply(PART)
    feet = body.apply(_plump(FEET[:, 1], plump))
    outline = np.concatenate([body.apply(_plump(BODY, plump)), body.apply(TAIL), feet, part])
    # The tail may leave the image by a little.
    low = np.maximum(size * np.array((-0.03, 0.01)) - outline.min(0), _MARGIN * size - part.min(0))
    high = np.minimum(size * np.array((1.03, 0.98)) - outline.max(0), (1 - _MARGIN) * size - part.max(0))
    offset = low + (high - low) * where
    body, head = at(offset)
    part = head.apply(PART)
    foot = body.apply(_plump(FEET[:, 1], plump)).mean(0)
    (x0, y0), (x1, y1) = part.min(0), part.max(0)
    return BirdPose(body, head, (float(x0), float(y0), float(x1), float(y1)), foot, plump)


def _draw_body(canvas: Canvas, rng: np.random.Generator, pose: BirdPose) -> None:
    """Draw all but the head, in colors that say nothing about the species."""
    plumage = _mix(_pick(rng, _PLUMAGE), _pick(rng, _PLUMAGE), rng.uniform(0, 1))
    belly = _mix(_mix(plumage, _PALE, rng.uniform(0.35, 0.85)), _pick(rng, _PATCHES), rng.uniform(0, 0.25))
    wing = _mix(plumage, _DARK, rng.uniform(0.12, 0.5))
    length = float(np.hypot(*pose.body.matrix[0]))

    def fill(points: Points, color: Color) -> None:
        canvas.polygon(pose.body.apply(_plump(points, pose.plump)), color)

    def stroke(points: Points, color: Color, width: float) -> None:
        canvas.line(pose.body.apply(_plump(points, pose.plump)), color, width * length)

    leg = _mix((120, 88, 60), _DARK, rng.uniform(0, 0.8))
    for hip, toe in FEET:
        stroke(np.array([hip, toe]), leg, 0.013)
        stroke(toe + np.array([(-0.025, 0.004), (0.0, 0.0), (0.035, -0.002)]), leg, 0.013)
    fill(TAIL, _mix(wing, _DARK, 0.15))
    stroke(np.array([(-0.24, 0.03), (-0.48, 0.105)]), _mix(wing, _DARK, 0.45), 0.008)
    fill(BODY, plumage)
    fill(BELLY, belly)
    streak = _mix(belly, _DARK, rng.uniform(0.2, 0.6))
    for x, y in rng.uniform((0.02, 0.06), (0.24, 0.14), (int(rng.integers(0, 9)), 2)):
        stroke(np.array([(x, y), (x - 0.012, y + 0.022)]), streak, 0.009)
    fill(WING, wing)
    patch = _mix(_pick(rng, _PATCHES), wing, rng.uniform(0, 0.5))
    for bar in range(int(rng.integers(0, 3))):
        top = np.array([0.1 - 0.075 * bar, -0.075 + 0.014 * bar])
        stroke(top + np.array([(0.0, 0.0), (0.02, 0.055), (0.0, 0.12)]), patch, 0.022)
    dark = _mix(wing, _DARK, 0.5)
    for y in (0.025, 0.055, 0.082):
        stroke(np.array([(-0.02 - y, y), (-0.33, 0.088)]), dark, 0.007)


def _draw_head(canvas: Canvas, pose: BirdPose, species: Species) -> None:
    """Draw the head. It uses no random number: with one generator, birds of two species differ in the part alone."""

    def fill(points: Points, color: Color) -> None:
        canvas.polygon(pose.head.apply(points), color)

    fill(BEAKS[species.beak], _DARK)
    fill(DISC * HEAD_RADIUS, species.hood)
    if species.ring is not None:
        fill(EYE + DISC * RING_RADIUS, species.ring)
    fill(EYE + DISC * EYE_RADIUS, (18, 14, 16))
    fill(EYE + (0.008, -0.009) + DISC * 0.007, (250, 250, 250))


def _plump(points: Points, factor: float) -> Points:
    """Stretch the body downwards from the line of the neck."""
    stretched = np.array(points)
    stretched[..., 1] += (factor - 1) * np.maximum(stretched[..., 1] + 0.1, 0)
    return stretched


def _draw_backdrop(rng: np.random.Generator) -> Image.Image:
    """Return a small image of what is out of focus, to be enlarged to the canvas."""
    side = 40  # pixels: what is out of focus needs no more
    top, bottom, floating = _MOODS[int(rng.integers(len(_MOODS)))]
    ramp = np.linspace(0, 1, side)[:, None, None] ** rng.uniform(0.6, 1.6)
    rows = np.array(_vary(rng, top)) * (1 - ramp) + np.array(_vary(rng, bottom)) * ramp
    image = Image.fromarray(np.broadcast_to(rows, (side, side, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(8, 26))):
        x, y = rng.uniform(-2, side + 2, 2)
        radius = rng.uniform(1.0, 6.0)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_vary(rng, _pick(rng, floating)))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 1.8)))


def _draw_branch(canvas: Canvas, rng: np.random.Generator, foot: Points, size: int) -> None:
    """Draw a branch across the image that passes through `foot` (pixels), with twigs and leaves."""
    bark = _vary(rng, _pick(rng, _BARK))
    slope = rng.uniform(-0.25, 0.25)
    thick = size * rng.uniform(0.016, 0.034)
    x = np.linspace(-0.05, 1.05, 9) * size
    sway = size * rng.uniform(-0.02, 0.02, 9)
    y = foot[1] + slope * (x - foot[0]) + sway * np.minimum(1, np.abs(x - foot[0]) / (0.3 * size)) + 0.4 * thick
    spine = np.stack([x, y], axis=1)
    canvas.line(spine, bark, 2 * thick)
    canvas.line(spine - (0, 0.5 * thick), _mix(bark, (255, 250, 235), 0.22), 0.5 * thick)
    canvas.line(spine - (0, -0.65 * thick), _mix(bark, (20, 16, 20), 0.35), 0.5 * thick)
    for _ in range(int(rng.integers(2, 6))):
        root = spine[int(rng.integers(9))]
        reach = size * rng.uniform(0.1, 0.28)
        angle = rng.uniform(0, 2 * np.pi)
        end = root + reach * np.array([np.cos(angle), np.sin(angle)])
        canvas.line(np.stack([root, end]), bark, 0.5 * thick)
        for _ in range(int(rng.integers(1, 5))):
            _draw_leaf(canvas, rng, root + (end - root) * rng.uniform(0.3, 1.0), size * rng.uniform(0.05, 0.12))


def _draw_ground(canvas: Canvas, rng: np.random.Generator, foot: Points, size: int) -> None:
    """Draw the ground below `foot` (pixels), with stones and blades of grass."""
    soil = _vary(rng, _mix(_pick(rng, _BARK), _pick(rng, _LEAVES), 0.45))
    x = np.linspace(-0.05, 1.05, 7) * size
    y = foot[1] - size * rng.uniform(0.0, 0.05, 7)
    outline = np.concatenate([np.stack([x, y], axis=1), [(1.05 * size, 1.05 * size), (-0.05 * size, 1.05 * size)]])
    canvas.polygon(outline, soil)
    for _ in range(int(rng.integers(6, 16))):
        at = np.array([rng.uniform(0, size), foot[1] + size * rng.uniform(0, 0.3)])
        canvas.polygon(at + DISC * size * (rng.uniform(0.008, 0.03), rng.uniform(0.004, 0.014)), _vary(rng, soil, 32))
    for _ in range(int(rng.integers(6, 22))):
        _draw_blade(canvas, rng, np.array([rng.uniform(0, size), foot[1] + size * rng.uniform(-0.03, 0.2)]), size)


def _draw_foliage(
    canvas: Canvas, rng: np.random.Generator, size: int, count: int, keep_clear: tuple[float, float, float, float]
) -> None:
    """Draw `count` leaves and berries, but none over the box `keep_clear` (left, top, right, bottom, pixels)."""
    left, top, right, bottom = keep_clear
    for _ in range(count):
        at = rng.uniform(0, size, 2)
        kind, reach = rng.uniform(), size * rng.uniform(0.05, 0.13)
        # Whatever is drawn here stays within `reach` of its root.
        clear = at[0] + reach < left or at[0] - reach > right or at[1] + reach < top or at[1] - reach > bottom
        target = canvas if clear else None
        if kind < 0.85:
            _draw_leaf(target, rng, at, reach)
        else:
            radius = reach * rng.uniform(0.1, 0.2)
            color = _vary(rng, _pick(rng, _BERRIES), 8)
            if target is not None:
                target.polygon(at + DISC * radius, _mix(color, (10, 10, 14), 0.25))
                target.polygon(at - 0.15 * radius + DISC * 0.75 * radius, color)


def _draw_leaf(canvas: Canvas | None, rng: np.random.Generator, at: Points, length: float) -> None:
    """Draw a leaf from its root; with no canvas, only use up the random numbers."""
    angle, side = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.2)
    color = _vary(rng, _pick(rng, _LEAVES))
    if canvas is None:
        return
    pose = Pose.place(at, length, angle)
    canvas.polygon(pose.apply(LEAF * (1.0, side)), color)
    canvas.line(pose.apply(LEAF[[0, 9]] * 0.95), _mix(color, (235, 240, 200), 0.3), 0.05 * length)


def _draw_blade(canvas: Canvas, rng: np.random.Generator, root: Points, size: int) -> None:
    height, lean, half = size * rng.uniform(0.04, 0.14), size * rng.uniform(-0.05, 0.05), size * 0.006
    color = _vary(rng, _pick(rng, _LEAVES[:4]))
    canvas.polygon(root + np.array([(-half, 0), (lean, -height), (half, 0)]), color)
