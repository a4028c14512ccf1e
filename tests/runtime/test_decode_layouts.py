"""Samples of any bits are scaled, broken metadata is passed over, missing pixels and misread layouts are refused."""

import struct

import numpy as np
import pytest
from PIL import Image

from mge_runtime.decode import decode_image
from tests.helpers.images import NOISE, chunk, packed, png_file, refusal, saved, tiff_file

# Samples are scaled by their bits, whatever format holds them.

Y, X = np.mgrid[0:24, 0:32]
SMOOTH = np.stack([X / 31, Y / 23, (X + Y) / 54], -1)  # [H, W, 3] in [0, 1]; noise would show
GRAY = SMOOTH[..., :1]


def off(data, expected):
    """The largest difference in gray levels from values in [0, 1]."""
    return float(np.abs(decode_image(data) - expected * 255).max())


def sampled(values, most):
    return np.round(values * most).astype(np.int64)


@pytest.mark.parametrize(("photometric", "order"), [(1, "<"), (1, ">"), (0, "<")])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_gray_tiff_of_any_bits(bits, photometric, deflate, order):
    samples, most = sampled(GRAY, 2**bits - 1), 2**bits - 1
    data = tiff_file(samples, bits, photometric, order=order, deflate=deflate)
    if bits == 12 and (photometric, order) != (1, "<"):
        assert "of an unsupported kind" in refusal(data)
    else:
        assert off(data, samples / most if photometric else 1 - samples / most) <= 1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
def test_rgb_tiff_is_right_or_refused(bits, deflate, planar):
    data = tiff_file(sampled(SMOOTH, 2**bits - 1), bits, 2, deflate=deflate, planar=planar)
    if bits == 16 and planar == 2 and not deflate:
        assert "it is a TIFF of 16 bits a sample, RGB, with separate planes" in refusal(data)
    else:
        assert off(data, SMOOTH) <= 1


LA = sampled(SMOOTH[..., :2], 255)
TWELVE_BITS = saved(Image.new("L", (8, 8)), "JPEG").replace(b"\xff\xc0\0\x0b\x08", b"\xff\xc0\0\x0b\x0c")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (saved(GRAY[..., 0].astype(np.float32), "TIFF"), "floating-point numbers of unknown range; expected integers"),
        (tiff_file(sampled(GRAY, 127), 8, 1, tags={339: (3, [2])}), "a TIFF of signed integers"),
        (tiff_file(sampled(GRAY, 32767), 16, 1, tags={339: (3, [2])}), "a TIFF of signed integers"),
        (tiff_file(sampled(GRAY, 60_000), 32, 1), "a TIFF of 32 bits a sample"),
        (tiff_file(sampled(SMOOTH, 255), 8, 2, tags={254: (4, [1])}), "a preview of an image that is not read"),
        (tiff_file(sampled(SMOOTH, 255), 8, 2, tags={278: (4, [12])}), "cut short (1 of 2 strips or tiles)"),
        (tiff_file(sampled(SMOOTH, 255), 8, 6), "YCbCr in separate planes or subsampled"),
        (tiff_file(LA, 8, 1, extra=[2], planar=2, deflate=True), "LA, with separate planes"),
        (tiff_file(np.dstack([SMOOTH, SMOOTH[..., 0]]), 8, 2, extra=[1], planar=2), "RGBA, with separate planes"),
        (tiff_file(sampled(GRAY, 1023), 10, 1), "of an unsupported kind"),
        (TWELVE_BITS, "more than 8 bits"),
    ],
    ids=[
        "float",
        "int8",
        "int16",
        "uint32",
        "preview",
        "strips",
        "ycbcr",
        "planes",
        "premultiplied",
        "10 bits",
        "jpeg",
    ],
)
def test_what_pillow_would_misread_is_refused_and_named(data, found):
    assert found in refusal(data)


@pytest.mark.parametrize("most", [1, 3, 100, 255, 1000, 4095, 65535])
@pytest.mark.parametrize(("magic", "values"), [("P5", GRAY), ("P6", SMOOTH), ("P2", GRAY), ("P3", SMOOTH)])
def test_ppm_of_any_maxval(magic, values, most):
    samples = sampled(values, most)
    body = samples.astype(">u2" if most > 255 else "u1").tobytes()
    if magic in ("P2", "P3"):
        body = " ".join(map(str, samples.ravel().tolist())).encode()
    assert off(f"{magic}\n32 24\n{most}\n".encode() + body, samples / most) <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_png_of_any_bits(bits):
    samples = sampled(GRAY, 2**bits - 1)
    rows = b"".join(b"\0" + packed(row.reshape(1, -1), bits, ">") for row in samples)
    assert off(png_file(32, 24, bits, 0, rows), samples / (2**bits - 1)) <= 1


