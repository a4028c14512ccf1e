"""Every kind of image becomes the same RGB pixels everywhere, or one clear line."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from mge_runtime import decode
from mge_runtime.decode import decode_image
from mge_runtime.errors import InputError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: list[bytes], extra: bytes = b"") -> bytes:
    """Write a PNG by hand; color: 0 gray, 2 RGB, 3 palette, 4 gray + alpha, 6 RGB + alpha."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes) -> list[list[int]]:
    """Decode a image of one row."""
    decoded = decode_image(data)
    assert decoded.dtype == np.uint8
    assert decoded.shape[0] == 1
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    return decoded[0].tolist()


PALETTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 200, 0, 0, 0, 90]))
FADED = PALETTE + chunk(b"tRNS", bytes([0, 51]))  # red gone, green at 51, blue opaque
# 16 bits: value / 257, rounded. 128 / 257 = 0.498, 129 / 257 = 0.502, 32768 / 257 = 127.502
SIXTEEN = [0, 128, 129, 25700, 32768, 65535]
EIGHT = [[value] * 3 for value in (0, 0, 1, 100, 128, 255)]
# Of a PNG: bits, color type, one row, what it becomes, further chunks.
ROWS = {
    "rgb": (8, 2, bytes([1, 2, 3, 250, 251, 252]), [[1, 2, 3], [250, 251, 252]]),
    "gray": (8, 0, bytes([0, 77, 255]), [[0] * 3, [77] * 3, [255] * 3]),
    # 100 at alpha 51: (100 * 51 + 255 * 204) / 255 = 224
    "gray, alpha": (8, 4, bytes([100, 255, 100, 51, 100, 0]), [[100] * 3, [224] * 3, [255] * 3]),
    # alpha 128: 0 -> 255 * 127 / 255 = 127; 255 stays; 200 -> (200 * 128 + 255 * 127) / 255 = 227.4
    "rgba": (8, 6, bytes([10, 20, 30, 255, 0, 255, 200, 128]), [[10, 20, 30], [127, 255, 227]]),
    "palette": (8, 3, bytes([2, 0, 1]), [[0, 0, 90], [255, 0, 0], [0, 200, 0]], PALETTE),
    "palette, alpha": (8, 3, bytes([2, 0, 1]), [[0, 0, 90], [255, 255, 255], [204, 244, 204]], FADED),
    "rgb, key": (8, 2, bytes([1, 2, 3, 4, 5, 6]), [[255] * 3, [4, 5, 6]], chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3]))),
    "gray, key": (8, 0, bytes([7, 8]), [[255] * 3, [8] * 3], chunk(b"tRNS", bytes([0, 7]))),
    "gray 16, key": (16, 0, bytes([0, 7, 100, 100]), [[255] * 3, [100] * 3], chunk(b"tRNS", bytes([0, 7]))),
    "gray 16": (16, 0, struct.pack(">6H", *SIXTEEN), EIGHT),
    # Pillow keeps the high byte.
    "rgb 16": (16, 2, struct.pack(">6H", 0, 25700, 65535, 0x100, 0x7FFF, 0x8000), [[0, 100, 255], [1, 127, 128]]),
    "rgba 16": (16, 6, struct.pack(">8H", 0, 25700, 65535, 65535, 0, 0, 0, 0), [[0, 100, 255], [255] * 3]),
}


@pytest.mark.parametrize(("bits", "kind", "row", "expected", "extra"), [(*c, b"")[:5] for c in ROWS.values()], ids=ROWS)
def test_png_of_every_kind(bits, kind, row, expected, extra):
    assert pixels(png(len(expected), 1, bits, kind, [row], extra)) == expected


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_tiff_of_either_byte_order(order):
    mode = {"<": "I;16", ">": "I;16B"}[order]
    image = Image.frombytes(mode, (6, 1), struct.pack(f"{order}6H", *SIXTEEN))
    assert pixels(saved(image, "TIFF")) == EIGHT
    assert decode_image(image)[0].tolist() == EIGHT


def test_sixteen_bit_tiff_where_zero_is_white():
    data = saved(Image.frombytes("I;16", (6, 1), struct.pack("<6H", *SIXTEEN)), "TIFF")
    entry = struct.pack("<HHI", 262, 3, 1)
    assert data.count(entry) == 1
    turned = data.replace(entry + struct.pack("<H", 1), entry + struct.pack("<H", 0))
    assert pixels(turned) == [[255 - value for value in pixel] for pixel in EIGHT]


