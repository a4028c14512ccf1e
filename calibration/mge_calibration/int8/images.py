"""The images that INT8 ranges are learned from: which ones, and what is recorded of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mge_calibration.folder import short_digest
from mge_runtime.decode import decode_image
from mge_runtime.errors import InputError
from mge_runtime.preprocess import to_frame
from mge_runtime.sources import list_folder
from mge_runtime.spec import Preprocess

__all__ = ["MIN_IMAGES", "CalibrationImages", "read_calibration_images"]

MIN_IMAGES = 100


@dataclass(frozen=True)
class CalibrationImages:
    """Frames of a folder, and the hash of the files they came from."""

    frames: np.ndarray  # uint8 [N, S, S, 3], in the order drawn: the first few are a random draw, too
    sha256: str  # over names within the folder and bytes of the images taken, as the folder sorts them
    source: str  # for people
    digests: tuple[str, ...] = ()  # of each file, sorted: by these `mge-calibrate` keeps them away from exits


def read_calibration_images(
    folder: Path,
    preprocess: Preprocess,
    *,
    limit: int,
    seed: int,
    few: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> CalibrationImages:
    """Read images of a folder in an order drawn by seed from its sorted list; labels are of no use here.

    Args:
        folder: searched with its subfolders.
        preprocess: what the runtime will do to them.
        limit: the most to take; 0: all.
        seed: of the order, and so of the draw where the folder has more than `limit`.
        few: take fewer than `MIN_IMAGES`, too.
        say: is told of each image that cannot be decoded; it is left out.

    Raises:
        InputError: no such folder, one that cannot be listed, or too few images in it that can be decoded.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise InputError(f"{folder} is {kind}; expected a folder of images to calibrate on: name one with --calib-data")
    found = list_folder(folder)
    images = found.whole()
    if remark := found.remark():
        say(f"{folder}: {remark}")
    order: list[int] = np.random.default_rng(seed).permutation(len(images)).tolist()
    chosen = order[: limit or None]
    size = preprocess.size
    frames = np.empty((len(chosen), size, size, 3), np.uint8)
    hashes: dict[int, bytes] = {}
    for index in chosen:
        source = images[index].source()
        try:
            frame = to_frame(decode_image(source), preprocess)[0]
            content = source if isinstance(source, bytes) else source.read_bytes()
        except (InputError, OSError) as problem:
            say(f"left out of the calibration: {problem}")
            continue
        frames[len(hashes)] = frame
        name = source.relative_to(folder).as_posix() if isinstance(source, Path) else ""
        hashes[index] = name.encode(errors="surrogateescape") + b"\0" + hashlib.sha256(content).digest()
    count = len(hashes)
    if not count or (count < MIN_IMAGES and not few):
        raise InputError(
            f"{folder} gave {count} images to calibrate on; expected at least {MIN_IMAGES}, since fewer do not "
            "show how far activations go: name a folder with more" + (", or add --force-few-images" if count else "")
        )
    digest = hashlib.sha256(b"".join(hashes[index] for index in sorted(hashes)))
    text = f"{count} of {len(images)} images in {folder.resolve().name}"
    digests = tuple(sorted(short_digest(entry[-digest.digest_size :].hex()) for entry in hashes.values()))
    return CalibrationImages(frames[:count], digest.hexdigest(), text, digests)
