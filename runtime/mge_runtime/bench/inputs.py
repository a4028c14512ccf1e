"""The pictures that are timed: photographs that were named, or pictures drawn here."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.bench.deadline import UNBOUNDED, Deadline
from mge_runtime.decode import decode_picture
from mge_runtime.errors import InputError
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import to_frame

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from mge_runtime.sources import NamedImage

__all__ = ["Inputs", "drawn_inputs", "photograph_inputs"]

_DRAWN = 8
_MOST = 1000  # photographs: their frames stay in memory, 600 kB each at 448 pixels
_HEIGHT, _WIDTH = 960, 1280  # of drawn pictures, pixels


@dataclass(frozen=True)
class Inputs:
    """Pictures as files and as frames.

    Photographs stay where they lie: a thousand of a phone's are gigabytes.
    """

    files: tuple[Path | bytes, ...]
    frames: NDArray[np.uint8]  # [N, S, S, 3], RGB, of the same pictures
    source: str  # for people

    def batch(self, size: int) -> tuple[list[bytes], NDArray[np.uint8]]:
        """The first pictures, again from the start where there are fewer than `size`: bytes of files, and frames.

        Raises:
            InputError: a file cannot be read any more.
        """
        numbers = [number % len(self.files) for number in range(size)]
        read = [_read(file) for file in self.files[:size]]
        return [read[number] for number in numbers], self.frames[numbers]


def photograph_inputs(
    images: Sequence[NamedImage],
    spec: Preprocess,
    deadline: Deadline = UNBOUNDED,
    report: Callable[[InputError], None] = lambda _: None,
) -> Inputs:
    """Read and decode photographs as `Pipeline.predict` does: the first thousand of them, at least one.

    Args:
        images: at least one.
        spec: how.
        deadline: those that are not read by then are left out.
        report: is told of each that cannot be read; it is left out, too.

    Raises:
        InputError: none can be read.
    """
    sources: list[Path | bytes] = []
    frames: list[NDArray[np.uint8]] = []
    problems: list[InputError] = []
    for image in images[:_MOST]:
        if frames and deadline.left <= 0:
            break
        try:
            source = image.source()
            frames.append(to_frame(decode_picture(source), spec)[0])
        except InputError as problem:
            problems.append(problem)
            continue
        sources.append(source)
    if not frames:
        raise problems[0]
    for problem in problems:
        report(problem)
    sizes = [len(source) if isinstance(source, bytes) else source.stat().st_size for source in sources]
    megabytes = sum(sizes) / len(sizes) / 1e6
    named = (
        f"{len(images)} named images" if len(sizes) == len(images) else f"{len(sizes)} of {len(images)} named images"
    )
    return Inputs(tuple(sources), np.stack(frames), f"{named} of {megabytes:.2f} MB on average")


def _read(file: Path | bytes) -> bytes:
    try:
        return file if isinstance(file, bytes) else file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; expected a picture file") from error


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
