"""Image files written byte by byte, in layouts that Pillow cannot write, and how a refused one is looked at."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mge_runtime.decode import decode_image
from mge_runtime.errors import InputError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def saved(image, kind, **options):
    """The bytes of a Pillow image, or of an array, in a format."""
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, kind, **options)
    return stream.getvalue()


def refusal(source, *arguments):
    """The one line with which an image is refused."""
    with pytest.raises(InputError) as caught:
        decode_image(source, *arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


def write_clip(path):
    """A video of five frames."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *NOISE.shape[:2], "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(NOISE)))
        container.mux(stream.encode())


def many_scans(count, between=b""):
    """A progressive JPEG of a gray image whose last scan comes so many times."""
    data = saved(Image.new("L", (64, 64), 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + (data[last:-2] + between) * count + data[-2:]


def chunk(kind, data):
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width, height, depth, color, rows, before=b"", after=b"", interlace=0):
    """A PNG of filtered rows, chunks around them; color: 0 gray, 2 RGB, 3 palette, 4 gray + alpha, 6 RGB + alpha."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b"")


def packed(values, bits, order):
    """Unsigned samples [rows, n] of any number of bits, every row from a whole byte on."""
    if bits in (8, 16, 32):
        return values.astype({8: "u1", 16: order + "u2", 32: order + "u4"}[bits]).tobytes()
    rows = ("".join(f"{value:0{bits}b}" for value in row) for row in values.tolist())
    rows = (row.ljust(-(-len(row) // 8) * 8, "0") for row in rows)
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)


def tiff_file(samples, bits, photometric, *, order="<", planar=1, deflate=False, extra=(), tags=None):
    """A TIFF of unsigned samples [H, W, C]; `tags`: number to (type, values), added or put in place."""
    height, width, channels = samples.shape
    planes = [samples] if planar == 1 else [samples[..., k : k + 1] for k in range(channels)]
    strips = [packed(plane.reshape(height, -1), bits, order) for plane in planes]
    if deflate:
        strips = [zlib.compress(strip) for strip in strips]
    entries = {
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
