"""One way from a picture file to RGB pixels, for training, evaluation and the device alike."""

from __future__ import annotations

import importlib
import io
import os
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union, cast

import numpy as np

from mge_runtime.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_PIXELS", "ImageSource", "decode_image", "decode_picture", "load_decoders"]

MAX_PIXELS = 178_956_970  # pixels; where Pillow itself refuses: 512 MiB as RGB

# Everything that `decode_image` takes.
ImageSource = Union["str | os.PathLike[str] | bytes | BinaryIO | Image", np.ndarray]

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")  # Pillow's names
_PLUGINS = ("Jpeg", "Mpo", "Png", "Gif", "Bmp", "Ppm", "WebP", "Tiff", "Jpeg2K", "Avif")
_EXPECTED = "expected a JPEG, PNG, WebP, TIFF, GIF, BMP, PPM, JPEG 2000 or AVIF picture"
_ORIENTATION_TAG = 0x0112  # EXIF and TIFF alike
_TIFF_PHOTOMETRIC_TAG = 262
_TIFF_WHITE_IS_ZERO = 0

_header_lock = threading.Lock()


def decode_image(source: ImageSource) -> np.ndarray:
    """Decode a picture to upright 8-bit RGB pixels, as `decode_picture` does.

    Args:
        source: what `decode_picture` takes; a uint8 RGB array is returned as it is where its memory is contiguous.

    Returns:
        uint8 RGB array [H, W, 3], C-contiguous.

    Raises:
        InputError: as for `decode_picture`.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    return np.array(decode_picture(source))  # a copy: what Pillow lends is read-only


def decode_picture(source: ImageSource) -> Image:
    """Decode a picture to an upright Pillow image of mode RGB; `to_frame` takes it without another copy.

    EXIF orientation is applied; alpha, palette transparency and `tRNS` are composited on white; greyscale, palette,
    CMYK and YCbCr are converted by Pillow; 16-bit greyscale is scaled by 255 / 65535 and rounded (16-bit RGB: Pillow
    keeps the high byte, at most one grey level below that). Of an animation the first frame counts. Colour profiles
    are ignored. JPEGs are decoded at full size, never in Pillow's draft mode: training and the device see the same.

    Args:
        source: a path, the bytes of a picture file, a binary file object (read from where it stands), a Pillow image
            (left unchanged), or a uint8 RGB array [H, W, 3].

    Returns:
        The loaded image; a Pillow image that is upright RGB already is returned itself.

    Raises:
        InputError: the source is missing, unreadable, no picture, of an unsupported kind, damaged, cut short, or larger
            than `MAX_PIXELS`. A picture is decoded whole or not at all.
    """
    from PIL.Image import Image, fromarray

    if isinstance(source, np.ndarray):
        return fromarray(_checked_array(source))
    if isinstance(source, Image):
        return _pixels(source, getattr(source, "filename", "") or "the Pillow image")
    if isinstance(source, bytes):
        name: str = getattr(source, "name", f"the picture of {len(source)} bytes")
        return _decode_stream(io.BytesIO(source), name)
    if isinstance(source, (str, os.PathLike)):
        return _decode_file(Path(source))
    if hasattr(source, "read"):
        return _decode_file_object(source)
    raise InputError(
        f"cannot read an image from {type(source).__name__}; expected a path, bytes, a binary file, "
        "a Pillow image or a uint8 RGB array [H, W, 3]"
    )


def load_decoders() -> None:
    """Import Pillow and its decoders, so that the first picture is not charged for it; later calls do nothing."""
    _formats()


def _checked_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise InputError(
            f"cannot use the array of type {array.dtype} and shape {list(array.shape)}; "
            "expected uint8 RGB [H, W, 3] with H and W at least 1: convert it first"
        )
    return np.ascontiguousarray(array)


def _decode_file(path: Path) -> Image:
    try:
        with path.open("rb") as stream:
            return _decode_stream(stream, str(path))
    except FileNotFoundError as error:
        raise InputError(f"no image at {path}: the file does not exist; check the name") from error
    except IsADirectoryError as error:
        raise InputError(f"cannot read {path}: it is a folder; expected an image file, name one inside it") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}; expected a readable image file") from error


def _decode_file_object(stream: BinaryIO) -> Image:
    name = getattr(stream, "name", None)
    name = name if isinstance(name, str) else "the image stream"
    try:
        data = cast(Any, stream.read())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {name}: {error}; expected a readable binary file") from error
    if not isinstance(data, bytes):
        raise InputError(f"cannot read {name}: it yields {type(data).__name__}; expected a file opened in binary mode")
    return _decode_stream(io.BytesIO(data), name)


def _decode_stream(stream: BinaryIO, name: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    head = stream.read(512)
    if not head:
        raise InputError(f"cannot decode {name}: it is empty (0 bytes); {_EXPECTED}")
    stream.seek(0)
    try:
        with _quiet_header():
            image = Image.open(stream, formats=_formats())
    except UnidentifiedImageError as error:
        raise InputError(f"cannot decode {name}: {_kind(head)}; {_EXPECTED}") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, _size_of(stream)) from error
    except Exception as error:  # damaged headers make Pillow raise almost anything
        raise _damaged(name, error) from error
    with image:
        return _pixels(image, name)


def _size_of(stream: BinaryIO) -> str:
    """Read the size of a picture that Pillow will not open for its size; no pixel is decoded."""
    from PIL import Image

    stream.seek(0)
    with _quiet_header():
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(stream, formats=_formats()) as image:
                return f"{image.width} x {image.height} pixels"
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _pixels(image: Image, name: str) -> Image:
    """Load, convert and turn one Pillow image, which stays as it was."""
    from PIL.Image import DecompressionBombError

    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width} x {height} pixels")
    if width * height == 0:
        raise InputError(f"cannot use {name}: it is {width} x {height} pixels; expected at least 1 x 1")
    try:
        image.load()
        with _quiet_header():
            orientation = image.getexif().get(_ORIENTATION_TAG)
        return _oriented(_to_rgb(image, name), orientation)
    except InputError:
        raise
    except DecompressionBombError as error:  # a frame larger than the picture it belongs to
        raise _too_large(name, f"{width} x {height} pixels with a frame beyond that") from error
    except Exception as error:  # damaged data makes Pillow raise almost anything
        raise _damaged(name, error) from error


def _to_rgb(image: Image, name: str) -> Image:
    """Convert any mode of Pillow to RGB, transparency composited on white."""
    import PIL.Image

    if image.mode == "F":
        raise InputError(
            f"cannot use {name}: its pixels are floating-point numbers of unknown range; "
            "expected integers: convert it to 8 or 16 bits a channel"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return PIL.Image.fromarray(_grey_from_16_bit(image, name)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = PIL.Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_from_16_bit(image: Image, name: str) -> np.ndarray:
    """Scale 16-bit grey to uint8 [H, W]: value * 255 / 65535, rounded. Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:  # mode "I" is signed 32-bit
        raise InputError(
            f"cannot use {name}: its grey values run from {low} to {high}; "
            "expected 0 to 65535: convert it to 8 or 16 bits without sign"
        )
    grey = ((values + 128) // 257).astype(np.uint8)
    # Pillow turns WhiteIsZero over for 1 to 8 bits, not for 16.
    if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC_TAG) == _TIFF_WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def _oriented(image: Image, orientation: object) -> Image:
    """Turn an image upright by its EXIF orientation (1 to 8, EXIF 2.32, 4.6.4 A); other values mean upright."""
    from PIL.Image import Transpose

    method = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation if isinstance(orientation, int) else 1)
    return image if method is None else image.transpose(method)


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow can read (older ones lack AVIF); others, PostScript above all, are never tried."""
    from PIL import Image

    # `Image.init` would import some forty plugins, twice the time.
    for plugin in _PLUGINS:
        with suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _quiet_header() -> Generator[None, None, None]:
    """Read a header without Pillow's warnings: what matters of them is raised as an error here.

    Warning filters belong to the whole process, so headers are read one at a time; pixels are decoded outside.
    """
    with _header_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        yield


def _kind(head: bytes) -> str:
    """Say what a file that is none of the known pictures seems to be."""
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
            return "it is an HEIC picture, convert it to JPEG"
        return "it is a video or an unknown ISO media file"
    for magic, kind in ((b"%PDF", "a PDF"), (b"%!PS", "PostScript"), (b"PK\x03\x04", "a ZIP archive")):
        if head.startswith(magic):
            return f"it is {kind}"
    if b"<svg" in head:
        return "it is an SVG drawing, render it to PNG"
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")):
        return "its header is damaged, cut short or of an unsupported kind"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        return "it is a text file"
    return "it is no known picture"


def _damaged(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"cannot decode {name}: {reason}; expected a whole, undamaged picture: copy or save it again")


def _too_large(name: str, found: str) -> InputError:
    return InputError(
        f"will not decode {name}: it is {found}; expected at most {MAX_PIXELS / 1e6:.0f} megapixels: "
        "scale it down first"
    )
