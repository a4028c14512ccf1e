"""A contact sheet: the guide at one look."""

from __future__ import annotations

from PIL import Image, ImageDraw

from mge.data.field_guide.dataset import FieldGuide, draw_image
from mge.data.field_guide.species import list_species

__all__ = ["draw_sheet"]

_GAP = 6  # pixels between pictures


def draw_sheet(
    guide: FieldGuide, *, columns: int = 6, rows: int = 4, side: int = 192, boxes: bool = False
) -> Image.Image:
    """Return the first pictures of the training split with their names, `side` pixels each.

    With `boxes` the part that decides is framed.
    """
    label = 14
    names = [one.name for one in list_species(guide.species)]
    width, height = columns * (side + _GAP) + _GAP, rows * (side + label + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), (250, 249, 245))
    pen = ImageDraw.Draw(sheet)
    for index in range(min(columns * rows, guide.train)):
        plate = draw_image(guide, "train", index)
        left = _GAP + index % columns * (side + _GAP)
        top = _GAP + index // columns * (side + label + _GAP)
        sheet.paste(Image.fromarray(plate.image).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        if boxes:
            x0, y0, x1, y1 = (value * side / guide.size for value in plate.part)
            pen.rectangle((left + x0, top + y0, left + x1, top + y1), outline=(255, 240, 120), width=2)
        text = names[index % guide.species]
        pen.text((left + 2, top + side + 1), text, fill=(70, 66, 60), font_size=10)
    return sheet
