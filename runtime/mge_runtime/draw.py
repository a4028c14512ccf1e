"""The drawing of a prediction: where every expert looked and why, the gate's shares, the likeliest classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.errors import printable
from mge_runtime.fonts import font_for
from mge_runtime.prediction import softmax

if TYPE_CHECKING:
    from PIL.Image import Image

    from mge_runtime.prediction import Prediction


Color = tuple[int, int, int]

_PAPER: Color = (255, 255, 255)
_INK: Color = (32, 36, 42)
_MUTED: Color = (112, 119, 128)
_TRACK: Color = (231, 234, 238)
# Okabe and Ito, "Color Universal Design" (2008): told apart by all kinds of color vision.
_EXPERTS: tuple[Color, ...] = (
    (0, 114, 178),  # blue
    (230, 159, 0),  # orange
    (204, 121, 167),  # reddish purple
    (0, 158, 115),  # bluish green
    (86, 180, 233),  # sky blue
    (213, 94, 0),  # vermilion
)
# Dark blue to yellow through red, lightness rising evenly (after "inferno", Smith and van der Walt, 2015).
_HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32)

# All in pixels.
_IMAGE = 800  # the image's longer side
_COLUMN = 400  # width of a column of bars or thumbnails
_MARGIN = 24
_GAP = 8
_THUMBNAIL = 196  # at most, the side of what an expert saw
_LABEL = 40  # height of the two lines over a thumbnail


def expert_color(index: int) -> Color:
    """The color of expert `index`, counted from 0."""
    return _EXPERTS[index % len(_EXPERTS)]


def draw_prediction(image: np.ndarray, prediction: Prediction) -> Image:
    """Draw the image with the experts' boxes, their views and heat maps, the gate and the top classes.

    The class and its bars stand beside the image. Then come two thumbnails for each expert, framed in the color of its
    box: what it saw, stretched to a square as it saw it, and its heat map.

    Args:
        image: uint8 RGB [H, W, 3], the source image that the prediction's boxes refer to.
        prediction: what `Pipeline.predict` returned for it.

    Returns:
        An RGB image; 1272 pixels wide for a landscape, less for a portrait.
    """
    boxed, bars = draw_boxes(image, prediction.boxes), _bars(prediction)
    thumbnails = _thumbnails(image, prediction, _COLUMN, rows=2)
    beside = _MARGIN + boxed.width + _MARGIN  # left edge of the bars
    left, top = beside, _MARGIN + bars.height + _MARGIN
    if boxed.height < 0.95 * (bars.height + _MARGIN + thumbnails.height):  # no room below the bars
        thumbnails = _thumbnails(image, prediction, boxed.width + _MARGIN + _COLUMN, rows=1)
        left, top = _MARGIN, _MARGIN + max(boxed.height, bars.height) + _MARGIN
    height = max(_MARGIN + boxed.height, top + thumbnails.height) + _MARGIN
    canvas = Canvas.blank(beside + _COLUMN + _MARGIN, height)
    canvas.paste(boxed, _MARGIN, _MARGIN)
    canvas.paste(bars, beside, _MARGIN)
    canvas.paste(thumbnails, left, top)
    return canvas.image


class Canvas:
    """An RGB image to draw on; positions and sizes in pixels, (0, 0) at the top left."""

    def __init__(self, image: Image) -> None:
        from PIL import ImageDraw

        self.image = image
        self._draw = ImageDraw.Draw(image)

    @classmethod
    def blank(cls, width: int, height: int) -> Canvas:
        """An empty white image."""
        import PIL.Image

        return cls(PIL.Image.new("RGB", (width, height), _PAPER))

    def paste(self, image: Image, left: int, top: int, outline: Color | None = None) -> None:
        """Put an image here, with a line of 3 pixels inside its edge if `outline` names a color."""
        self.image.paste(image, (left, top))
        if outline:
            right, bottom = left + image.width - 1, top + image.height - 1
            self._draw.rectangle((left, top, right, bottom), outline=outline, width=3)

    def text(
        self, left: int, top: int, text: str, size: int, color: Color = _INK, width: float = 1e9, anchor: str = "la"
    ) -> None:
        """Write one line, smaller or shortened to fit `width`.

        `anchor` as Pillow names it: "la" for left and top, "ra" for right and top.
        """
        text = printable(text)
        while size > 18 and font_for(text, size).getlength(text) > width:  # large letters shrink before they are lost
            size -= 2
        font = font_for(text, size)
        self._draw.text((left, top), shortened(text, size, width), fill=color, font=font, anchor=anchor)

    def bar(self, left: int, top: int, width: int, height: int, share: float, color: Color) -> None:
        """Draw a bar filled to `share` (0 to 1) of its width."""
        self._draw.rectangle((left, top, left + width - 1, top + height - 1), fill=_TRACK)
        if filled := round(width * min(max(share, 0.0), 1.0)):
            self._draw.rectangle((left, top, left + filled - 1, top + height - 1), fill=color)

    def box(self, edges: np.ndarray, color: Color, width: int) -> None:
        """Outline edges [4] (x0, y0, x1, y1) on the inside, a thin dark line on both sides of the colored one."""
        x0, y0, x1, y1 = self._inside(edges)
        self._draw.rectangle((x0, y0, x1, y1), outline=(0, 0, 0), width=width + 2)
        if x1 - x0 > 2 and y1 - y0 > 2:
            self._draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=color, width=width)

    def tag(self, edges: np.ndarray, text: str, color: Color, corner: int) -> None:
        """Label a box at its top left (`corner` 0), top right, bottom right or bottom left, inside the image."""
        x0, y0, x1, y1 = self._inside(edges)
        font = font_for(text, 13)
        wide, high = round(font.getlength(text)) + 10, 19
        left = x0 if corner % 4 in (0, 3) else x1 - wide + 1
        top = y0 - high if corner % 4 in (0, 1) else y1 + 1
        left = min(max(left, 0), max(self.image.width - wide, 0))
        top = min(max(top, 0), max(self.image.height - high, 0))
        self._draw.rectangle((left, top, left + wide - 1, top + high - 1), fill=color, outline=(0, 0, 0))
        light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
        self._draw.text((left + 5, top + 3), text, fill=(0, 0, 0) if light > 110 else _PAPER, font=font)

    def _inside(self, edges: np.ndarray) -> tuple[int, int, int, int]:
        """The pixels, both ends counted, that edges cover; at least one, within the image."""
        width, height = self.image.size
        x0, y0 = min(max(int(edges[0]), 0), width - 1), min(max(int(edges[1]), 0), height - 1)
        x1, y1 = min(max(round(edges[2]) - 1, x0), width - 1), min(max(round(edges[3]) - 1, y0), height - 1)
        return x0, y0, x1, y1


def fitted(image: np.ndarray, longest: int) -> Image:
    """Scale uint8 RGB [H, W, 3] so that its longer side is `longest` pixels and no side is below one."""
    import PIL.Image

    height, width = image.shape[:2]
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Few pixels enlarged: show them as they are rather than a blur.
    method = PIL.Image.Resampling.NEAREST if scale > 8 else PIL.Image.Resampling.LANCZOS
    return PIL.Image.fromarray(image).resize(size, method)


def draw_boxes(image: np.ndarray, boxes: np.ndarray, longest: int = _IMAGE, *, tags: bool = True) -> Image:
    """Scale an image and draw what each expert saw, inner boxes with finer lines so that equal ones all show.

    Args:
        image: uint8 RGB [H, W, 3].
        boxes: [K, 4] (x0, y0, x1, y1) in pixels of the image.
        longest: the longer side of what is drawn, in pixels.
        tags: whether each box but the first names its expert.
    """
    canvas = Canvas(fitted(image, longest))
    scale = [canvas.image.width / image.shape[1], canvas.image.height / image.shape[0]] * 2
    boxes = np.asarray(boxes, np.float64) * scale
    finest, step = (4, 3) if longest > _IMAGE // 2 else (2, 2)
    for k, box in enumerate(boxes):
        canvas.box(box, expert_color(k), width=finest + step * (len(boxes) - 1 - k) if k else 2)
    for k, box in enumerate(boxes[1:] if tags else (), 1):
        canvas.tag(box, f"expert {k + 1}", expert_color(k), corner=k)
    return canvas.image


def seen(image: np.ndarray, box: np.ndarray, side: int) -> Image:
    """What an expert saw: a box [4] cut out of uint8 RGB [H, W, 3], stretched to a square of `side` pixels."""
    import PIL.Image

    height, width = image.shape[:2]
    x0, y0 = min(max(float(box[0]), 0.0), width - 1.0), min(max(float(box[1]), 0.0), height - 1.0)
    x1, y1 = min(max(float(box[2]), x0 + 0.5), float(width)), min(max(float(box[3]), y0 + 0.5), float(height))
    left, top = int(x0), int(y0)  # cut first: Pillow would copy the whole source
    part = PIL.Image.fromarray(image[top : int(np.ceil(y1)), left : int(np.ceil(x1))])
    return part.resize((side, side), PIL.Image.Resampling.BILINEAR, box=(x0 - left, y0 - top, x1 - left, y1 - top))


def blend_heatmap(image: Image, heatmap: np.ndarray) -> Image:
    """Lay a heat map [h, w] of any range over a grayed image, corners on corners as the chain enlarges it."""
    import PIL.Image

    heat = np.nan_to_num(np.asarray(heatmap, np.float32))
    x, y = ((cells - 1) / max(pixels - 1, 1) for cells, pixels in zip(heat.shape[::-1], image.size, strict=True))
    corners = (x, 0, 0.5 - x / 2, 0, y, 0.5 - y / 2)  # from centers of pixels to centers of cells
    scaled = PIL.Image.fromarray(heat).transform(
        image.size, PIL.Image.Transform.AFFINE, corners, PIL.Image.Resampling.BILINEAR
    )
    heat = np.asarray(scaled)
    low, high = float(heat.min()), float(heat.max())
    heat = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    levels = np.linspace(0, 1, len(_HEAT))
    colors = np.stack([np.interp(heat, levels, _HEAT[:, channel]) for channel in range(3)], -1)
    weight = 0.35 + 0.35 * heat[..., None]
    gray = np.asarray(image.convert("L"), np.float32)[..., None]
    return PIL.Image.fromarray((gray * (1 - weight) + colors * weight).round().astype(np.uint8))


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


def _bars(prediction: Prediction) -> Image:
    """The class in large letters, what was learned beside it, the top classes and the gate as bars."""
    shares: list[float] = [] if prediction.gate is None else prediction.gate.tolist()
    title, *lines = prediction.notes() if prediction.rejected else (prediction.class_name, *prediction.notes())
    width, top = _COLUMN, 44 + 22 * len(lines)
    canvas = Canvas.blank(width, top + 38 * len(prediction.top) + (36 + 26 * len(shares) if shares else 0))
    canvas.text(0, 0, title, 26, _INK, width)
    for row, line in enumerate(lines):
        canvas.text(0, 40 + 22 * row, line, 14, _MUTED, width)
    among = 1 if prediction.set is None else len(prediction.set)
    for index, (name, probability) in enumerate(prediction.top):
        canvas.text(0, top, name, 15, _INK, width - 64)
        canvas.text(width, top, f"{probability:.1%}", 15, _INK, anchor="ra")
        canvas.bar(0, top + 21, width, 7, probability, _INK if index < among else _MUTED)
        top += 38
    if shares:
        canvas.text(0, top + 12, "gate: how much each expert counts", 13, _MUTED, width)
        top += 36
    for k, share in enumerate(shares):
        canvas.text(0, top, f"expert {k + 1}", 14, _INK, 80)
        canvas.bar(84, top + 3, width - 84 - 64, 11, share, expert_color(k))
        canvas.text(width, top, f"{share:.1%}", 14, _INK, anchor="ra")
        top += 26
    return canvas.image


def _thumbnails(image: np.ndarray, prediction: Prediction, width: int, rows: int) -> Image:
    """What each expert saw and its attention: over one another in two rows, or side by side in one."""
    count = len(prediction.boxes)
    across = count * (3 - rows)
    side = min(_THUMBNAIL, (width - _GAP * (across - 1)) // across)
    canvas = Canvas.blank(width, _LABEL + rows * (side + _GAP) - _GAP)
    probabilities = softmax(prediction.expert_logits)
    for k in range(count):
        color, best = expert_color(k), int(probabilities[k].argmax())
        left = k * (3 - rows) * (side + _GAP)
        view = seen(image, prediction.boxes[k], side)
        heat = blend_heatmap(view, prediction.heatmaps[k])
        room = side if rows == 2 else 2 * side + _GAP
        share = f"{probabilities[k, best]:.0%} " if side > 70 else ""
        canvas.text(left, 0, f"expert {k + 1}" if side > 70 else str(k + 1), 14, _INK, room)
        canvas.text(left, 19, share + prediction.class_names[best], 12, _MUTED, room)
        canvas.paste(view, left, _LABEL, outline=color)
        beside = (left, _LABEL + side + _GAP) if rows == 2 else (left + side + _GAP, _LABEL)
        canvas.paste(heat, *beside, outline=color)
    return canvas.image
