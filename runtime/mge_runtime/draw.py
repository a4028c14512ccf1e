"""One picture that shows an answer: where every expert looked, what drew it there, the gate's shares, the classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.plot import INK, MUTED, Canvas, blend_heatmap, expert_colour, fitted
from mge_runtime.prediction import softmax

if TYPE_CHECKING:
    from PIL.Image import Image

    from mge_runtime.prediction import Prediction

__all__ = ["draw_prediction"]

# All in pixels.
_PHOTO = 800  # the photograph's longer side
_COLUMN = 400  # width of a column of bars or thumbnails
_MARGIN = 24
_GAP = 8
_THUMBNAIL = 196  # at most, the side of what an expert saw
_LABEL = 40  # height of the two lines over a thumbnail


def draw_prediction(image: np.ndarray, prediction: Prediction) -> Image:
    """Draw the photograph with the experts' boxes, their views and heat maps, the gate and the top classes.

    The answer and its bars stand beside the photograph, below it where that is a flat strip. Then come two thumbnails
    for each expert, framed in the colour of its box: what it saw, stretched to a square as it saw it, and its heat map.

    Args:
        image: uint8 RGB [H, W, 3], the source image that the prediction's boxes refer to.
        prediction: what `Pipeline.predict` answered for it.

    Returns:
        An RGB picture; 1272 pixels wide for a landscape, less for a portrait.
    """
    photo = _photo(image, prediction)
    bars = _bars(prediction)
    stacked = _thumbnails(image, prediction, _COLUMN, rows=2)
    if photo.height >= 0.95 * (bars.height + _MARGIN + stacked.height):  # photograph | bars over thumbnails
        rows = [[photo, _column([bars, stacked])]]
    elif photo.height >= 0.75 * bars.height:  # photograph | bars, thumbnails below both
        width = photo.width + _MARGIN + bars.width
        rows = [[photo, bars], [_thumbnails(image, prediction, width, rows=1)]]
    else:  # photograph over bars | thumbnails
        rows = [[photo], [bars, stacked]]
    return _column([_row(row) for row in rows], border=_MARGIN)


def _photo(image: np.ndarray, prediction: Prediction) -> Image:
    """Scale the photograph and draw the experts' boxes, inner ones with finer lines so that equal boxes all show."""
    canvas = Canvas(fitted(image, _PHOTO))
    scale = [canvas.image.width / image.shape[1], canvas.image.height / image.shape[0]] * 2
    boxes = np.asarray(prediction.boxes, np.float64) * scale
    count = len(boxes)
    for k in range(count):
        canvas.box(boxes[k], expert_colour(k), width=4 + 3 * (count - 1 - k) if k else 2)
    for k in range(1, count):
        canvas.tag(boxes[k], f"expert {k + 1}", expert_colour(k), corner=k)
    return canvas.image


def _bars(prediction: Prediction) -> Image:
    """The answer in large letters, the top classes and the gate as bars."""
    shares = [] if prediction.gate is None else [float(share) for share in prediction.gate]
    width, top = _COLUMN, 44
    canvas = Canvas.blank(width, top + 38 * len(prediction.top) + (36 + 26 * len(shares) if shares else 0))
    canvas.text(0, 0, prediction.class_name, 26, INK, width)
    for index, (name, probability) in enumerate(prediction.top):
        canvas.text(0, top, name, 15, INK, width - 64)
        canvas.text(width, top, f"{probability:.1%}", 15, INK, anchor="ra")
        canvas.bar(0, top + 21, width, 7, probability, INK if index == 0 else MUTED)
        top += 38
    if shares:
        canvas.text(0, top + 12, "gate: how much each expert counts", 13, MUTED, width)
        top += 36
    for k, share in enumerate(shares):
        canvas.text(0, top, f"expert {k + 1}", 14, INK, 80)
        canvas.bar(84, top + 3, width - 84 - 64, 11, share, expert_colour(k))
        canvas.text(width, top, f"{share:.1%}", 14, INK, anchor="ra")
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
        colour, best = expert_colour(k), int(probabilities[k].argmax())
        left = k * (3 - rows) * (side + _GAP)
        seen = _view(image, prediction.boxes[k], side)
        heat = blend_heatmap(seen, prediction.heatmaps[k])
        room = side if rows == 2 else 2 * side + _GAP
        share = f"{probabilities[k, best]:.0%} " if side > 70 else ""
        canvas.text(left, 0, f"expert {k + 1}" if side > 70 else str(k + 1), 14, INK, room)
        canvas.text(left, 19, share + prediction.class_names[best], 12, MUTED, room)
        canvas.paste(seen, left, _LABEL, outline=colour)
        beside = (left, _LABEL + side + _GAP) if rows == 2 else (left + side + _GAP, _LABEL)
        canvas.paste(heat, *beside, outline=colour)
    return canvas.image


def _view(image: np.ndarray, box: np.ndarray, side: int) -> Image:
    """Cut a box [4] out of the source image and stretch it to a square."""
    import PIL.Image

    height, width = image.shape[:2]
    x0, y0 = min(max(float(box[0]), 0.0), width - 1.0), min(max(float(box[1]), 0.0), height - 1.0)
    x1, y1 = min(max(float(box[2]), x0 + 0.5), float(width)), min(max(float(box[3]), y0 + 0.5), float(height))
    left, top = int(x0), int(y0)  # cut first: Pillow would copy the whole source
    part = PIL.Image.fromarray(image[top : int(np.ceil(y1)), left : int(np.ceil(x1))])
    return part.resize((side, side), PIL.Image.Resampling.BILINEAR, box=(x0 - left, y0 - top, x1 - left, y1 - top))


def _row(pictures: list[Image]) -> Image:
    width = sum(picture.width for picture in pictures) + _MARGIN * (len(pictures) - 1)
    canvas, left = Canvas.blank(width, max(picture.height for picture in pictures)), 0
    for picture in pictures:
        canvas.paste(picture, left, 0)
        left += picture.width + _MARGIN
    return canvas.image


def _column(pictures: list[Image], border: int = 0) -> Image:
    height = sum(picture.height for picture in pictures) + _MARGIN * (len(pictures) - 1)
    width = max(picture.width for picture in pictures)
    canvas, top = Canvas.blank(width + 2 * border, height + 2 * border), border
    for picture in pictures:
        canvas.paste(picture, border + (width - picture.width) // 2, top)
        top += picture.height + _MARGIN
    return canvas.image
