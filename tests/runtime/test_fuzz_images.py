"""Mutated image files of every format end in a right-shaped image or an InputError, soon and within bounded memory."""

import time
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from PIL import Image, features

from mge_runtime.decode import decode_image
from mge_runtime.errors import InputError
from tests.helpers.damage import fuzz, mutated
from tests.helpers.images import saved

MAX_PIXELS = 1_000_000
SECONDS = 20  # for one image, on a machine that is busy

KINDS: dict[str, tuple[str, str, dict[str, object]]] = {
    "jpeg": ("JPEG", "RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
    "progressive": ("JPEG", "RGB", {"progressive": True}),
    "cmyk": ("JPEG", "CMYK", {}),
    "png": ("PNG", "RGBA", {}),
    "png palette": ("PNG", "P", {}),
    "png 16": ("PNG", "I;16", {}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff lzw": ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
    "tiff 16": ("TIFF", "I;16", {}),
    "webp": ("WEBP", "RGB", {}),
    "webp lossless": ("WEBP", "RGBA", {"lossless": True}),
    "gif": ("GIF", "P", {}),
    "bmp": ("BMP", "RGB", {}),
    "ppm": ("PPM", "RGB", {}),
    "avif": ("AVIF", "RGB", {}),
}
if not features.check("avif"):
    del KINDS["avif"]


@cache
def seed_file(kind: str) -> bytes:
    name, mode, options = KINDS[kind]
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = pixels[..., 0].astype(np.uint16) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    return saved(image, name, **options)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # decoders warn of what they repair
@fuzz(250)
@given(drawn=mutated(KINDS, seed_file))
def test_mutated_files_are_refused_or_decoded(drawn):
    start = time.process_time()
    with suppress(InputError):
        image = decode_image(drawn[1], MAX_PIXELS)
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
        assert 0 < image.shape[0] * image.shape[1] <= MAX_PIXELS
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_that_are_mutated_are_whole(kind):
    assert sorted(decode_image(seed_file(kind)).shape) == [3, 12, 16]
