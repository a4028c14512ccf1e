"""The container: names of the entries, and a ZIP that stores them uncompressed, each aligned to pages.

Any unzip reads it, as `zipfile` does here; every header must then be, byte for byte, what `ArchiveWriter` writes, so
that a flipped byte anywhere outside the entries' data is found at once. The data is checked by CRC-32 and SHA-256.
Fields are those of PKWARE's APPNOTE 6.3.10; the padding is the extra field 0xD935 that Android's zipalign uses.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from mge_runtime.errors import BundleError, OutputError

MANIFEST = "manifest.json"
CALIBRATION = "calibration.json"
CARD = "card.md"  # the model card, Markdown with YAML front matter
CHAIN = "onnx/chain.onnx"  # all graphs in one, over the same weights: for whoever takes the files out

_GRAPH = r"[A-Za-z0-9_]{1,64}"
_TARGET = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ENTRY_NAME = re.compile(  # none of them leads out of a folder that it is extracted to
    rf"{re.escape(MANIFEST)}|{re.escape(CALIBRATION)}|{re.escape(CARD)}|onnx/{_GRAPH}\.((cpu\.)?onnx|weights)"
    rf"|engines/{_TARGET}/(engine\.json|{_GRAPH}\.plan)"
)

_ALIGNMENT = 4096  # bytes: every entry's data starts on a page, so that it can be mapped into memory in place
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_EXTRA = struct.Struct("<HHH")
_VERSION = 10  # needed to extract: stored entries
_MADE_BY = 3 << 8 | _VERSION  # Unix, so that the file mode below counts
_TIME, _DATE = 0, 0x21  # 1980-01-01 00:00: the same content gives the same bytes
_MODE = 0o100644 << 16
_LIMIT = 2**32 - 1  # bytes; beyond it ZIP needs its 64-bit records, which are not written here
_LARGEST_DIRECTORY = 1 << 20  # bytes, of some 10,000 entries


def graph_entry(graph: str) -> str:
    """Entry with a graph's ONNX model."""
    return f"onnx/{graph}.onnx"


def cpu_graph_entry(graph: str) -> str:
    """Entry with the same graph encoded for CPUs, over the same weights; in INT8 bundles alone."""
    return f"onnx/{graph}.cpu.onnx"


def weights_entry(graph: str) -> str:
    """Entry with a graph's weights in ONNX's external-data layout; missing where it has none of its own."""
    return f"onnx/{graph}.weights"


def engine_description(target: str) -> str:
    """Entry that describes the engines of one target."""
    return f"engines/{target}/engine.json"


def engine_plan(target: str, graph: str) -> str:
    """Entry with a graph's engine for one target."""
    return f"engines/{target}/{graph}.plan"


def target_of(name: str) -> str | None:
    """The target an engine's entry belongs to; None for other entries."""
    return name.split("/")[1] if name.startswith("engines/") else None


def is_target(name: str) -> bool:
    """Whether `name` can name a target, such as "tensorrt-10.3-sm87-linux-aarch64"."""
    return re.fullmatch(_TARGET, name) is not None


@dataclass(frozen=True)
class ArchiveEntry:
    """Where one entry's data lies."""

    name: str
    header: int  # bytes from the start of the file to its local header
    offset: int  # bytes from the start of the file, a multiple of 4096
    size: int  # bytes
    crc: int  # CRC-32 of the data


