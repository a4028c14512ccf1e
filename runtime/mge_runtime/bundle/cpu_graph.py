"""A half-precision or INT8 graph re-encoded for a CPU, without the package `onnx`.

One graph serves all targets: FP16 tensors, and symmetric INT8 between QuantizeLinear and DequantizeLinear, which is all
that TensorRT takes. ONNX Runtime's CPU provider wants neither. Measured with 1.31: it has no integer convolution
between FP16 scales (a graph of 48 took 17 times as long as FP32, and its optimiser changed every answer), and it drops
a ReLU before a quantisation only where zero is the lowest code. So, as a graph is opened:

- every FP16 constant is widened, and what was cast to FP16 is cast to FP32. The weights keep their rounded values;
- `fast`: activations are coded as uint8, those after a ReLU or a clip with all 256 codes from zero on (INT8 has 128
  for them), the others with their zero at 128 and the same steps.

Field numbers are those of onnx.proto3, as in `onnx_graph`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from mge_runtime.bundle.wire import WireError, encoded, fields, varint, wire_field
from mge_runtime.errors import BundleError

__all__ = ["POSITIVE_ZERO", "SIGNED_ZERO", "cpu_graph", "integer_entries"]

# Initialisers, int8 scalars of 0, that quantised activations have as their zero point: by their names a graph tells
# which activations are never negative.
SIGNED_ZERO = "signed_zero_point"
POSITIVE_ZERO = "positive_zero_point"

_FLOAT, _UINT8, _INT8, _FLOAT16 = 1, 2, 3, 10  # TensorProto.DataType
_CODES = 127 / 255  # of a positive activation: steps of uint8 in those of symmetric int8
_HALF = "__half"  # suffix of a constant's name before it is widened


def cpu_graph(graph: bytes, *, fast: bool) -> bytes:
    """Re-encode a graph that `mge-export` wrote.

    Args:
        graph: serialised ModelProto; one without FP16 tensors and INT8 activations stays as it is.
        fast: for integer kernels; False: INT8 as TensorRT computes it.

    Returns:
        A serialised ModelProto with the same border.

    Raises:
        BundleError: the bytes are no ONNX model.
    """
    try:
        return b"".join(
            wire_field(7, _graph(value, fast)) if number == 7 else bytes(raw)
            for number, raw, value in fields(memoryview(graph))
        )
    except (WireError, UnicodeDecodeError, struct.error, ValueError) as error:
        raise BundleError(f"a stage's graph is no ONNX model ({error}); expected one that mge-export wrote") from error


def integer_entries() -> dict[str, str]:
    """Entries of ONNX Runtime's session configuration that a `fast` graph needs on this CPU.

    Without VNNI, x86 sums two products of uint8 and int8 in 16 bits, where they overflow. ONNX Runtime then must take
    kernels that do not; with VNNI these would only be slower (measured: by a half).
    """
    try:
        vnni = "vnni" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # not Linux: nothing says
        vnni = False
    return {} if vnni else {"session.x64quantprecision": "1"}


def _graph(graph: memoryview, fast: bool) -> bytes:
    parts = list(fields(graph))
    positive = {scale for number, _, node in parts if number == 1 for scale in _positive_scales(node)} if fast else ()
    casts: list[bytes] = []
    kept: list[bytes] = []
    for number, raw, value in parts:
        if number == 1:
            kept.append(wire_field(1, _node(value)))
        elif number == 5:
            tensor, cast = _tensor(value, fast, positive)
            kept.append(wire_field(5, tensor))
            casts += [wire_field(1, cast)] if cast else []
        elif number != 13:  # inferred types, which may be FP16
            kept.append(bytes(raw))
    return b"".join(casts + kept)


def _positive_scales(node: memoryview) -> Iterator[str]:
    inputs = [bytes(value).decode() for number, _, value in fields(node) if number == 1]
    if len(inputs) == 3 and inputs[2] == POSITIVE_ZERO:
        yield inputs[1]


def _node(node: memoryview) -> bytes:
    """A Cast to FP16 becomes one to FP32; others stay."""
    if _text(node, 4) != "Cast":
        return bytes(node)
    return b"".join(
        wire_field(5, _attribute(value)) if number == 5 else bytes(raw) for number, raw, value in fields(node)
    )


def _attribute(attribute: memoryview) -> bytes:
    if _text(attribute, 1) != "to":
        return bytes(attribute)
    return b"".join(
        _integer(3, _FLOAT) if number == 3 and varint(value, 0)[0] == _FLOAT16 else bytes(raw)
        for number, raw, value in fields(attribute)
    )


def _tensor(tensor: memoryview, fast: bool, positive: set[str] | tuple[()]) -> tuple[bytes, bytes | None]:
    """An initialiser re-encoded, and a node that widens it where its bytes are elsewhere."""
    name = _text(tensor, 8)
    kind = next((varint(value, 0)[0] for number, _, value in fields(tensor) if number == 2), 0)
    if fast and kind == _INT8 and name in (SIGNED_ZERO, POSITIVE_ZERO):
        return _replaced(tensor, _UINT8, b"\x80" if name == SIGNED_ZERO else b"\x00"), None
    raw = next((value for number, _, value in fields(tensor) if number == 9), None)
    if name in positive and raw is not None and kind in (_FLOAT, _FLOAT16):
        (scale,) = struct.unpack("<e" if kind == _FLOAT16 else "<f", raw)
        return _replaced(tensor, _FLOAT, struct.pack("<f", scale * _CODES)), None
    if kind != _FLOAT16:
        return bytes(tensor), None
    if raw is not None:
        import numpy as np  # a weight has millions of numbers; the package is imported without it

        return _replaced(tensor, _FLOAT, np.frombuffer(raw, "<f2").astype("<f4").tobytes()), None
    # ONNX Runtime folds the cast while it opens the graph.
    renamed = b"".join(bytes(part) for number, part, _ in fields(tensor) if number != 8)
    attribute = wire_field(1, b"to") + _integer(3, _FLOAT) + _integer(20, 2)  # AttributeProto.type: INT
    cast = wire_field(1, (name + _HALF).encode()) + wire_field(2, name.encode())
    cast += wire_field(3, f"{name}_widened".encode()) + wire_field(4, b"Cast") + wire_field(5, attribute)
    return renamed + wire_field(8, (name + _HALF).encode()), cast


def _replaced(tensor: memoryview, kind: int, data: bytes) -> bytes:
    """A tensor of the same name and shape with other numbers."""
    kept = b"".join(bytes(raw) for number, raw, _ in fields(tensor) if number in (1, 8))
    return kept + _integer(2, kind) + wire_field(9, data)


def _integer(number: int, value: int) -> bytes:
    return encoded(number << 3) + encoded(value)


def _text(message: memoryview, number: int) -> str:
    return next((bytes(value).decode() for field, _, value in fields(message) if field == number), "")
