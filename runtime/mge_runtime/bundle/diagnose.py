"""Say what a file that is no readable bundle seems to be."""

from __future__ import annotations

from mge_runtime.errors import BundleError

__all__ = ["not_a_bundle"]

_EXPORT = "expected a bundle that mge-export wrote"
# An ONNX ModelProto begins with field 1, ir_version, a varint between 3 (2017) and a few dozen; fields 2 to 8 follow.
_IR_VERSIONS = bytes(range(3, 65))
_MODEL_FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42"


def not_a_bundle(name: str, head: bytes, size: int, reason: str) -> BundleError:
    """The error for a file that cannot be opened.

    Args:
        name: how to call the file.
        head: its first bytes, 64 are enough.
        size: its size in bytes.
        reason: why it is no bundle, for a file that begins like one.
    """
    found, advice = _kind(head)
    if size == 0:
        found, advice = "it is empty (0 bytes)", "copy or export it again"
    elif found is None:
        found, advice = f"{reason} (file of {size} bytes)", "it was cut short or damaged: copy or export it again"
    return BundleError(f"cannot open {name}: {found}; {_EXPORT}: {advice}")


def _kind(head: bytes) -> tuple[str | None, str]:
    """What the file is and what to do; None where it begins like a bundle."""
    if head[:4] == b"PK\x03\x04":
        inside = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        if b"/data.pkl" in head or b"/byteorder" in head or b"/.format" in head:
            return "it is a PyTorch checkpoint", "turn it into one with `mge-export --ckpt FILE`"
        if inside.startswith((b"onnx/", b"manifest.json")) or len(head) < 30 + len(b"onnx/"):
            return None, ""
        return "it is some other ZIP archive", "name the mge.plan file"
    if b"PK\x03\x04".startswith(head[:4]):
        return None, ""
    if head[1:4] == b"trt":
        return "it is a raw TensorRT engine", "name the mge.plan file; engines are kept inside it"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "it is a pickle, perhaps an old PyTorch checkpoint", "turn it into one with `mge-export --ckpt FILE`"
    if head[8:10] == b'{"':
        return "it is a safetensors file", "train or export with mge to get a bundle"
    if head[:1] == b"\x08" and head[1:2] in _IR_VERSIONS and head[2:3] in _MODEL_FIELDS:
        return "it is a plain ONNX model", "name the mge.plan file; ONNX Runtime opens this one by itself"
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n":
        return "it is a picture", "name the mge.plan file with --engine and pictures as arguments"
    if head.lstrip()[:1] in (b"{", b"["):
        return "it is a JSON or text file", "name the mge.plan file"
    return "it is no file that mge knows, or its first bytes are damaged", "copy or export it again"
