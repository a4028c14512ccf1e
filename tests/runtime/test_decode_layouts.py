"""Samples of any bits are scaled, broken metadata is passed over, missing pixels and misread layouts are refused."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from mge_runtime import decode
from mge_runtime.decode import decode_image
from mge_runtime.errors import InputError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)

# Image files written byte by byte, in layouts that Pillow cannot write.


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(header: bytes, data: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """`header` is IHDR, `data` the compressed rows."""
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + after
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def packed(values: np.ndarray, bits: int, order: str) -> bytes:
    """Unsigned samples [rows, n] of any number of bits, every row from a whole byte on."""
    if bits in (8, 16, 32):
        return values.astype({8: "u1", 16: order + "u2", 32: order + "u4"}[bits]).tobytes()
    rows = ("".join(f"{value:0{bits}b}" for value in row) for row in values.tolist())
    rows = (row.ljust(-(-len(row) // 8) * 8, "0") for row in rows)
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)


def tiff_file(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    planar: int = 1,
    deflate: bool = False,
    extra: Sequence[int] = (),
    tags: dict[int, tuple[int, list[int]]] | None = None,
) -> bytes:
    """Write unsigned samples [H, W, C] as a TIFF; `tags`: number to (type, values), added or put in place."""
    height, width, channels = samples.shape
    planes = [samples] if planar == 1 else [samples[..., k : k + 1] for k in range(channels)]
    strips = [packed(plane.reshape(height, -1), bits, order) for plane in planes]
    if deflate:
        strips = [zlib.compress(strip) for strip in strips]
    entries: dict[int, tuple[int, list[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * channels),
        259: (3, [8 if deflate else 1]),
        262: (3, [photometric]),
        273: (4, [0] * len(strips)),
        277: (3, [channels]),
        278: (4, [height]),
        279: (4, [len(strip) for strip in strips]),
        284: (3, [planar]),
        **({338: (3, list(extra))} if extra else {}),
        **(tags or {}),
    }
    sizes = {3: 2, 4: 4}
    beside = 8 + 2 + 12 * len(entries) + 4
    position = beside + sum(sizes[t] * len(v) for t, v in entries.values() if sizes[t] * len(v) > 4)
    for number, strip in enumerate(strips):
        entries[273][1][number] = position
        position += len(strip)
    directory = values = b""
    for tag, (kind, numbers) in sorted(entries.items()):
        raw = b"".join(struct.pack(order + {3: "H", 4: "I"}[kind], number) for number in numbers)
        if len(raw) > 4:
            raw, values = struct.pack(order + "I", beside + len(values)), values + raw
        directory += struct.pack(order + "HHI", tag, kind, len(numbers)) + raw.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    return head + directory + bytes(4) + values + b"".join(strips)


def refusal(source: object) -> str:
    with pytest.raises(InputError) as caught:
        decode_image(source)  # pyright: ignore[reportArgumentType]
    assert str(caught.value).isprintable()
    return str(caught.value)


# Samples are scaled by their bits, whatever format holds them.

Y, X = np.mgrid[0:24, 0:32]
SMOOTH = np.stack([X / 31, Y / 23, (X + Y) / 54], -1)  # [H, W, 3] in [0, 1]; noise would show
GRAY = SMOOTH[..., :1]


def off(data: bytes, expected: np.ndarray) -> float:
    """Return the largest difference in gray levels from values in [0, 1]."""
    return float(np.abs(decode_image(data) - expected * 255).max())


def sampled(values: np.ndarray, most: int) -> np.ndarray:
    return np.round(values * most).astype(np.int64)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_gray_tiff_of_any_bits(bits, deflate, order):
    samples = sampled(GRAY, 2**bits - 1)
    data = tiff_file(samples, bits, 1, order=order, deflate=deflate)
    if (bits, order) == (12, ">"):
        assert "of an unsupported kind" in refusal(data)
    else:
        assert off(data, samples / (2**bits - 1)) <= 1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
def test_rgb_tiff_is_right_or_refused(bits, deflate, planar):
    data = tiff_file(sampled(SMOOTH, 2**bits - 1), bits, 2, deflate=deflate, planar=planar)
    if bits == 16 and planar == 2 and not deflate:
        assert "it is a TIFF of 16 bits a sample, RGB, with separate planes" in refusal(data)
    else:
        assert off(data, SMOOTH) <= 1


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (tiff_file(sampled(GRAY, 127), 8, 1, tags={339: (3, [2])}), "a TIFF of signed integers"),
        (tiff_file(sampled(GRAY, 32767), 16, 1, tags={339: (3, [2])}), "a TIFF of signed integers"),
        (tiff_file(sampled(GRAY, 60_000), 32, 1), "a TIFF of 32 bits a sample"),
        (tiff_file(sampled(SMOOTH, 255), 8, 2, tags={254: (4, [1])}), "a preview of an image that is not read"),
        (tiff_file(sampled(SMOOTH, 255), 8, 2, tags={278: (4, [12])}), "cut short (1 of 2 strips or tiles)"),
        (tiff_file(sampled(SMOOTH, 255), 8, 6), "YCbCr in separate planes or subsampled"),
        (tiff_file(sampled(SMOOTH[..., :2], 255), 8, 1, extra=[2], planar=2, deflate=True), "LA, with separate planes"),
        (tiff_file(sampled(GRAY, 1023), 10, 1), "of an unsupported kind"),
        (
            saved(Image.new("L", (8, 8)), "JPEG").replace(b"\xff\xc0\0\x0b\x08", b"\xff\xc0\0\x0b\x0c"),
            "more than 8 bits",
        ),
    ],
    ids=["int8", "int16", "uint32", "preview", "strips", "ycbcr", "planes", "10 bits", "jpeg"],
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
    assert (
        off(png_file(struct.pack(">IIBBBBB", 32, 24, bits, 0, 0, 0, 0), zlib.compress(rows)), samples / (2**bits - 1))
        <= 1
    )


@pytest.mark.parametrize("bits", [12, 16])
def test_jpeg_2000_of_more_than_8_bits(bits):
    # Samples are stored around the middle of their range: moved there, 12 bits fit into a file of 16.
    samples = sampled(GRAY[..., 0], 2**bits - 1) - 2 ** (bits - 1) + 2**15
    data = saved(Image.fromarray(samples.astype(np.uint16)), "JPEG2000", no_jp2=True)
    at = data.index(b"\xff\x51") + 40  # SIZ: precision of the first component, less one
    assert data[at] == 15
    assert off(data[:at] + bytes([bits - 1]) + data[at + 1 :], GRAY) <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_premultiplied_alpha(mode):
    color = (100, 51) if mode == "LA" else (100, 200, 0, 51)
    expected = [[224] * 3 if mode == "LA" else [224, 244, 204]]
    image = Image.new(mode, (1, 1), color).convert(mode[:-1] + "a")
    assert np.abs(decode_image(image)[0].astype(int) - expected).max() <= 2  # 8 bits of 20 % hold 51 levels
    tiff = tiff_file(np.array([[[20, 51]]]), 8, 1, extra=[1])
    assert np.abs(decode_image(tiff).astype(int) - 224).max() <= 2


# Metadata never stops an image; missing pixels do.

ROWS = b"".join(b"\0" + row.tobytes() for row in NOISE)
HEADER = struct.pack(">IIBBBBB", 60, 40, 8, 2, 0, 0, 0)


@pytest.mark.parametrize(
    "kind",
    ["pHYs", "iCCP", "gAMA", "cHRM", "sRGB", "tEXt", "zTXt", "iTXt", "eXIf", "acTL", "fcTL", "bKGD", "sBIT", "caBX"],
)
def test_broken_metadata_never_stops_a_png(kind):
    for content in (b"", b"\xde\xad\xbe\xef" * 3, bytes(40)):
        whole = chunk(kind.encode(), content)
        for broken in (whole, whole[:-1] + bytes([whole[-1] ^ 1])):
            for place in ({"before": broken}, {"after": broken}):
                data = png_file(HEADER, zlib.compress(ROWS), **place)
                np.testing.assert_array_equal(decode_image(data), NOISE)


def test_a_png_without_its_broken_metadata_is_still_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    before = chunk(b"pHYs", b"") + chunk(b"eXIf", exif.tobytes()[6:])
    np.testing.assert_array_equal(decode_image(png_file(HEADER, zlib.compress(ROWS), before)), np.rot90(NOISE, -1))


def test_broken_metadata_never_stops_other_formats():
    image = Image.fromarray(NOISE)
    for exif in (b"", b"MM", b"\xde\xad\xbe\xef" * 8, b"Exif\0\0II*\0\x08"):
        np.testing.assert_array_equal(decode_image(saved(image, "WEBP", lossless=True, exif=exif)), NOISE)
    plain = saved(image, "JPEG")
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
    header = HEADER[:-1] + bytes([interlace])
    if interlace:  # pass by pass, in the order of the format
        passes = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
        rows = b"".join(b"\0" + row.tobytes() for x, dx, y, dy in passes for row in NOISE[y::dy, x::dx])
    else:
        rows = ROWS
    np.testing.assert_array_equal(decode_image(png_file(header, zlib.compress(rows))), NOISE)
    for missing in (1, 20):  # rows; of an interlaced file those of the last pass
        assert "it is cut short" in refusal(png_file(header, zlib.compress(rows[: -missing * (1 + 60 * 3)])))


def test_a_png_that_ends_in_black_is_whole():
    for shape in ((40, 60, 3), (1, 1, 3)):
        assert not decode_image(saved(Image.fromarray(np.zeros(shape, np.uint8)), "PNG")).any()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_a_jpeg_with_half_its_data_is_refused_even_with_an_end_marker(options):
    data = saved(Image.fromarray(NOISE), "JPEG", **options)
    decode_image(data)
    assert "it is cut short" in refusal(data[: len(data) // 2] + b"\xff\xd9")
    assert "cannot decode" in refusal(data[:-2])  # without its end marker it cannot be told from half
    assert decode_image(data + b"behind the end").shape == NOISE.shape


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_ends_in_mid_gray_is_whole(mode, progressive):
    data = saved(Image.new(mode, (40, 40), 128 if mode == "L" else (128,) * len(mode)), "JPEG", progressive=progressive)
    assert decode_image(data).shape == (40, 40, 3)


def test_the_end_of_a_file_without_pixels_may_be_missing():
    np.testing.assert_array_equal(decode_image(saved(Image.fromarray(NOISE), "PNG")[:-10]), NOISE)


# Size and memory.


def test_sides_are_bounded():
    assert decode_image(Image.new("RGB", (decode.MAX_SIDE, 1))).shape == (1, decode.MAX_SIDE, 3)
    assert "it is 65536 x 1 pixels; expected" in refusal(Image.new("RGB", (decode.MAX_SIDE + 1, 1)))
    # 8,388,624 x 8 pixels in a kilobyte: Pillow's run-length decoder takes most of a minute to find out.
    header = struct.pack("<IIIIiiHHIIiiII", 1112, 0, 1078, 40, 8_388_624, 8, 1, 8, 1, 34, 0, 0, 0, 0)
    assert "it is 8388624 x 8 pixels" in refusal(b"BM" + header + bytes(1058))


def test_the_bound_is_the_callers():
    data = saved(Image.fromarray(NOISE), "PNG")
    assert decode_image(data, 2400).shape == NOISE.shape
    with pytest.raises(InputError, match=r"60 x 40 pixels; expected at most 0\.0024 megapixels"):
        decode_image(data, 2399)


def test_the_canvas_of_a_webp_is_looked_at_before_its_decoder_makes_it(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    extended = b"RIFF\xff\xff\xff\x7fWEBPVP8X\n\0\0\0\x02\0\0\0" + b"\xff\x3f\0" * 2 + bytes(8)
    assert "it is 16384 x 16384 pixels" in refusal(extended)
    for options in ({}, {"lossless": True}):
        plain = saved(Image.new("RGB", (60, 40)), "WEBP", **options)
        with pytest.raises(InputError, match="60 x 40 pixels"):
            decode_image(plain, 2399)


def test_lack_of_memory_is_called_that(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    message = refusal(saved(Image.fromarray(NOISE), "PNG"))
    assert "there is not enough memory for it; free some" in message


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux")
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG2000", "RGBA"), ("WEBP", "RGBA")])
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