def test_mode_i_within_16_bits_and_beyond():
    assert decode_image(Image.fromarray(np.array([SIXTEEN], np.int32)))[0].tolist() == EIGHT
    for values, found in (([0, 70000], "0 to 70000"), ([-1, 5], "-1 to 5")):
        with pytest.raises(InputError, match=f"gray values run from {found}; expected 0 to 65535"):
            decode_image(Image.fromarray(np.array([values], np.int32)))


def test_float_is_refused():
    with pytest.raises(InputError, match="floating-point numbers of unknown range; expected integers"):
        decode_image(saved(Image.fromarray(np.array([[0, 1.5]], np.float32)), "TIFF"))


def test_cmyk_tiff():
    # A channel is what its ink and black let through: 155 of 255 and 200 of 255 leave 121.6.
    image = Image.frombytes("CMYK", (3, 1), bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 100, 50, 55]))
    decoded = np.array(pixels(saved(image, "TIFF")), int)
    assert np.abs(decoded - [[255, 255, 255], [0, 255, 255], [200, 122, 160]]).max() <= 1


def test_cmyk_jpeg_with_adobe_marker_is_not_a_negative():
    # Adobe writes inks inverted; Pillow does too and turns them back. Cyan, flat, so that JPEG keeps it.
    data = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(decode_image(data).astype(int) - [0, 255, 255]).max() <= 2


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 12 cannot read the uncompressed YCbCr TIFF that it writes"
)
def test_ycbcr_tiff():
    # ITU-R BT.601 full range: Y 76, Cb 85, Cr 255 is red
    image = Image.frombytes("YCbCr", (1, 1), bytes([76, 85, 255]))
    assert np.abs(np.array(pixels(saved(image, "TIFF"))) - [[254, 0, 0]]).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBa", "RGBX", "HSV", "LAB", "PA"])
def test_rarer_modes_of_pillow_decode(mode):
    assert decode_image(Image.new(mode, (3, 2))).shape == (2, 3, 3)


# A 2 x 3 image (three rows of two) stored under each orientation, and the upright one: letters are gray levels.
UPRIGHT = np.array([[10, 20], [30, 40], [50, 60]], np.uint8)
STORED = {
    1: [[10, 20], [30, 40], [50, 60]],
    2: [[20, 10], [40, 30], [60, 50]],
    3: [[60, 50], [40, 30], [20, 10]],
    4: [[50, 60], [30, 40], [10, 20]],
    5: [[10, 30, 50], [20, 40, 60]],
    6: [[20, 40, 60], [10, 30, 50]],
    7: [[60, 40, 20], [50, 30, 10]],
    8: [[50, 30, 10], [60, 40, 20]],
    9: [[10, 20], [30, 40], [50, 60]],  # no such orientation
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(orientation, kind):
    stored = Image.fromarray(np.array(STORED[orientation], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}[kind]
    data = saved(stored, kind, exif=exif, **options)
    np.testing.assert_array_equal(decode_image(data)[..., 0], UPRIGHT)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode_image(image)[..., 0], UPRIGHT)


def test_orientation_of_a_jpeg():
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 255  # left half white; stored with orientation 6: upright after a turn to the right, so top white
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(saved(Image.fromarray(image), "JPEG", exif=exif, quality=95))
    assert decoded.shape == (32, 16, 3)
    assert decoded[:16].min() > 240
    assert decoded[16:].max() < 15


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode_image(data) == [255, 0, 0]).all()


def test_a_pillow_image_stays_as_it_was():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert (decode_image(image) == 255).all()
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (0, 0, 0, 0)


def test_all_sources_agree(tmp_path):
    path = tmp_path / "ä photo.jpg"
    path.write_bytes(saved(Image.fromarray(NOISE), "JPEG"))
    expected = decode_image(path)
    np.testing.assert_array_equal(decode_image(str(path)), expected)
    np.testing.assert_array_equal(decode_image(path.read_bytes()), expected)
    with path.open("rb") as stream:
        np.testing.assert_array_equal(decode_image(stream), expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(decode_image(image), expected)
    with Image.open(path) as image:  # the whole file, as torchvision's loader sees it: no draft mode
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), expected)


def test_arrays_pass_through():
    assert decode_image(NOISE) is NOISE
    turned = NOISE.transpose(1, 0, 2)
    decoded = decode_image(turned)
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, turned)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), NOISE[:0]],
    ids=["float", "gray", "rgba", "empty"],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(InputError, match=r"expected uint8 RGB \[H, W, 3\]"):
        decode_image(array)


