"""One way from an image file to RGB pixels, for training, evaluation and the device alike."""

from __future__ import annotations

import importlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np

from mge_runtime.errors import InputError, brief
from mge_runtime.image_files import (
    entropy_end,
    jpeg_lacks_scans,
    jpeg_scans,
    kind_of,
    png_lacks_data,
    tiff_fault,
    webp_size,
    without_metadata,
)
from mge_runtime.sources import MAX_BYTES, MAX_PIXELS, is_url, read_stream

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_SIDE = 65_535  # pixels; the longest side of a JPEG

# Everything that `decode_image` takes.
ImageSource = Union["str | os.PathLike[str] | bytes | BinaryIO | Image", np.ndarray]

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF")  # Pillow's names
_PLUGINS = ("Jpeg", "Mpo", "Png", "Gif", "Bmp", "Ppm", "WebP", "Tiff", "Avif")
_EXPECTED = "expected a JPEG, PNG, WebP, TIFF, GIF, BMP, PPM or AVIF image"
_ORIENTATION = 0x0112  # EXIF 2.32, 4.6.4 A; by its value, how Pillow turns such an image upright
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip

_MOST_SCANS = 100  # of a JPEG, as libtiff allows; each takes its time over all pixels, and ten bytes of the file

_header_lock = threading.Lock()


def decode_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image to upright 8-bit pixels, uint8 RGB [H, W, 3], C-contiguous.

    Args and errors are those of `open_image`; a uint8 RGB array is returned as it is where it is contiguous.
    """
    if isinstance(source, np.ndarray):
        return np.ascontiguousarray(rgb_array(source))
    image = open_image(source, max_pixels)
    with _refusing("the image"):
        return np.array(image)  # a copy: what Pillow lends is read-only


def open_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode an image to an upright Pillow image of mode RGB; `to_frame` takes it without another copy.

    EXIF orientation is applied; transparency is composited on white; other color modes are converted by Pillow. Samples
    of up to 16 bits are scaled from the range of their bits to 0 .. 255: gray is rounded, of 16-bit RGB and CMYK Pillow
    keeps the high byte, at most one level below that. Of an animation the first frame counts. Color profiles are
    ignored, and so is broken metadata. JPEGs are decoded at full size: training and the device see the same.

    Refused and named is what Pillow reads wrongly or not at all: floating-point, signed and 32-bit samples, 12-bit and
    lossless JPEG, TIFF of odd bits or of more than 8 bits in separate planes, a file that ends before its pixels do,
    and damage that a checksum or the decoder finds; and a JPEG of more than 100 scans, which would take hours. Damage
    inside a format without checksums (JPEG, BMP, PPM, raw TIFF) can go unnoticed, as can a cut in the last scan of a
    progressive JPEG or in the last block of another.

    Memory while decoding: up to 30 bytes a pixel (AVIF of 12 bits with alpha; WebP 17, JPEG and PNG 12), of which the
    image returned keeps 4.

    Args:
        source: a path, the bytes of an image file, a binary file object (read from where it stands), a Pillow image
            (left unchanged), or a uint8 RGB array [H, W, 3].
        max_pixels: the most that an image may have; a side has at most `MAX_SIDE`.

    Returns:
        The loaded image; a Pillow image that is upright RGB already is returned itself.

    Raises:
        InputError: the source is missing, no regular file, unreadable, no image, of an unsupported kind, damaged, cut
            short, or larger than it may be or than memory.
    """
    from PIL.Image import Image, fromarray

    if isinstance(source, np.ndarray):
        return fromarray(rgb_array(source))
    if isinstance(source, Image):
        name = getattr(source, "filename", "") or "the Pillow image"
        with _refusing(name):
            _check_size(source.size, name, max_pixels)
            return _pixels(source, name)
    stream, name = _opened(source)
    with stream, _refusing(name):
        return _decoded(stream, name, max_pixels)


