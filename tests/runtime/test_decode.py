"""Every kind of image becomes the same RGB pixels everywhere, or one clear line."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from mge_runtime.decode import MAX_SIDE, check_header, decode_image, load_decoders, open_image
from mge_runtime.errors import InputError
from mge_runtime.sources import find_images
from tests.helpers.images import NOISE, chunk, many_scans, png_file, refusal, saved

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
    decoded = decode_image(png_file(len(expected), 1, bits, kind, b"\0" + row, extra))
    assert decoded.tolist() == [expected]
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


def test_modes_of_16_bits_and_beyond():
    for order, mode in (("<", "I;16"), (">", "I;16B")):
        image = Image.frombytes(mode, (6, 1), struct.pack(f"{order}6H", *SIXTEEN))
        assert decode_image(image)[0].tolist() == decode_image(saved(image, "TIFF"))[0].tolist() == EIGHT
    assert decode_image(Image.fromarray(np.array([SIXTEEN], np.int32)))[0].tolist() == EIGHT
    for values, found in (([0, 70000], "0 to 70000"), ([-1, 5], "-1 to 5")):
        message = refusal(Image.fromarray(np.array([values], np.int32)))
        assert f"gray values run from {found}; expected 0 to 65535" in message


# A channel of CMYK is what its ink and black let through: 155 of 255 and 200 of 255 leave 121.6.
CMYK = Image.frombytes("CMYK", (3, 1), bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 100, 50, 55]))
# ITU-R BT.601 full range: Y 76, Cb 85, Cr 255 is red.
YCBCR = Image.frombytes("YCbCr", (1, 1), bytes([76, 85, 255]))


def test_inks_and_luma_become_rgb():
    decoded = decode_image(saved(CMYK, "TIFF")).astype(int)
    assert np.abs(decoded - [[255, 255, 255], [0, 255, 255], [200, 122, 160]]).max() <= 1
    # Adobe writes inks inverted; Pillow does too and turns them back. Cyan, flat, so that JPEG keeps it.
    data = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(decode_image(data).astype(int) - [0, 255, 255]).max() <= 2
    if int(PIL.__version__.split(".")[0]) >= 13:  # Pillow 12 cannot read the uncompressed YCbCr TIFF that it writes
        assert np.abs(decode_image(saved(YCBCR, "TIFF")).astype(int) - [254, 0, 0]).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBa", "RGBX", "HSV", "LAB", "PA"])
def test_rarer_modes_of_pillow_decode(mode):
    assert decode_image(Image.new(mode, (3, 2))).shape == (2, 3, 3)


# A 2 x 3 image (three rows of two) stored under each orientation, and the upright one, in gray levels.
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
@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})]
)
def test_orientation_is_applied_once(orientation, kind, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(np.array(STORED[orientation], np.uint8), kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        for source in (data, image, open_image(data)):
            np.testing.assert_allclose(decode_image(source)[..., 0], UPRIGHT, atol=2 if kind == "JPEG" else 0)


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
    path.write_bytes(saved(NOISE, "JPEG"))
    with Image.open(path) as image:  # the whole file, as torchvision's loader sees it: no draft mode
        expected = np.asarray(image.convert("RGB"))
    with path.open("rb") as stream, Image.open(path) as image:
        for source in (path, str(path), path.read_bytes(), stream, image):
            np.testing.assert_array_equal(decode_image(source), expected)


def test_arrays_pass_through():
    assert decode_image(NOISE) is NOISE
    turned = NOISE.transpose(1, 0, 2)
    assert decode_image(turned).flags.c_contiguous
    np.testing.assert_array_equal(decode_image(turned), turned)
    for array in (NOISE.astype(np.float32), NOISE[..., 0], np.zeros((4, 4, 4), np.uint8), NOISE[:0]):
        assert "expected uint8 RGB [H, W, 3]" in refusal(array)


# Bad input: one line that names the file, what was found and what was expected.


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("pipe.jpg", "it is a pipe, socket or device"),
        (os.devnull, "it is a pipe, socket or device"),
        ("gone.jpg", "it is a link to nothing"),
        ("none.jpg", "the file does not exist; check the name"),
        (".", "it is a folder; expected an image file"),
        ("nul\0.jpg", "expected a readable image file"),
    ],
)
def test_what_cannot_be_read_is_named_at_once(tmp_path, name, found):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(InputError) as caught:
        decode_image(tmp_path / name)
    assert found in str(caught.value)


def test_what_is_no_file_is_named():
    assert refusal("https://example.org/a.jpg?size=3").startswith(
        "cannot read https://example.org/a.jpg?size=3: it is a URL; expected a file, download it first"
    )
    assert "cannot read an image from int; expected a path" in refusal(3)
    assert "expected a file opened in binary mode" in refusal(io.StringIO("text"))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "it is empty (0 bytes)"),
        (b"I am no image.\n", "it is a text file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is an HEIC image, convert it to JPEG"),
        (saved(NOISE, "JPEG2000"), "it is a JPEG 2000 image, convert it"),
        (saved(NOISE, "JPEG2000", no_jp2=True), "it is a JPEG 2000 image, convert it"),
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
    ids=["empty", "text", "heic", "jp2", "j2k", "video", "pdf", "eps", "svg", "bytes", "avi", "riff", "psd", "header"],
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
    data = saved(NOISE, kind)
    decode_image(data)
    assert "cannot decode the image of" in refusal(data[: int(len(data) * part)])


def test_a_flipped_byte_in_a_png_is_found():
    data = bytearray(saved(NOISE, "PNG"))
    data[len(data) // 2] ^= 0x55
    assert "expected a whole, undamaged image" in refusal(bytes(data))


def test_formats_that_run_other_programs_are_never_tried():
    formats = {"JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF"}
    assert formats <= set(load_decoders()) <= formats | {"AVIF"}


# Size and memory.


def test_a_bomb_is_refused_before_decoding(monkeypatch):
    # The limit is ours: it stands where a program has taken Pillow's away.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded a bomb"))
    message = refusal(png_file(30_000, 30_000, 1, 0, b""))
    assert "it is 30000 x 30000 pixels; expected at most 65 megapixels and 65535 a side: scale it down first" in message


def test_of_what_has_no_end_a_part_is_read(tmp_path, monkeypatch):
    for module in ("sources", "decode"):
        monkeypatch.setattr(f"mge_runtime.{module}.MAX_BYTES", 1000)
    with Path("/dev/zero").open("rb") as endless:
        assert "/dev/zero: it holds more than 1,000 bytes; expected the bytes of one image" in refusal(endless)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(endless))
        with pytest.raises(InputError, match="standard input: it holds more than 1,000 bytes; expected a list"):
            find_images([], "-").whole()
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(50_000_000)
    tracemalloc.start()
    assert "it is no known image" in refusal(tmp_path / "large.jpg")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("between", [b"", b"a few bytes that libjpeg passes over"])
def test_a_jpeg_of_endless_scans_is_refused_before_decoding(between):
    whole = many_scans(1)
    np.testing.assert_array_equal(decode_image(many_scans(50, between)), decode_image(whole))
    assert "scans; expected at most 100" in refusal(many_scans(101, between))
    behind = whole + b"\xff\xda\0\0" * 200  # as a video behind a photograph of a phone may hold them
    np.testing.assert_array_equal(decode_image(behind), decode_image(whole))


def test_a_large_image_below_the_limit_does_not_warn(monkeypatch):
    data = saved(NOISE, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns above this, raises above twice this
    assert decode_image(data).shape == NOISE.shape
    with pytest.raises(Image.DecompressionBombWarning):  # the guard really was set off
        Image.open(io.BytesIO(data))


def test_sides_are_bounded_and_so_are_pixels():
    assert decode_image(Image.new("RGB", (MAX_SIDE, 1))).shape == (1, MAX_SIDE, 3)
    assert "it is 65536 x 1 pixels; expected" in refusal(Image.new("RGB", (MAX_SIDE + 1, 1)))
    # 8,388,624 x 8 pixels in a kilobyte: Pillow's run-length decoder takes most of a minute to find out.
    header = struct.pack("<IIIIiiHHIIiiII", 1112, 0, 1078, 40, 8_388_624, 8, 1, 8, 1, 34, 0, 0, 0, 0)
    assert "it is 8388624 x 8 pixels" in refusal(b"BM" + header + bytes(1058))
    data = saved(NOISE, "PNG")
    assert decode_image(data, 2400).shape == NOISE.shape
    assert "60 x 40 pixels; expected at most 0.0024 megapixels" in refusal(data, 2399)
    assert "it is 0 x 3 pixels" in refusal(Image.new("RGB", (0, 3)))
    assert "cannot decode" in refusal(png_file(0, 3, 8, 0, b"\0\0\0"))


def test_the_canvas_of_a_webp_is_looked_at_before_its_decoder_makes_it(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    extended = b"RIFF\xff\xff\xff\x7fWEBPVP8X\n\0\0\0\x02\0\0\0" + b"\xff\x3f\0" * 2 + bytes(8)
    assert "it is 16384 x 16384 pixels" in refusal(extended)
    for options in ({}, {"lossless": True}):
        assert "60 x 40 pixels" in refusal(saved(Image.new("RGB", (60, 40)), "WEBP", **options), 2399)


def test_lack_of_memory_is_called_that(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert "there is not enough memory for it; free some" in refusal(saved(NOISE, "PNG"))


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux")
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "I;16"), ("WEBP", "RGBA")])
def test_memory_of_a_pixel(tmp_path, kind, mode):
    path = tmp_path / "image"
    path.write_bytes(saved(Image.new(mode, (1500, 1500)), kind))
    code = (
        "import sys; from mge_runtime.decode import decode_image, load_decoders; load_decoders()\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
        "before = peak(); image = decode_image(sys.argv[1]); print((peak() - before) / 1500**2)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, check=True
    )
    assert 4 <= float(done.stdout) <= 30


def test_a_header_is_checked_without_its_pixels_and_refused_as_decoding_refuses_it(tmp_path):
    whole = saved(Image.fromarray(NOISE), "JPEG")
    files = {"whole": whole, "short": whole[: len(whole) // 2], "empty": b"", "text": b"no image", "wide": None}
    Image.new("L", (300, 2)).save(tmp_path / "wide", "PNG")
    for name, data in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    for name in ("whole", "short"):
        check_header(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    for name in ("empty", "text", "wide", "missing", "pipe"):
        messages = []
        for read in (check_header, open_image):
            with pytest.raises(InputError) as error:
                read(tmp_path / name, 500)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
