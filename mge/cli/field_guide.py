"""`mge-field-guide`: draw the field guide, a fine-grained data set that needs no download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mge_runtime.cli.common import reports_errors
from mge_runtime.files import echo

if TYPE_CHECKING:
    from PIL.Image import Image

    from mge.data.field_guide import FieldGuide


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True, help="Another seed gives other images of the same species.")
@click.option("--species", default=12, show_default=True, help="Number of classes, 2 to 36.")
@click.option("--size", default=128, show_default=True, help="Side of an image in pixels.")
@click.option("--train", default=1800, show_default=True, help="Images to train on.")
@click.option("--val", default=300, show_default=True, help="Images to choose settings on.")
@click.option("--test", default=600, show_default=True, help="Images to report on.")
@click.option(
    "--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that draw; 0: one for each core."
)
@click.option("--sheet", type=click.Path(path_type=Path, dir_okay=False), help="Also save a contact sheet to a file.")
@click.version_option(package_name="mge")
@reports_errors
def main(
    folder: Path, seed: int, species: int, size: int, train: int, val: int, test: int, workers: int, sheet: Path | None
) -> None:
    """Draw birds whose species differ in small parts of the head into FOLDER.

    FOLDER gets train, val and test with a folder per species, and in each a parts.csv with the box of the part that
    decides. The same options always draw the same images. FOLDER appears when everything is drawn; a folder that
    already holds this very guide is left alone.
    """
    from mge.data.field_guide import FieldGuide, write_field_guide
    from mge_runtime.files import atomic_path

    guide = FieldGuide(seed=seed, species=species, size=size, train=train, val=val, test=test)
    total = train + val + test
    workers = workers or os.cpu_count() or 1
    with click.progressbar(length=total, label="drawing birds") as bar:
        drawn = write_field_guide(folder, guide, workers=workers, progress=lambda done: bar.update(done - bar.pos))
    echo(f"{folder}: {total} images of {species} species" + ("" if drawn else ", already there"))
    if sheet is not None:
        with atomic_path(sheet) as draft:
            draw_sheet(guide).save(draft, format="PNG")
        echo(f"{sheet}: contact sheet")


def draw_sheet(guide: FieldGuide, *, columns: int = 6, rows: int = 4, side: int = 192) -> Image:
    """A contact sheet: the first images of the training split with their names, `side` pixels each."""
    from PIL import Image, ImageDraw

    from mge.data.field_guide import draw_image, list_species

    gap, label = 6, 14  # pixels
    names = [one.name for one in list_species(guide.species)]
    width, height = columns * (side + gap) + gap, rows * (side + label + gap) + gap
    sheet = Image.new("RGB", (width, height), (250, 249, 245))
    pen = ImageDraw.Draw(sheet)
    for index in range(min(columns * rows, guide.train)):
        plate = draw_image(guide, "train", index)
        left = gap + index % columns * (side + gap)
        top = gap + index // columns * (side + label + gap)
        sheet.paste(Image.fromarray(plate.image).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        pen.text((left + 2, top + side + 1), names[index % guide.species], fill=(70, 66, 60), font_size=10)
    return sheet
