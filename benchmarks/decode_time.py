"""How long a 12-megapixel JPEG takes from bytes to frame, step by step, and what a faster decoder would save.

    python benchmarks/decode_time.py PHOTOGRAPHS [--size 448] [--quality 93] [--rounds 15]

The picture is a mosaic of photographs at their own size, 4000 x 3000 pixels, so that it has the detail of a phone's.
"draft" is Pillow's own option to decode at half the size or less; the runtime does not use it, since training decodes
whole, and its frame is compared with the one the model was trained on. Where `simplejpeg` is installed (bindings of
libjpeg-turbo, which Pillow's own wheels use, too) it is timed beside them, and its pixels are compared with Pillow's.
"""

from __future__ import annotations

import importlib
import io
import os
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import click
import numpy as np
import PIL
from PIL import Image, features

from mge_runtime.cli.common import reports_errors
from mge_runtime.decode import decode_image, decode_picture
from mge_runtime.errors import InputError
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import to_frame
from mge_runtime.sources import list_folder

WIDTH, HEIGHT = 4000, 3000


@click.command(help=__doc__)
@click.argument("photographs", type=click.Path(path_type=Path))
@click.option("--size", default=448, show_default=True, help="Of the frame, in pixels.")
@click.option("--quality", default=93, show_default=True, help="Of the JPEG, as Pillow counts.")
@click.option("--rounds", default=15, show_default=True)
@reports_errors
def main(photographs: Path, size: int, quality: int, rounds: int) -> None:
    """Draw, time, print."""
    data, tiles = mosaic(photographs, quality)
    preprocess = Preprocess(size=size, resize=size * 8 // 7, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    whole, small = decode_picture(data), draft(data, preprocess.resize)
    ways: dict[str, Callable[[], object]] = {
        "decode (as the runtime does)": lambda: decode_picture(data),
        "resize and crop to the frame": lambda: to_frame(whole, preprocess),
        "decode with Pillow's draft mode": lambda: draft(data, preprocess.resize),
        "resize and crop after it": lambda: to_frame(small, preprocess),
    }
    simplejpeg = bindings()
    if simplejpeg is not None:
        ways["decode with simplejpeg"] = lambda: simplejpeg.decode_jpeg(data)
        ways["decode with simplejpeg, fast"] = lambda: simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    order, draws = list(ways), Random(2019)
    for number in range(rounds + 1):
        draws.shuffle(order)
        for name in order:
            begin = time.perf_counter(), time.process_time()
            ways[name]()
            if number:  # the first round allocates
                passed = time.perf_counter() - begin[0], time.process_time() - begin[1]
                taken[name].append((1e3 * passed[0], 1e3 * passed[1]))
    click.echo(
        f"{WIDTH} x {HEIGHT} pixels, {len(data) / 1e6:.1f} MB: {tiles} photographs at their own size, "
        f"quality {quality}; medians of {rounds} rounds, load {os.getloadavg()[0]:.2f}"
    )
    click.echo(f"Pillow {PIL.__version__}, its libjpeg-turbo: {features.version('libjpeg_turbo') or 'none'}")
    for name, times in taken.items():
        wall, processor = (median(part) for part in zip(*times, strict=True))
        click.echo(f"{name:34} {wall:6.1f} ms, {processor:6.1f} ms of a processor")
    click.echo(f"draft: {difference(to_frame(whole, preprocess)[0], to_frame(small, preprocess)[0])}")
    if simplejpeg is None:
        click.echo("simplejpeg: not installed, not timed")
        return
    for name, options in (("simplejpeg", {}), ("simplejpeg, fast", {"fastdct": True, "fastupsample": True})):
        theirs = simplejpeg.decode_jpeg(data, **options)
        click.echo(f"{name} {simplejpeg.__version__}: at full size, {difference(np.asarray(whole), theirs)}")


def mosaic(photographs: Path, quality: int) -> tuple[bytes, int]:
    """A large picture with the detail of real ones, and of how many it is made: rows of them, none enlarged."""
    paths = [item.path for item in list_folder(photographs).whole() if item.path is not None]
    if not paths:
        raise InputError(f"no image in {photographs}; expected photographs")
    Random(2019).shuffle(paths)
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    tiles = pictures(paths)
    count = y = 0
    while y < HEIGHT:
        x = row = 0
        while x < WIDTH:
            tile = next(tiles)
            picture.paste(tile, (x, y))
            x, row, count = x + tile.width, max(row, tile.height), count + 1
        y += row
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue(), count


def pictures(paths: list[Path]) -> Iterator[Image.Image]:
    """Photographs, again from the first on behind the last."""
    for path in cycle(paths):
        yield Image.fromarray(decode_image(path))


def bindings() -> Any:
    """The module `simplejpeg`; None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Between two pictures, in words."""
    apart = np.abs(ours.astype(np.int16) - theirs.astype(np.int16))
    if not apart.any():
        return "the same bit for bit"
    return f"differs by {apart.mean():.2f} of 255 on average, at most {apart.max()}"


def draft(data: bytes, least: int) -> np.ndarray:
    """Decode at the smallest size of JPEG's own that is not below `least` pixels."""
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft("RGB", (least, least))
        return np.asarray(picture.convert("RGB"))


if __name__ == "__main__":
    main()
