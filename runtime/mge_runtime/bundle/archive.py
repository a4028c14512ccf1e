"""The container: a ZIP whose entries are stored uncompressed, one after the other, data aligned to pages.

Any unzip reads it. Reading here is stricter: every header must be exactly what `ArchiveWriter` writes, so that a
flipped byte anywhere outside the entries' data is found at once; the data is held by CRC-32 and SHA-256.
Fields are those of PKWARE's APPNOTE 6.3.10; the padding is the extra field 0xD935 that Android's zipalign uses.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from mge_runtime.bundle.layout import ALIGNMENT, is_entry_name
from mge_runtime.errors import OutputError

__all__ = ["ArchiveEntry", "ArchiveError", "ArchiveWriter", "read_directory"]

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_EXTRA = struct.Struct("<HHH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_VERSION = 10  # needed to extract: stored entries
_MADE_BY = 3 << 8 | _VERSION  # Unix, so that the file mode below counts
_TIME, _DATE = 0, 0x21  # 1980-01-01 00:00: the same content gives the same bytes
_MODE = 0o100644 << 16
_ALIGNMENT_FIELD = 0xD935
_LIMIT = 2**32 - 1  # bytes; beyond it ZIP needs its 64-bit records, which are not written here


class ArchiveError(Exception):
    """Why these bytes are not a whole archive that `ArchiveWriter` wrote."""


@dataclass(frozen=True)
class ArchiveEntry:
    """Where one entry's data lies."""

    name: str
    header: int  # bytes from the start of the file to its local header
    offset: int  # bytes from the start of the file, a multiple of ALIGNMENT
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
            name: a name of `mge_runtime.bundle.layout`, not yet in the archive.
            chunks: its data, in pieces of any size.

        Raises:
            OutputError: the archive would exceed 4 GiB.
        """
        if not is_entry_name(name) or any(entry.name == name for entry in self._entries):
            raise ValueError(f"{name!r} cannot be the name of another entry")
        extra = _padding(self._position + _LOCAL.size + len(name))
        offset = self._position + _LOCAL.size + len(name) + len(extra)
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
        self._stream.write(_local_header(entry) + name.encode() + extra)
        self._position = offset + size
        self._entries.append(entry)
        return entry

    def finish(self) -> None:
        """Write the directory; nothing can be added afterwards."""
        directory = _directory(self._entries)
        self._stream.seek(self._position)
        self._stream.write(directory + _end(len(self._entries), len(directory), self._position))
        self._stream.truncate()
        self._stream.flush()


def read_directory(data: memoryview) -> list[ArchiveEntry]:
    """Find every entry, in the order of the file.

    Args:
        data: the whole file, usually mapped; only headers are touched.

    Raises:
        ArchiveError: any header differs from what `ArchiveWriter` would write for these entries.
    """
    if len(data) < _END.size or bytes(data[-_END.size :][:4]) != _END_MAGIC:
        raise ArchiveError("its directory is missing at the end of the file")
    count, size, start = _END.unpack(data[-_END.size :])[4:7]
    directory_end = len(data) - _END.size
    if start + size != directory_end:
        raise ArchiveError(f"its directory should end at byte {start + size} and ends at byte {directory_end}")
    directory = data[start:directory_end]
    entries = _parse_directory(directory, data)
    if _directory(entries) != bytes(directory) or bytes(data[directory_end:]) != _end(count, size, start):
        raise ArchiveError("its directory was changed or damaged after it was written")
    if count != len(entries):
        raise ArchiveError(f"its directory lists {len(entries)} entries and counts {count}")
    _check_positions(entries, data, start)
    return entries


def _parse_directory(directory: memoryview, data: memoryview) -> list[ArchiveEntry]:
    entries: list[ArchiveEntry] = []
    position = 0
    while position < len(directory):
        if position + _CENTRAL.size > len(directory):
            raise ArchiveError("its directory is cut short")
        fields = _CENTRAL.unpack(directory[position : position + _CENTRAL.size])
        crc, size, name_length, header = fields[7], fields[9], fields[10], fields[16]
        raw = bytes(directory[position + _CENTRAL.size : position + _CENTRAL.size + name_length])
        name = raw.decode("ascii", "replace")
        if not is_entry_name(name):
            raise ArchiveError(f"it holds an entry called {name!r}, which no bundle has")
        if header + _LOCAL.size > len(data):
            raise ArchiveError(f"its entry {name} lies beyond the end of the file")
        lengths = _LOCAL.unpack(data[header : header + _LOCAL.size])[9:11]
        offset = header + _LOCAL.size + sum(lengths)
        entries.append(ArchiveEntry(name, header, offset, size, crc))
        position += _CENTRAL.size + name_length
    if len({entry.name for entry in entries}) != len(entries):
        raise ArchiveError("it holds two entries of the same name")
    return entries


def _check_positions(entries: Sequence[ArchiveEntry], data: memoryview, end: int) -> None:
    """Hold local headers and padding to what would have been written; entries follow each other without gaps."""
    position = 0
    for entry in entries:
        name = entry.name.encode()
        padding = _padding(position + _LOCAL.size + len(name))
        offset = position + _LOCAL.size + len(name) + len(padding)
        if (entry.header, entry.offset) != (position, offset) or bytes(data[position:offset]) != _local_header(
            entry
        ) + name + padding:
            raise ArchiveError(f"the header of its entry {entry.name} was changed or damaged after it was written")
        position = entry.offset + entry.size
    if position != end:
        raise ArchiveError("it holds bytes that belong to no entry")


def _padding(position: int) -> bytes:
    """The extra field that moves the data, which would start at `position`, to the next page."""
    length = -(position + _EXTRA.size) % ALIGNMENT + _EXTRA.size
    return _EXTRA.pack(_ALIGNMENT_FIELD, length - 4, ALIGNMENT) + bytes(length - _EXTRA.size)


def _local_header(entry: ArchiveEntry) -> bytes:
    """The 30 bytes before name and padding."""
    extra = entry.offset - entry.header - _LOCAL.size - len(entry.name)
    return _LOCAL.pack(
        _LOCAL_MAGIC, _VERSION, 0, 0, _TIME, _DATE, entry.crc, entry.size, entry.size, len(entry.name), extra
    )


def _directory(entries: Sequence[ArchiveEntry]) -> bytes:
    """The central directory: one record and name for each entry; the padding is in the local headers alone."""
    records: list[bytes] = []
    for entry in entries:
        sizes = (entry.crc, entry.size, entry.size, len(entry.name))
        fixed = (_CENTRAL_MAGIC, _MADE_BY, _VERSION, 0, 0, _TIME, _DATE, *sizes, 0, 0, 0, 0, _MODE, entry.header)
        records.append(_CENTRAL.pack(*fixed) + entry.name.encode())
    return b"".join(records)


def _end(count: int, size: int, start: int) -> bytes:
    return _END.pack(_END_MAGIC, 0, 0, count, count, size, start, 0)
