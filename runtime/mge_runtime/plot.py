"""Small drawing tools on Pillow: text that fits, bars, boxes, heat maps, in colours that all readers tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.errors import printable
from mge_runtime.fonts import font_for

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["INK", "MUTED", "Canvas", "Colour", "blend_heatmap", "expert_colour", "fitted", "shortened"]

Colour = tuple[int, int, int]

_PAPER: Colour = (255, 255, 255)
INK: Colour = (32, 36, 42)
MUTED: Colour = (112, 119, 128)
_TRACK: Colour = (231, 234, 238)

# Okabe and Ito, "Color Universal Design" (2008): told apart by all kinds of colour vision.
_EXPERTS: tuple[Colour, ...] = (
    (0, 114, 178),  # blue
    (230, 159, 0),  # orange
    (204, 121, 167),  # reddish purple
    (0, 158, 115),  # bluish green
    (86, 180, 233),  # sky blue
    (213, 94, 0),  # vermilion
)
# Dark blue to yellow through red, lightness rising evenly (after "inferno", Smith and van der Walt, 2015).
_HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32)


def expert_colour(index: int) -> Colour:
    """The colour of expert `index`, counted from 0."""
    return _EXPERTS[index % len(_EXPERTS)]


def fitted(image: np.ndarray, longest: int) -> Image:
    """Scale uint8 RGB [H, W, 3] so that its longer side is `longest` pixels and no side is below one."""
    import PIL.Image

    height, width = image.shape[:2]
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Few pixels enlarged: show them as they are rather than a blur.
    method = PIL.Image.Resampling.NEAREST if scale > 8 else PIL.Image.Resampling.LANCZOS
    return PIL.Image.fromarray(image).resize(size, method)


def blend_heatmap(picture: Image, heatmap: np.ndarray) -> Image:
    """Lay a heat map [h, w] of any range over a greyed picture, corners on corners as the chain enlarges it."""
    import PIL.Image

    heat = _enlarged(np.nan_to_num(np.asarray(heatmap, np.float32)), picture.height, picture.width)
    low, high = float(heat.min()), float(heat.max())
    heat = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    place = heat * (len(_HEAT) - 1)
    below = np.minimum(place.astype(np.intp), len(_HEAT) - 2)
    part = (place - below)[..., None]
    colours = _HEAT[below] * (1 - part) + _HEAT[below + 1] * part
    weight = 0.35 + 0.35 * heat[..., None]
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    return PIL.Image.fromarray((grey * (1 - weight) + colours * weight).round().astype(np.uint8))


def _enlarged(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize [h, w] bilinearly with align_corners=True."""
    for axis, length in ((0, height), (1, width)):
        place = np.arange(length) * ((values.shape[axis] - 1) / max(length - 1, 1))
        low = np.floor(place).astype(np.intp)
        part = np.expand_dims(place - low, 1 - axis)
        high = np.minimum(low + 1, values.shape[axis] - 1)
        values = np.take(values, low, axis) * (1 - part) + np.take(values, high, axis) * part
    return values


def shortened(text: str, size: int, width: float) -> str:
    """Cut the middle out of a text that is wider than `width` pixels at font `size`: both ends tell classes apart."""
    font = font_for(text, size)
    if font.getlength(text) <= width:
        return text
    for keep in range(len(text) - 1, 0, -1):
        short = f"{text[: (keep + 1) // 2].rstrip()}…{text[len(text) - keep // 2 :].lstrip()}"
        if font.getlength(short) <= width:
            return short
    return "…"


class Canvas:
    """An RGB picture to draw on; positions and sizes in pixels, (0, 0) at the top left."""

    def __init__(self, image: Image) -> None:
        from PIL import ImageDraw

        self.image = image
        self._draw = ImageDraw.Draw(image)

    @classmethod
    def blank(cls, width: int, height: int) -> Canvas:
        """An empty white picture."""
        import PIL.Image

        return cls(PIL.Image.new("RGB", (width, height), _PAPER))

    def paste(self, picture: Image, left: int, top: int, outline: Colour | None = None) -> None:
        """Put a picture here, with a line of 3 pixels inside its edge if `outline` names a colour."""
        self.image.paste(picture, (left, top))
        if outline:
            right, bottom = left + picture.width - 1, top + picture.height - 1
            self._draw.rectangle((left, top, right, bottom), outline=outline, width=3)

    def text(
        self, left: int, top: int, text: str, size: int, colour: Colour = INK, width: float = 1e9, anchor: str = "la"
    ) -> None:
        """Write one line, smaller or shortened to fit `width`.

        `anchor` as Pillow names it: "la" for left and top, "ra" for right and top.
        """
        text = printable(text)
        while size > 18 and font_for(text, size).getlength(text) > width:  # large letters shrink before they are lost
            size -= 2
        font = font_for(text, size)
        self._draw.text((left, top), shortened(text, size, width), fill=colour, font=font, anchor=anchor)

    def bar(self, left: int, top: int, width: int, height: int, share: float, colour: Colour) -> None:
        """Draw a bar filled to `share` (0 to 1) of its width."""
        self._draw.rectangle((left, top, left + width - 1, top + height - 1), fill=_TRACK)
        filled = round(width * min(max(share, 0.0), 1.0))
        if filled:
            self._draw.rectangle((left, top, left + filled - 1, top + height - 1), fill=colour)

    def box(self, edges: np.ndarray, colour: Colour, width: int) -> None:
        """Outline edges [4] (x0, y0, x1, y1) on the inside, a thin dark line on both sides of the coloured one."""
        x0, y0, x1, y1 = self._inside(edges)
        self._draw.rectangle((x0, y0, x1, y1), outline=(0, 0, 0), width=width + 2)
        if x1 - x0 > 2 and y1 - y0 > 2:
            self._draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=colour, width=width)

    def tag(self, edges: np.ndarray, text: str, colour: Colour, corner: int) -> None:
        """Label a box at its top left (`corner` 0), top right, bottom right or bottom left, inside the picture."""
        x0, y0, x1, y1 = self._inside(edges)
        font = font_for(text, 13)
        wide, high = round(font.getlength(text)) + 10, 19
        left = x0 if corner % 4 in (0, 3) else x1 - wide + 1
        top = y0 - high if corner % 4 in (0, 1) else y1 + 1
        left = min(max(left, 0), max(self.image.width - wide, 0))
        top = min(max(top, 0), max(self.image.height - high, 0))
        self._draw.rectangle((left, top, left + wide - 1, top + high - 1), fill=colour, outline=(0, 0, 0))
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        self._draw.text((left + 5, top + 3), text, fill=(0, 0, 0) if light > 110 else (255, 255, 255), font=font)

    def _inside(self, edges: np.ndarray) -> tuple[int, int, int, int]:
        """The pixels, both ends counted, that edges cover; at least one, within the picture."""
        width, height = self.image.size
        x0, y0 = min(max(int(edges[0]), 0), width - 1), min(max(int(edges[1]), 0), height - 1)
        x1, y1 = min(max(round(edges[2]) - 1, x0), width - 1), min(max(round(edges[3]) - 1, y0), height - 1)
        return x0, y0, x1, y1
