"""The frames that an export is verified on: the user's images if there are any, else generated ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mge_runtime.bench_subject import synthetic_image
from mge_runtime.decode import MAX_PIXELS, decode_image
from mge_runtime.errors import InputError
from mge_runtime.layouts import list_images
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import to_frame

VERIFY_FOLDER = "a folder of images such as .jpg to verify on: name one with --verify-data"  # of an error
BATCH_IMAGES = 4  # frames computed at once; bounds memory


@dataclass(frozen=True)
class VerifyImages:
    """Frames, made one at a time when they are needed: hundreds at 448 pixels would fill the memory."""

    count: int
    photographs: bool  # False: generated images
    source: str  # for the report; no path of this machine
    load: Callable[[int], np.ndarray]  # index -> frame, uint8 [S, S, 3]

    def batches(self) -> Iterator[np.ndarray]:
        """All frames in turn, uint8 [B, S, S, 3]: the first alone, as a chain usually runs, then a few at a time.

        Raises:
            InputError: an image cannot be decoded.
        """
        yield self.load(0)[None]
        for start in range(1, self.count, BATCH_IMAGES):
            yield np.stack([self.load(i) for i in range(start, min(start + BATCH_IMAGES, self.count))])


def find_verify_images(
    folder: Path,
    preprocess: Preprocess,
    limit: int,
    say: Callable[[str], None] = lambda _: None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> VerifyImages:
    """Take up to `limit` images (0: all), evenly spaced through a folder's list so that all of its classes have a part.

    Of a data set with a list, its validation split is taken. The rest is as for `photographs`.

    Raises:
        InputError: there is no such folder, or no image in it that can be decoded.
    """
    listed = list_images(folder, "val", VERIFY_FOLDER)
    found = listed.whole()
    if note := listed.note():
        say(f"{folder}: {note}")
    count = min(limit, len(found)) if limit else len(found)
    chosen = [found[index * len(found) // count].path for index in range(count)]
    origin = f"of {len(found)} images in {folder.resolve().name}"
    return photographs(chosen, origin, preprocess, say, max_pixels=max_pixels)


def photographs(
    chosen: Sequence[Path | bytes],
    origin: str,
    preprocess: Preprocess,
    say: Callable[[str], None] = lambda _: None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> VerifyImages:
    """Images to verify on.

    Args:
        chosen: files, or their bytes.
        origin: of them, for the report: "of 20 images in holiday".
        preprocess: what the runtime will do to them.
        say: is told of each image that cannot be decoded; it is left out.
        max_pixels: as for `decode_image`.

    Raises:
        InputError: none of them can be decoded.
    """
    # Decoded once now, so that a damaged one is known before the export and not after it.
    good = [source for source in chosen if _decodes(source, say, max_pixels)]
    if not good:
        raise InputError(f"none of the {len(chosen)} images ({origin}) could be decoded; expected photographs")

    def load(index: int) -> np.ndarray:
        return to_frame(decode_image(good[index], max_pixels), preprocess)[0]

    return VerifyImages(len(good), True, f"{len(good)} {origin}", load)


def _decodes(source: Path | bytes, say: Callable[[str], None], max_pixels: int) -> bool:
    try:
        decode_image(source, max_pixels)
    except InputError as problem:
        say(f"left out of the verification: {problem}")
        return False
    return True


def generated_images(preprocess: Preprocess, count: int) -> VerifyImages:
    """Make images, the same ones each time: see `synthetic_image`."""
    side, source = preprocess.size, f"{count} generated images, no photographs"
    return VerifyImages(count, False, source, lambda index: np.array(synthetic_image(index, side, side)))