class ArchiveWriter:
    """Write entries one after the other; nothing is held in memory but the directory.

    Args:
        stream: an empty file, open for reading and writing, seekable.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self._entries: list[ArchiveEntry] = []

    def add(self, name: str, chunks: Iterable[bytes | memoryview]) -> ArchiveEntry:
        """Append an entry.

        Args:
            name: one of those above, not yet in the archive.
            chunks: its data, in pieces of any size.

        Raises:
            OutputError: the archive would exceed 4 GiB.
        """
        if not _ENTRY_NAME.fullmatch(name) or any(entry.name == name for entry in self._entries):
            raise ValueError(f"{name!r} cannot be the name of another entry")
        offset = _data_offset(name, self._position)
        self._stream.seek(offset)
        crc = size = 0
        for chunk in chunks:
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
            if offset + size > _LIMIT:
                raise OutputError(
                    f"the bundle would exceed 4 GiB at entry {name}; expected less: "
                    "export in FP16, or keep engines of fewer targets in one file"
                )
            self._stream.write(chunk)
        entry = ArchiveEntry(name, self._position, offset, size, crc)
        self._stream.seek(self._position)
        self._stream.write(_local_header(entry))
        self._position = offset + size
        self._entries.append(entry)
        return entry

    def finish(self) -> None:
        """Write the directory; nothing can be added afterwards."""
        self._stream.seek(self._position)
        self._stream.write(_directory(self._entries, self._position))
        self._stream.truncate()
        self._stream.flush()


def read_directory(file: BinaryIO, size: int, path: str) -> dict[str, ArchiveEntry]:
    """Find every entry, by its name, in the order of the file; only headers are read.

    Args:
        file: open for reading.
        size: of the file, bytes, > 0.
        path: how to call it in an error.

    Raises:
        BundleError: a header differs from what `ArchiveWriter` writes, or bytes belong to no entry; the message says
            what the file seems to be.
    """

    def read(position: int, count: int) -> bytes:
        file.seek(position)
        return file.read(count)

    def refusal(reason: str) -> BundleError:
        found, advice = _kind_of(read(0, 256))
        found = found or f"{reason} (file of {size} bytes)"
        return BundleError(f"cannot open {path}: {found}; expected a bundle that mge-export wrote: {advice}")

    end = read(max(size - _END.size, 0), _END.size)
    if len(end) != _END.size or not end.startswith(b"PK\5\6") or _END.unpack(end)[5] > _LARGEST_DIRECTORY:
        raise refusal("its directory is missing at the end of the file")
    try:
        with zipfile.ZipFile(file) as archive:
            found = archive.infolist()
    except Exception as error:  # damaged bytes make it raise almost anything
        raise refusal("its directory was changed or damaged after it was written") from error
    entries: dict[str, ArchiveEntry] = {}
    position = 0
    for item in found:
        name = item.orig_filename
        if not _ENTRY_NAME.fullmatch(name):
            raise refusal(f"it holds an entry called {name!r}, which no bundle has")
        entry = ArchiveEntry(name, position, _data_offset(name, position), item.file_size, item.CRC)
        header = _local_header(entry)
        if name in entries or entry.offset + entry.size > size or read(position, len(header)) != header:
            raise refusal(f"the header of its entry {name} was changed or damaged after it was written")
        entries[name] = entry
        position = entry.offset + entry.size
    directory = _directory(list(entries.values()), position)
    if position + len(directory) != size or read(position, len(directory)) != directory:
        raise refusal("its directory was changed or damaged after it was written")
    return entries


def _data_offset(name: str, header: int) -> int:
    """Where an entry's data starts: on the first page that leaves room for header, name and an extra field."""
    start = header + _LOCAL.size + len(name) + _EXTRA.size
    return start + -start % _ALIGNMENT


def _local_header(entry: ArchiveEntry) -> bytes:
    """Everything before the data: header, name, and the extra field that moves the data to a page."""
    name = entry.name.encode()
    extra = entry.offset - entry.header - _LOCAL.size - len(name)
    sizes = (entry.crc, entry.size, entry.size, len(name), extra)
    fixed = _LOCAL.pack(b"PK\3\4", _VERSION, 0, 0, _TIME, _DATE, *sizes)
    return fixed + name + _EXTRA.pack(0xD935, extra - 4, _ALIGNMENT) + bytes(extra - _EXTRA.size)


def _directory(entries: Sequence[ArchiveEntry], start: int) -> bytes:
    """Everything after the last entry's data, from byte `start` on."""
    directory = b""
    for entry in entries:
        sizes = (entry.crc, entry.size, entry.size, len(entry.name))
        fixed = (b"PK\1\2", _MADE_BY, _VERSION, 0, 0, _TIME, _DATE, *sizes, 0, 0, 0, 0, _MODE, entry.header)
        directory += _CENTRAL.pack(*fixed) + entry.name.encode()
    return directory + _END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), start, 0)


def _kind_of(head: bytes) -> tuple[str | None, str]:
    """What a file that is no bundle seems to be, and what to do; None where it begins like one."""
    if b"PK\3\4".startswith(head[:4]):
        if any(part in head for part in (b"/data.pkl", b"/byteorder", b"/.format")):
            return "it is a PyTorch checkpoint", "turn it into one with `mge-export --ckpt FILE`"
        if head[30:].startswith((b"onnx/", b"manifest.json")) or len(head) < 30 + len(b"onnx/"):
            return None, "it was cut short or damaged: copy or export it again"
        return "it is some other ZIP archive", "name the mge.plan file"
    if head[1:4] == b"trt":
        return "it is a raw TensorRT engine", "name the mge.plan file; engines are kept inside it"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return "it is a pickle, perhaps an old PyTorch checkpoint", "turn it into one with `mge-export --ckpt FILE`"
    if head[8:10] == b'{"':
        return "it is a safetensors file", "train or export with mge to get a bundle"
    # An ONNX ModelProto begins with field 1, ir_version, a varint from 3 (2017) to a few dozen; fields 2 to 8 follow.
    if head[:1] == b"\x08" and head[1:2] in bytes(range(3, 65)) and head[2:3] in b"\x12\x1a\x22\x28\x32\x3a\x42":
        return "it is a plain ONNX model", "name the mge.plan file; ONNX Runtime opens this one by itself"
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        return "it is an image", "name the mge.plan file with --engine and images as arguments"
    if head.lstrip()[:1] in (b"{", b"["):
        return "it is a JSON or text file", "name the mge.plan file"
    return "it is no file that mge knows, or its first bytes are damaged", "copy or export it again"
