"""Everything around the bird: what is out of focus behind it, what it sits on, what grows beside and before it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mge.data.field_guide.canvas import Canvas, Pose
from mge.data.field_guide.shapes import DISC, LEAF, Points
from mge.data.field_guide.species import Colour

__all__ = ["draw_backdrop", "draw_branch", "draw_foliage", "draw_ground", "mix"]

_BLUR_SIDE = 40  # pixels: what is out of focus needs no more

# Top and bottom of the far background, then what floats in it.
_MOODS: tuple[tuple[Colour, Colour, tuple[Colour, ...]], ...] = (
    ((181, 199, 211), (127, 145, 118), ((95, 117, 85), (138, 156, 114), (206, 213, 197))),
    ((115, 135, 106), (66, 82, 64), ((86, 108, 77), (145, 160, 117), (48, 63, 49))),
    ((213, 204, 187), (159, 139, 112), ((173, 146, 107), (202, 180, 142), (133, 112, 93))),
    ((209, 214, 217), (161, 165, 168), ((181, 185, 188), (135, 141, 142), (227, 229, 229))),
    ((221, 205, 198), (148, 139, 149), ((188, 171, 175), (226, 213, 199), (121, 117, 130))),
)
_LEAVES: tuple[Colour, ...] = (
    (70, 112, 52),
    (104, 140, 62),
    (52, 88, 56),
    (150, 152, 70),
    (172, 120, 56),
    (126, 84, 48),
)
# Berries wear the colours of hoods and eye rings, so that a colour somewhere in the picture decides nothing.
_BERRIES: tuple[Colour, ...] = (
    (26, 24, 28),
    (186, 68, 28),
    (240, 196, 40),
    (44, 112, 206),
    (255, 255, 250),
    (226, 32, 40),
)
_BARK: tuple[Colour, ...] = ((104, 84, 66), (82, 72, 64), (132, 112, 90), (92, 64, 48))


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return the colour `share` of the way from the first to the second, share in 0..1."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _pick(rng: np.random.Generator, colours: tuple[Colour, ...]) -> Colour:
    return colours[int(rng.integers(len(colours)))]


def _vary(rng: np.random.Generator, colour: Colour, spread: float = 14.0) -> Colour:
    shifts = rng.uniform(-spread, spread, 3).tolist()
    red, green, blue = (int(min(max(c + shift, 0.0), 255.0)) for c, shift in zip(colour, shifts, strict=True))
    return red, green, blue


def draw_backdrop(rng: np.random.Generator) -> Image.Image:
    """Return a small picture of what is out of focus, to be enlarged to the canvas."""
    top, bottom, floating = _MOODS[int(rng.integers(len(_MOODS)))]
    ramp = np.linspace(0, 1, _BLUR_SIDE)[:, None, None] ** rng.uniform(0.6, 1.6)
    rows = np.array(_vary(rng, top)) * (1 - ramp) + np.array(_vary(rng, bottom)) * ramp
    image = Image.fromarray(np.broadcast_to(rows, (_BLUR_SIDE, _BLUR_SIDE, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(8, 26))):
        x, y = rng.uniform(-2, _BLUR_SIDE + 2, 2)
        radius = rng.uniform(1.0, 6.0)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_vary(rng, _pick(rng, floating)))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 1.8)))


def draw_branch(canvas: Canvas, rng: np.random.Generator, foot: Points, size: int) -> None:
    """Draw a branch across the picture that passes through `foot` (pixels), with twigs and leaves."""
    bark = _vary(rng, _pick(rng, _BARK))
    slope = rng.uniform(-0.25, 0.25)
    thick = size * rng.uniform(0.016, 0.034)
    x = np.linspace(-0.05, 1.05, 9) * size
    sway = size * rng.uniform(-0.02, 0.02, 9)
    y = foot[1] + slope * (x - foot[0]) + sway * np.minimum(1, np.abs(x - foot[0]) / (0.3 * size)) + 0.4 * thick
    spine = np.stack([x, y], axis=1)
    canvas.line(spine, bark, 2 * thick)
    canvas.line(spine - (0, 0.5 * thick), mix(bark, (255, 250, 235), 0.22), 0.5 * thick)
    canvas.line(spine - (0, -0.65 * thick), mix(bark, (20, 16, 20), 0.35), 0.5 * thick)
    for _ in range(int(rng.integers(2, 6))):
        root = spine[int(rng.integers(9))]
        reach = size * rng.uniform(0.1, 0.28)
        angle = rng.uniform(0, 2 * np.pi)
        end = root + reach * np.array([np.cos(angle), np.sin(angle)])
        canvas.line(np.stack([root, end]), bark, 0.5 * thick)
        for _ in range(int(rng.integers(1, 5))):
            _draw_leaf(canvas, rng, root + (end - root) * rng.uniform(0.3, 1.0), size * rng.uniform(0.05, 0.12))


def draw_ground(canvas: Canvas, rng: np.random.Generator, foot: Points, size: int) -> None:
    """Draw the ground below `foot` (pixels), with stones and blades of grass."""
    soil = _vary(rng, mix(_pick(rng, _BARK), _pick(rng, _LEAVES), 0.45))
    x = np.linspace(-0.05, 1.05, 7) * size
    y = foot[1] - size * rng.uniform(0.0, 0.05, 7)
    outline = np.concatenate([np.stack([x, y], axis=1), [(1.05 * size, 1.05 * size), (-0.05 * size, 1.05 * size)]])
    canvas.polygon(outline, soil)
    for _ in range(int(rng.integers(6, 16))):
        at = np.array([rng.uniform(0, size), foot[1] + size * rng.uniform(0, 0.3)])
        canvas.polygon(at + DISC * size * (rng.uniform(0.008, 0.03), rng.uniform(0.004, 0.014)), _vary(rng, soil, 32))
    for _ in range(int(rng.integers(6, 22))):
        _draw_blade(canvas, rng, np.array([rng.uniform(0, size), foot[1] + size * rng.uniform(-0.03, 0.2)]), size)


def draw_foliage(
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
            colour = _vary(rng, _pick(rng, _BERRIES), 8)
            if target is not None:
                target.polygon(at + DISC * radius, mix(colour, (10, 10, 14), 0.25))
                target.polygon(at - 0.15 * radius + DISC * 0.75 * radius, colour)


def _draw_leaf(canvas: Canvas | None, rng: np.random.Generator, at: Points, length: float) -> None:
    """Draw a leaf from its root; with no canvas, only use up the random numbers."""
    angle, side = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.2)
    colour = _vary(rng, _pick(rng, _LEAVES))
    if canvas is None:
        return
    pose = Pose.place(at, length, angle)
    canvas.polygon(pose.apply(LEAF * (1.0, side)), colour)
    canvas.line(pose.apply(LEAF[[0, 9]] * 0.95), mix(colour, (235, 240, 200), 0.3), 0.05 * length)


def _draw_blade(canvas: Canvas, rng: np.random.Generator, root: Points, size: int) -> None:
    height, lean, half = size * rng.uniform(0.04, 0.14), size * rng.uniform(-0.05, 0.05), size * 0.006
    colour = _vary(rng, _pick(rng, _LEAVES[:4]))
    canvas.polygon(root + np.array([(-half, 0), (lean, -height), (half, 0)]), colour)
