"""Checks of image files that Pillow leaves out: sizes before it allocates, layouts it misreads, data that is missing.

Sources of the layouts: ITU-T T.81 (JPEG), PNG 3rd edition, TIFF 6.0, RFC 9649 (WebP).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_EXIF, _ADOBE, _SCAN = 0xE1, 0xEE, 0xDA  # of JPEG: orientation; whether three channels are RGB; header of a scan
_ENTROPY = -1  # no marker: the coded data of a scan
_MARKER = re.compile(rb"\xff[^\0\1\xff\xd0-\xd7]")  # no stuffed byte; none without a segment, but the end
_KINDS = (  # of files that are often named, and that no decoder takes: offset and bytes of their magic
    *((4, b"ftyp" + kind, "it is an HEIC image, convert it to JPEG") for kind in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftyp", "it is a video or an unknown ISO media file"),
    (8, b"AVI ", "it is an AVI video"),
    (0, b"%PDF", "it is a PDF"),
    (0, b"%!PS", "it is PostScript"),
    (0, b"PK\3\4", "it is a ZIP archive"),
    (0, b"8BPS", "it is a Photoshop file, export it as PNG"),
    (0, b"\x1aE\xdf\xa3", "it is a Matroska or WebM video"),
    # Not read: its code-blocks may be of one pixel, and then OpenJPEG takes a kilobyte for each.
    *((0, head, "it is a JPEG 2000 image, convert it to PNG") for head in (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    *((0, head, "it is a JPEG XL image, convert it to JPEG") for head in (b"\0\0\0\x0cJXL ", b"\xff\x0a")),
)


def kind_of(data: bytes) -> str:
    """What a file that no decoder takes seems to be."""
    if not data:
        return "it is empty (0 bytes)"
    head = data[:512]
    for offset, magic, kind in _KINDS:
        if head.startswith(magic, offset):
            return kind
    if b"<svg" in head:
        return "it is an SVG drawing, render it to PNG"
    for code, start, _ in _jpeg_segments(data):
        if _is_frame(code) and (code > 0xC2 or data[start + 2 : start + 3] != b"\x08"):
            return "it is a JPEG of a kind that is not read: lossless, arithmetic or of more than 8 bits"
    if head.startswith((_JPEG, _PNG[:6], b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")):
        return "its header is damaged, cut short or of an unsupported kind"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        return "it is a text file"
    return "it is no known image"


def webp_size(head: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP file, whose decoder allocates before it tells them; None for other files."""
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    if head[12:16] == b"VP8X":
        return (1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little"))
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    width, height = struct.unpack("<2H", head[26:30])
    return (width & 0x3FFF, height & 0x3FFF)


def tiff_fault(image: Image) -> str | None:
    """Say which layout of this open TIFF Pillow would misread; None where it reads it right."""
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    bits, planar, raw = tags.get(258, (1,)), tags.get(284, 1), image.info.get("compression") == "raw"
    if tags.get(254, 0) & 1:
        return "a preview of an image that is not read, as in camera raw files"
    if 2 in tags.get(339, ()):
        return "a TIFF of signed integers"
    if max(bits) > 16 and image.mode != "F":
        return f"a TIFF of {max(bits)} bits a sample"
    premultiplied = tags.get(338, (0,))[:1] == (1,)
    if planar == 2 and ((raw and (max(bits) > 8 or premultiplied)) or image.mode in ("LA", "La", "PA")):
        return f"a TIFF of {max(bits)} bits a sample, {image.mode}, with separate planes"
    if raw and tags.get(262) == 6 and (planar == 2 or tags.get(530, (2, 2)) != (1, 1)):
        return "an uncompressed TIFF with YCbCr in separate planes or subsampled"
    width, height = tags.get(256, 0), tags.get(257, 0)
    if 324 in tags:
        found, across, down = len(tags[324]), tags.get(322) or width, tags.get(323) or height
    else:
        found, across, down = len(tags.get(273, ())), width, min(tags.get(278, height), height) or height
    if across > 2 * max(width, 1024) or down > 2 * max(height, 1024):  # each is decoded as a whole
        return f"a TIFF of {width} x {height} pixels in tiles of {across} x {down}"
    blocks = -(-width // across) * -(-height // down) * (len(bits) if planar == 2 else 1)
    return f"a TIFF that is cut short ({found} of {blocks} strips or tiles)" if found < blocks else None


def without_metadata(data: bytes) -> bytes | None:
    """The same JPEG or PNG without what pixels do not need (of EXIF, what is whole); None for other files."""
    if data.startswith(_JPEG):
        kept, last = [_JPEG], 2
        for code, start, end in _jpeg_segments(data):
            if code == _SCAN:
                break
            whole_adobe = code == _ADOBE and end - start >= 14
            if not 0xE0 <= code <= 0xEF or code == _EXIF or whole_adobe:
                kept.append(data[start - 2 : end])
            last = end
        return b"".join([*kept, data[last:]])
    if data.startswith(_PNG):
        kept = [_PNG]
        for kind, start, end in _png_chunks(data):
            whole = zlib.crc32(data[start - 4 : end]) == int.from_bytes(data[end : end + 4], "big")
            if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and whole):
                kept.append(data[start - 8 : end + 4])
        return b"".join(kept)
    return None


def png_lacks_data(data: bytes) -> bool:
    """Whether a PNG holds fewer bytes than its pixels need."""
    width, height, depth, color, _, _, interlace = struct.unpack(">2I5B", data[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    passes = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
    expected = 0
    for x, across, y, down in passes if interlace else ((0, 1, 0, 1),):
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        if columns > 0 and rows > 0:
            expected += rows * (1 + -(-columns * bits // 8))
    inflate, found = zlib.decompressobj(), 0
    for kind, start, end in _png_chunks(data):
        pending = data[start:end] if kind == b"IDAT" else b""
        while pending and found < expected and not inflate.eof:
            found += len(inflate.decompress(pending, 1 << 20))
            pending = inflate.unconsumed_tail
    return found + len(inflate.flush()) < expected


def jpeg_lacks_scans(data: bytes) -> bool:
    """Whether a coefficient of a component of a progressive JPEG never came, or without its last bits (T.81, G.1.1)."""
    missing_bits: dict[int, list[int]] = {}
    for code, start, end in _jpeg_segments(data):
        if _is_frame(code):
            missing_bits = {component: [1] * 64 for component in data[start + 8 : end : 3]}
        elif code == _SCAN:
            first, last, bits = data[end - 3 : end]
            for component in data[start + 3 : end - 3 : 2]:
                missing_bits[component][first : last + 1] = [bits & 15] * (last + 1 - first)
    return any(map(any, missing_bits.values()))


def jpeg_scans(data: bytes) -> int:
    """How many scans a JPEG has."""
    return sum(code == _SCAN for code, _, _ in _jpeg_segments(data))


def entropy_end(data: bytes) -> int:
    """Where the coded data of a JPEG's last scan ends, bytes from its start."""
    return max((end for code, _, end in _jpeg_segments(data) if code == _ENTROPY), default=len(data))


def _is_frame(code: int) -> bool:
    return 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start (of the length) and end of each segment up to the end of the image; `_ENTROPY` behind each scan.

    As libjpeg does, what lies between two segments is passed over.
    """
    position = 2
    while data.startswith(_JPEG) and (marker := _MARKER.search(data, position)) and marker[0] != b"\xff\xd9":
        code, start = marker[0][1], marker.end()
        position = start + int.from_bytes(data[start : start + 2], "big")
        yield code, start, position
        if code == _SCAN:
            following = _MARKER.search(data, position)
            start, position = position, following.start() if following else len(data)
            yield _ENTROPY, start, position


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of the data of each chunk."""
    position = len(_PNG)
    while position + 8 <= len(data):
        start = position + 8
        end = start + int.from_bytes(data[position : position + 4], "big")
        yield data[position + 4 : start], start, end
        position = end + 4
