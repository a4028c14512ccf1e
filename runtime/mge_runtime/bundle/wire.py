"""Read and write protocol-buffer messages field by field (protobuf.dev, "Encoding"): a device has no `onnx` package."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["WireError", "encoded", "fields", "varint", "wire_field"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class WireError(Exception):
    """The bytes are no protocol-buffer message."""


def fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield (number, the whole field, its value) of each field of a message.

    Raises:
        WireError: it is no message.
    """
    position = 0
    while position < len(message):
        tag, start = varint(message, position)
        kind = tag & 7
        if kind == _VARINT:
            end = varint(message, start)[1]
        elif kind == _BYTES:
            length, start = varint(message, start)
            end = start + length
        elif kind in (_FIXED64, _FIXED32):
            end = start + (8 if kind == _FIXED64 else 4)
        else:
            raise WireError(f"unknown wire type {kind}")
        if end > len(message):
            raise WireError("it is cut short")
        yield tag >> 3, message[position:end], message[start:end]
        position = end


def varint(message: memoryview, position: int) -> tuple[int, int]:
    """Read one variable-length integer: its value and the position behind it.

    Raises:
        WireError: there is none.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise WireError("it is cut short")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise WireError("an integer is too long")


def wire_field(number: int, value: bytes) -> bytes:
    """A field of length-delimited bytes: a string, or a message."""
    return encoded(number << 3 | _BYTES) + encoded(len(value)) + value


def encoded(value: int) -> bytes:
    """A variable-length integer."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
