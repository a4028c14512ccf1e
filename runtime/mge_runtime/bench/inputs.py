"""The pictures that are timed: photographs that were named, or pictures drawn here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.decode import decode_picture
from mge_runtime.errors import InputError
from mge_runtime.preprocess import to_frame
from mge_runtime.spec import Preprocess

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.sources import NamedImage

__all__ = ["Inputs", "drawn_inputs", "photograph_inputs"]

_DRAWN = 8
_HEIGHT, _WIDTH = 960, 1280  # of drawn pictures, pixels


@dataclass(frozen=True)
class Inputs:
    """Pictures as files and as frames."""

    files: tuple[bytes, ...]
    frames: NDArray[np.uint8]  # [N, S, S, 3], RGB, of the same pictures
    source: str  # for people

    def batch(self, size: int) -> tuple[list[bytes], NDArray[np.uint8]]:
        """The first pictures, again from the start where there are fewer than `size`."""
        numbers = [number % len(self.files) for number in range(size)]
        return [self.files[number] for number in numbers], self.frames[numbers]


def photograph_inputs(images: Sequence[NamedImage], spec: Preprocess) -> Inputs:
    """Read and decode photographs as `Pipeline.predict` does.

    Raises:
        InputError: one cannot be read.
    """
    files: list[bytes] = []
    for image in images:
        source = image.source()
        try:
            files.append(source if isinstance(source, bytes) else source.read_bytes())
        except OSError as error:
            raise InputError(f"cannot read {image.name}: {error.strerror}; expected a picture file") from error
    # The sources, not the bytes: an error names the file.
    sources = [image.path or file for image, file in zip(images, files, strict=True)]
    frames = [to_frame(decode_picture(source), spec)[0] for source in sources]
    megabytes = sum(map(len, files)) / len(files) / 1e6
    return Inputs(tuple(files), np.stack(frames), f"{len(files)} named images of {megabytes:.2f} MB on average")


def drawn_inputs(spec: Preprocess) -> Inputs:
    """Draw soft colour fields with some grain, the same at every call, and write them as JPEG files of quality 90."""
    from PIL import Image

    rng = np.random.default_rng(2019)
    files: list[bytes] = []
    for _ in range(_DRAWN):
        cells = rng.integers(0, 256, (*rng.integers(3, 9, 2), 3), np.uint8)
        field = Image.fromarray(cells).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (_HEIGHT, _WIDTH, 1))
        picture = np.clip(np.asarray(field) + grain, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    frames = [to_frame(decode_picture(file), spec)[0] for file in files]
    source = f"{_DRAWN} drawn JPEG files of {_WIDTH} x {_HEIGHT} pixels; name photographs to measure with them"
    return Inputs(tuple(files), np.stack(frames), source)