def check_header(path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Check that an image opens and has a size that may be decoded; what its header does not show stays unnoticed.

    Raises:
        InputError: `open_image` would refuse it.
    """
    stream, name = _opened(path)
    with stream, suppress(Exception):
        _check_webp(stream, name, max_pixels)
        with _header(stream) as image:
            _check_size(image.size, name, max_pixels)
        return
    open_image(path, max_pixels)  # it knows what is wrong, and what after all is not


@cache
def load_decoders() -> tuple[str, ...]:
    """Import Pillow's decoders, so that the first image is not charged for it.

    Returns:
        The formats that this Pillow reads (older ones lack AVIF); others, PostScript above all, are never tried.
    """
    from PIL import Image

    # `Image.init` would import some forty plugins, twice the time.
    for plugin in _PLUGINS:
        with suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def rgb_array(array: np.ndarray) -> np.ndarray:
    """The array, if it is uint8 RGB [H, W, 3].

    Raises:
        InputError: it is not.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise InputError(
            f"cannot use the array of type {array.dtype} and shape {list(array.shape)}; "
            "expected uint8 RGB [H, W, 3] with H and W at least 1: convert it first"
        )
    return array


def _opened(source: str | os.PathLike[str] | bytes | BinaryIO) -> tuple[BinaryIO, str]:
    """A source as a stream from its start, and its name."""
    if isinstance(source, bytes):
        return io.BytesIO(source), getattr(source, "name", f"the image of {len(source)} bytes")
    if isinstance(source, (str, os.PathLike)):
        return _opened_file(Path(source)), str(Path(source))
    if not hasattr(source, "read"):
        raise InputError(
            f"cannot read an image from {type(source).__name__}; expected a path, bytes, a binary file, "
            "a Pillow image or a uint8 RGB array [H, W, 3]"
        )
    name = getattr(source, "name", None)
    name = name if isinstance(name, str) else "the image stream"
    return io.BytesIO(read_stream(source, name, "the bytes of one image")), name


def _opened_file(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # a pipe would be waited for
            raise InputError(f"cannot read {path}: it is a pipe, socket or device; expected an image file")
        return path.open("rb")
    except FileNotFoundError as error:
        if is_url(str(path)):
            url = str(path).replace(":/", "://", 1)  # as it was before it became a path
            raise InputError(f"cannot read {url}: it is a URL; expected a file, download it first") from error
        what = "it is a link to nothing" if path.is_symlink() else "the file does not exist"
        raise InputError(f"no image at {path}: {what}; check the name") from error
    except IsADirectoryError as error:
        raise InputError(f"cannot read {path}: it is a folder; expected an image file, name one inside it") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}; expected a readable image file") from error


def _decoded(stream: BinaryIO, name: str, max_pixels: int) -> Image:
    _check_webp(stream, name, max_pixels)
    try:
        return _decoded_as_it_is(stream, name, max_pixels)
    except (InputError, MemoryError):
        raise
    except Exception as error:
        from PIL import UnidentifiedImageError

        file = _whole(stream)
        if bare := without_metadata(file):  # broken metadata is no reason: once more without
            with suppress(Exception):
                return _decoded_as_it_is(io.BytesIO(bare), name, max_pixels)
        if isinstance(error, UnidentifiedImageError):
            raise InputError(f"cannot decode {name}: {kind_of(file)}; {_EXPECTED}") from error
        raise


def _check_webp(stream: BinaryIO, name: str, max_pixels: int) -> None:
    """Check the size before Pillow opens the file: of a WebP it then allocates all pixels."""
    if size := webp_size(stream.read(30)):
        _check_size(size, name, max_pixels)


def _decoded_as_it_is(stream: BinaryIO, name: str, max_pixels: int) -> Image:
    with _header(stream) as image:
        _check_size(image.size, name, max_pixels)
        if image.format in ("JPEG", "MPO") and (scans := jpeg_scans(_whole(stream))) > _MOST_SCANS:
            raise InputError(
                f"will not decode {name}: it has {scans} scans; expected at most {_MOST_SCANS}: save it again"
            )
        pixels = _pixels(image, name)
        if _lacks_data(image, stream):
            raise EOFError("it is cut short")
        return pixels


def _lacks_data(image: Image, stream: BinaryIO) -> bool:
    """Whether a decoded JPEG or PNG ends before its pixels do, although its end is marked.

    Decoders fill what is missing with one color, so that most images need no second look: black rows at the end of a
    PNG are counted in the file; a JPEG whose last pixel is mid-gray is decoded again with bytes added behind its data,
    which change nothing where it is whole. A progressive JPEG lacks data, too, where a coefficient never came or
    without its last bits; one that lacks the end of its last scan alone is not found out.
    """
    if image.format == "PNG":
        rows = np.asarray(image.crop((0, max(image.height - 2, 0), image.width, image.height)))
        return not rows.reshape(len(rows), -1).any(axis=1).all() and png_lacks_data(_whole(stream))
    if image.format not in ("JPEG", "MPO"):
        return False
    if image.info.get("progressive") and jpeg_lacks_scans(_whole(stream)):
        return True
    last = np.asarray(image.crop((image.width - 1, image.height - 1, image.width, image.height)), np.int16)
    if np.abs(last - 127).max() > 2:
        return False
    file = _whole(stream)
    end = entropy_end(file)
    longer = _header(io.BytesIO(file[:end] + bytes(range(1, 251)) + file[end:]))
    return not np.array_equal(np.asarray(image), np.asarray(longer))


@contextmanager
def _refusing(name: str) -> Generator[None]:
    """Make one error of everything that a decoder raises; damaged data makes Pillow raise almost anything."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        message = f"cannot decode {name}: there is not enough memory for it; free some, or scale it down first"
        raise InputError(message) from error
    except Exception as error:
        message = f"cannot decode {name}: {brief(error)}; expected a whole, undamaged image: copy or save it again"
        raise InputError(message) from error


def _header(stream: BinaryIO) -> Image:
    """The image of a file, before its pixels are decoded."""
    import PIL.Image

    stream.seek(0)
    with _quiet():
        # Sizes are checked here, with what was found; Pillow's limit would hide that.
        limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            return PIL.Image.open(stream, formats=load_decoders())
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _quiet() -> Generator[None]:
    """Read a header without Pillow's warnings: what matters of them is raised as an error here.

    Warning filters belong to the whole process, so headers are read one at a time; pixels are decoded outside.
    """
    with _header_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        yield


def _whole(stream: BinaryIO) -> bytes:
    stream.seek(0)
    return stream.read(MAX_BYTES)  # no image is larger; it may be anything


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height == 0:
        raise InputError(f"cannot use {name}: it is {width} x {height} pixels; expected at least 1 x 1")
    if width * height > max_pixels or max(size) > MAX_SIDE:
        raise InputError(
            f"will not decode {name}: it is {width} x {height} pixels; expected at most {max_pixels / 1e6:.3g} "
            f"megapixels and {MAX_SIDE} a side: scale it down first, or allow more pixels (--max-pixels)"
        )


def _pixels(image: Image, name: str) -> Image:
    """Load, convert and turn one Pillow image, which stays as it was."""
    from PIL.Image import Transpose

    if image.format == "TIFF" and (fault := tiff_fault(image)):
        raise InputError(
            f"cannot use {name}: it is {fault}; expected a whole one of 8 or 16 bits without sign: convert it"
        )
    image.load()
    turn: str | None = None
    with _quiet(), suppress(Exception):  # broken metadata never stops an image
        orientation: Any = image.getexif().get(_ORIENTATION)
        turn = _TURNS.get(orientation)
    rgb = _to_rgb(image, name)
    if turn is None:
        return rgb
    upright = rgb.transpose(Transpose[turn])
    upright.info = {}  # its orientation is no longer true: whoever decodes it again would turn it again
    return upright


def _to_rgb(image: Image, name: str) -> Image:
    """Convert any mode of Pillow to RGB, transparency composited on white."""
    import PIL.Image

    if image.mode == "F":
        raise InputError(
            f"cannot use {name}: its pixels are floating-point numbers of unknown range; "
            "expected integers: convert it to 8 or 16 bits a channel"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return PIL.Image.fromarray(_gray_from_integers(image, name)).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())  # alpha is divided out
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = PIL.Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray_from_integers(image: Image, name: str) -> np.ndarray:
    """Scale gray of 16 bits (12 in some TIFFs) to uint8 [H, W], rounded; Pillow's own conversion would clip at 255."""
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    most: int = 2 ** min(tags.get(258, (16,))[0], 16) - 1
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > most:  # mode "I" is signed 32-bit
        raise InputError(
            f"cannot use {name}: its gray values run from {low} to {high}; "
            f"expected 0 to {most}: convert it to 8 or 16 bits without sign"
        )
    levels = ((np.arange(most + 1) * 510 + most) // (2 * most)).astype(np.uint8)  # value * 255 / most, rounded
    # Pillow turns WhiteIsZero over for 1 to 8 bits, not for 16.
    if tags.get(262) == 0:
        levels = 255 - levels
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and 0 <= transparent <= most:
        levels[transparent] = 255
    return levels[values]
