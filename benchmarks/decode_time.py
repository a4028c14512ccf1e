"""How long a 12-megapixel JPEG takes from bytes to frame, step by step, and what a faster decoder would save.

    python benchmarks/decode_time.py PHOTOGRAPHS [--size 448] [--rounds 15]

The picture is a mosaic of photographs, 4000 x 3000 pixels, JPEG quality 90, the size of a phone's camera. "draft" is
Pillow's own option to decode at half the size or less; the runtime does not use it, since training decodes whole, and
its frame is compared with the one the model was trained on.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import numpy as np
from PIL import Image

from mge_runtime.cli.common import reports_errors
from mge_runtime.decode import decode_image
from mge_runtime.errors import InputError
from mge_runtime.preprocess import to_frame
from mge_runtime.sources import find_images
from mge_runtime.spec import Preprocess

WIDTH, HEIGHT, TILE = 4000, 3000, 1000


@click.command(help=__doc__)
@click.argument("photographs", type=click.Path(path_type=Path))
@click.option("--size", default=448, show_default=True, help="Of the frame, in pixels.")
@click.option("--rounds", default=15, show_default=True)
@reports_errors
def main(photographs: Path, size: int, rounds: int) -> None:
    """Draw, time, print."""
    data = mosaic(photographs)
    preprocess = Preprocess(size=size, resize=size * 8 // 7, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    whole, small = decode_image(data), draft(data, preprocess.resize)
    ways: dict[str, Callable[[], object]] = {
        "decode (as the runtime does)": lambda: decode_image(data),
        "resize and crop to the frame": lambda: to_frame(whole, preprocess),
        "decode with Pillow's draft mode": lambda: draft(data, preprocess.resize),
        "resize and crop after it": lambda: to_frame(small, preprocess),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            if number:  # the first round allocates
                taken[name].append(1e3 * (time.perf_counter() - begin))
    click.echo(f"{WIDTH} x {HEIGHT} pixels, {len(data) / 1e6:.1f} MB; medians of {rounds} rounds")
    for name, times in taken.items():
        click.echo(f"{name:34} {median(times):6.1f} ms")
    ours, theirs = to_frame(whole, preprocess)[0].astype(int), to_frame(small, preprocess)[0].astype(int)
    apart = np.abs(ours - theirs)
    click.echo(f"frames differ by {apart.mean():.2f} of 255 on average, at most {apart.max()}")


def mosaic(photographs: Path) -> bytes:
    """A large picture with the detail of real ones."""
    items, _ = find_images([str(photographs)])
    if not items:
        raise InputError(f"no image in {photographs}; expected photographs")
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    tiles = [(x, y) for x in range(0, WIDTH, TILE) for y in range(0, HEIGHT, TILE)]
    for index, place in enumerate(tiles):
        path = items[index * len(items) // len(tiles)].path
        if path is not None:
            picture.paste(Image.fromarray(decode_image(path)).resize((TILE, TILE), Image.Resampling.BICUBIC), place)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def draft(data: bytes, least: int) -> np.ndarray:
    """Decode at the smallest size of JPEG's own that is not below `least` pixels."""
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft("RGB", (least, least))
        return np.asarray(picture.convert("RGB"))


if __name__ == "__main__":
    main()
