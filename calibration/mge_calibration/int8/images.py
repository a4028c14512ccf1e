"""The images that INT8 ranges are learned from: which ones, and what is recorded of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mge_calibration.images import short_digest
from mge_runtime.decode import MAX_PIXELS, decode_image
from mge_runtime.errors import InputError
from mge_runtime.layouts import list_images, relative_name
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import to_frame

MIN_IMAGES = 100
CALIBRATION_FOLDER = "a folder of images to calibrate on: name one with --calib-data"  # of an error


@dataclass(frozen=True)
class CalibrationImages:
    """Frames of a folder, and the hash of the files they came from."""

    frames: np.ndarray  # uint8 [N, S, S, 3], in the order drawn: the first few are a random draw, too
    sha256: str  # over names within the folder and bytes of the images taken, as the folder sorts them
    source: str  # for people
    digests: tuple[str, ...] = ()  # of each file, `held_out` too, sorted: `mge-calibrate` keeps them away from exits
    held_out: tuple[Path, ...] = ()  # images of the same folder that set no ranges, to verify on


def read_calibration_images(
    folder: Path,
    preprocess: Preprocess,
    *,
    limit: int,
    seed: int,
    few: bool = False,
    hold_out: int = 0,
    say: Callable[[str], None] = lambda _: None,
    max_pixels: int = MAX_PIXELS,
) -> CalibrationImages:
    """Read images of a folder in an order drawn by seed from its sorted list; labels are of no use here.

    Args:
        folder: searched with its subfolders; or a data set with a list, whose training images are taken.
        preprocess: what the runtime will do to them.
        limit: the most to take; 0: all.
        seed: of the order, and so of the draw where the folder has more than `limit`.
        few: take fewer than `MIN_IMAGES`, too; a quarter of the images at most is then held out.
        hold_out: how many to keep from the ranges, the last of the order: fewer, but one, where else fewer than
            `MIN_IMAGES` were left; copies of images that set ranges are dropped.
        say: is told of each image that cannot be read; it is left out.
        max_pixels: as for `decode_image`.

    Raises:
        InputError: no such folder, one that cannot be listed, or too few images in it that can be decoded.
    """
    found = list_images(folder, "train", CALIBRATION_FOLDER)
    paths = [image.path for image in found.whole()]
    if message := found.note():
        say(f"{folder}: {message}")
    order: list[int] = np.random.default_rng(seed).permutation(len(paths)).tolist()
    spare = min(hold_out, len(order) // 4 if few else len(order))
    size = preprocess.size
    frames = np.empty((min(limit or len(order), len(order)), size, size, 3), np.uint8)
    contents: dict[int, bytes] = {}  # SHA-256 of the files that set ranges
    tried = 0
    for index in order[: limit or None]:
        left = len(order) - tried
        if left <= spare and (few or left == 1 or len(contents) >= MIN_IMAGES):
            break
        tried += 1
        path = paths[index]
        try:
            frame = to_frame(decode_image(path, max_pixels), preprocess)[0]
            content = hashlib.sha256(path.read_bytes()).digest()
        except (InputError, OSError) as problem:
            say(f"left out of the calibration: {problem}")
            continue
        frames[len(contents)] = frame
        contents[index] = content
    held = order[max(tried, len(order) - spare) :]
    count = len(contents)
    if not count or (count + bool(held) < MIN_IMAGES and not few):
        raise InputError(
            f"{folder} gave {count} images to calibrate on{', beside those held out to verify on' if held else ''}; "
            f"expected at least {MIN_IMAGES}, since fewer do not show how far activations go: name a folder with more"
            + (", verify on others with --verify-data" if held else "")
            + (", or add --force-few-images" if count else "")
        )
    held_out: dict[Path, bytes] = {}
    for path in (paths[index] for index in held):
        try:
            content = hashlib.sha256(path.read_bytes()).digest()
        except OSError as problem:
            say(f"left out of the images to verify on: {problem}")
            continue
        if content not in contents.values():
            held_out[path] = content
    if hold_out and not held_out:
        raise InputError(
            f"{folder} has no image left to verify on beside {count} that set ranges; expected at least one: "
            "name a folder with more, or others with --verify-data"
        )
    digest = hashlib.sha256()
    for index in sorted(contents):
        name = relative_name(paths[index], folder)
        digest.update(name.encode(errors="surrogateescape") + b"\0" + contents[index])
    known = {*contents.values(), *held_out.values()}
    return CalibrationImages(
        frames[:count],
        digest.hexdigest(),
        f"{count} of {len(paths)} images in {folder.resolve().name}",
        tuple(sorted(short_digest(content.hex()) for content in known)),
        tuple(held_out),
    )