def test_a_tiff_of_tiles_larger_than_its_image_is_refused_before_they_are_decoded():
    def tiled(across, down):
        tags = {322: (4, [across]), 323: (4, [down]), 324: (4, [0]), 325: (4, [0])}
        return tiff_file(NOISE, 8, 2, tags=tags)

    for across, down in [(16_000, 16), (16, 16_000)]:
        assert f"a TIFF of 60 x 40 pixels in tiles of {across} x {down}" in refusal(tiled(across, down))
    decode_image(tiled(2048, 2048))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Image.new("LA", (1, 1), (100, 51)).convert("La"), [224] * 3),
        (Image.new("RGBA", (1, 1), (100, 200, 0, 51)).convert("RGBa"), [224, 244, 204]),
        (tiff_file(np.array([[[20, 51]]]), 8, 1, extra=[1]), [224] * 3),
    ],
)
def test_premultiplied_alpha(source, expected):
    assert np.abs(decode_image(source)[0].astype(int) - expected).max() <= 2  # 8 bits of 20 % hold 51 levels


# Metadata never stops an image; missing pixels do.

ROWS = b"".join(b"\0" + row.tobytes() for row in NOISE)


def noise_png(rows=ROWS, **options):
    return png_file(60, 40, 8, 2, rows, **options)


@pytest.mark.parametrize(
    "kind",
    ["pHYs", "iCCP", "gAMA", "cHRM", "sRGB", "tEXt", "zTXt", "iTXt", "eXIf", "acTL", "fcTL", "bKGD", "sBIT", "caBX"],
)
def test_broken_metadata_never_stops_a_png(kind):
    for content in (b"", b"\xde\xad\xbe\xef" * 3, bytes(40)):
        whole = chunk(kind.encode(), content)
        for broken in (whole, whole[:-1] + bytes([whole[-1] ^ 1])):
            for place in ({"before": broken}, {"after": broken}):
                np.testing.assert_array_equal(decode_image(noise_png(**place)), NOISE)


def test_a_png_without_its_broken_metadata_is_still_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    before = chunk(b"pHYs", b"") + chunk(b"eXIf", exif.tobytes()[6:])
    np.testing.assert_array_equal(decode_image(noise_png(before=before)), np.rot90(NOISE, -1))


def test_broken_metadata_never_stops_other_formats():
    for exif in (b"", b"MM", b"\xde\xad\xbe\xef" * 8, b"Exif\0\0II*\0\x08"):
        np.testing.assert_array_equal(decode_image(saved(NOISE, "WEBP", lossless=True, exif=exif)), NOISE)
    plain = saved(NOISE, "JPEG")
    expected = decode_image(plain)
    for code, content in (
        (0xE0, b"JFIF\0"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xEE, b"Adobe\0"),
        (0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
        (0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
        (0xED, b"Photoshop 3.0\x008BIM"),
    ):
        segment = bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content
        np.testing.assert_array_equal(decode_image(plain[:2] + segment + plain[2:]), expected)


@pytest.mark.parametrize("interlace", [0, 1])
def test_a_png_with_half_its_rows_is_refused(interlace):
    rows = ROWS
    if interlace:  # pass by pass, in the order of the format
        passes = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
        rows = b"".join(b"\0" + row.tobytes() for x, dx, y, dy in passes for row in NOISE[y::dy, x::dx])
    np.testing.assert_array_equal(decode_image(noise_png(rows, interlace=interlace)), NOISE)
    for missing in (1, 20):  # rows; of an interlaced file those of the last pass
        assert "it is cut short" in refusal(noise_png(rows[: -missing * (1 + 60 * 3)], interlace=interlace))


def test_whole_images_are_not_taken_for_cut_ones():
    for shape in ((40, 60, 3), (1, 1, 3)):  # what Pillow fills a cut PNG with is black
        assert not decode_image(saved(np.zeros(shape, np.uint8), "PNG")).any()
    np.testing.assert_array_equal(decode_image(saved(NOISE, "PNG")[:-10]), NOISE)  # the end holds no pixels
    for progressive in (False, True):  # a cut JPEG ends in mid-gray
        for mode, color in (("RGB", (128, 128, 128)), ("L", 128), ("CMYK", (128, 128, 128, 128))):
            data = saved(Image.new(mode, (40, 40), color), "JPEG", progressive=progressive)
            assert decode_image(data).shape == (40, 40, 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_a_jpeg_with_half_its_data_is_refused_even_with_an_end_marker(options):
    data = saved(NOISE, "JPEG", **options)
    decode_image(data)
    assert "it is cut short" in refusal(data[: len(data) // 2] + b"\xff\xd9")
    assert "cannot decode" in refusal(data[:-2])  # without its end marker it cannot be told from half
    assert decode_image(data + b"behind the end").shape == NOISE.shape