# Bad input: one line that names the file, what was found and what was expected.


def refusal(source: object) -> str:
    with pytest.raises(InputError) as caught:
        decode_image(source)  # pyright: ignore[reportArgumentType]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_pipes_devices_links_and_addresses_are_named_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    assert "it is a pipe, socket or device" in refusal(tmp_path / "pipe.jpg")
    assert "it is a pipe, socket or device" in refusal(os.devnull)
    assert "it is a link to nothing" in refusal(tmp_path / "gone.jpg")
    assert refusal("https://example.org/a.jpg?size=3").startswith(
        "cannot read https://example.org/a.jpg?size=3: it is a URL; expected a file, download it first"
    )


def test_missing_folder_and_unreadable(tmp_path):
    assert "the file does not exist; check the name" in refusal(tmp_path / "none.jpg")
    assert "it is a folder; expected an image file" in refusal(tmp_path)
    assert "expected a readable image file" in refusal("nul\0.jpg")
    assert "cannot read an image from int; expected a path" in refusal(3)
    assert "expected a file opened in binary mode" in refusal(io.StringIO("text"))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "it is empty (0 bytes)"),
        (b"I am no image.\n", "it is a text file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is an HEIC image, convert it to JPEG"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "it is a video"),
        (b"%PDF-1.7\n", "it is a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is PostScript"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "it is an SVG drawing"),
        (bytes(range(200)), "it is no known image"),
        (b"RIFF\0\0\0\0AVI LIST", "it is an AVI video"),
        (b"RIFF\0\0\0\0XYZ LIST", "its header is damaged, cut short"),
        (b"8BPS\0\1", "it is a Photoshop file"),
        (b"\x89PNG\r\n\x1a\n", "its header is damaged, cut short"),
    ],
    ids=["empty", "text", "heic", "video", "pdf", "eps", "svg", "bytes", "avi", "riff", "psd", "header"],
)
def test_what_is_no_image(tmp_path, data, found):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    message = refusal(path)
    assert message.startswith(f"cannot decode {path}: ")
    assert found in message
    assert "expected a JPEG, PNG" in message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated_images_are_refused_whole(kind, part):
    data = saved(Image.fromarray(NOISE), kind)
    decode_image(data)
    assert "cannot decode the image of" in refusal(data[: int(len(data) * part)])


def test_a_flipped_byte_in_a_png_is_found():
    data = bytearray(saved(Image.fromarray(NOISE), "PNG"))
    data[len(data) // 2] ^= 0x55
    assert "expected a whole, undamaged image" in refusal(bytes(data))


def test_zero_size():
    assert "cannot decode" in refusal(png(0, 3, 8, 0, [b""] * 3))
    assert "it is 0 x 3 pixels" in refusal(Image.new("RGB", (0, 3)))


def bomb(side: int) -> bytes:
    """Make a PNG of side x side black pixels that is small on the disk."""
    squeeze = zlib.compressobj(9)
    row = b"\0" * (1 + (side + 7) // 8)
    data = b"".join(squeeze.compress(row * 100) for _ in range(side // 100)) + squeeze.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_decoding(monkeypatch):
    data = bomb(30_000)
    assert len(data) < 200_000
    message = refusal(data)
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None
    assert "it is 30000 x 30000 pixels; expected" in message
    assert "Image size" not in message
    assert "expected at most 65 megapixels and 65535 a side: scale it down first" in message
    # The limit is ours: it stands where a program has taken Pillow's away, and nothing is decoded before it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded a bomb"))
    assert "30000 x 30000 pixels" in refusal(data)


def test_a_large_image_below_the_limit_does_not_warn(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns above this, raises above twice this
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(saved(Image.fromarray(NOISE), "PNG")).shape == NOISE.shape
        with pytest.raises(Image.DecompressionBombWarning):  # the guard really was set off
            Image.open(io.BytesIO(saved(Image.fromarray(NOISE), "PNG")))


def test_defects_of_the_header_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = saved(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
        assert decode_image(data).shape == NOISE.shape
        path: Path = tmp_path / "cut.tif"
        path.write_bytes(saved(Image.fromarray(NOISE), "TIFF")[:-40])
        assert "cannot decode" in refusal(path)


def test_formats_that_run_other_programs_are_never_tried():
    assert set(decode._formats()) <= {"JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF"}
    assert {"JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF"} <= set(decode._formats())
