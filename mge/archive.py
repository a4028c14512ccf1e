"""Files of `torch.save`: reading them without running code that they carry, and saying what other files are."""

from __future__ import annotations

import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mge_runtime.errors import CheckpointError, TrainingError, brief

# Harmless types that optimizer and scheduler states of other training loops hold and that PyTorch does not allow by
# itself: NumPy scalars (a learning rate, a best score), under NumPy's old and new names.
_SCALAR = np.float64(0).__reduce__()[0]
_INERT: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
]
_EXPECTED = "expected a checkpoint that mge-train or the authors' code wrote"
_ZIP = b"PK\x03\x04"  # begins what torch.save writes since 1.6


def check_file(path: Path) -> bytes:
    """The first bytes of a file, some 4,000, or why it cannot be a checkpoint; torch is not imported for that.

    Raises:
        CheckpointError: the file is missing, no file, empty, or of a known kind that is no checkpoint.
    """
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise CheckpointError(f"{path} is a directory; expected a file, such as {path / 'best.pt'}")
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path} is a pipe, a socket or a device; {_EXPECTED}")
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; {_EXPECTED}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {_EXPECTED}") from error
    if not head.startswith(_ZIP) and (kind := _foreign_kind(head, info.st_size)) is not None:
        raise CheckpointError(f"{path} is {kind}; {_EXPECTED}")
    return head


def read_archive(path: str | os.PathLike[str]) -> Any:
    """Read plain values and tensors (on the CPU) from a file of `torch.save`, in the format of today or of before 1.6.

    Only `torch.load(weights_only=True)` touches the pickle inside; a file that names any other object is refused.

    Raises:
        CheckpointError: the file is missing, empty, damaged, of another kind, or asks for objects to be built.
    """
    import torch

    path = Path(path)
    if check_file(path).startswith(_ZIP):
        _check_zip(path)
    try:
        with torch.serialization.safe_globals(_INERT), warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # about pickles that are then refused
            # By its stream: torch.load hands whatever is called .safetensors to another reader. Not mapped: it would
            # not compare the sizes of tensors with those of their entries.
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way while it is read
        raise CheckpointError(f"{path} {_why_unreadable(error)}") from error


def read_plain(path: Path) -> Any:
    """The plain values of a file of `torch.save`, without PyTorch: what stands for a tensor is of no use.

    For what is to be said early; the file is not checked. None where it cannot be read so: `read_archive` says why.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            with archive.open(name) as file:
                return _PlainValues(file, encoding="utf-8").load()
    except Exception:  # a damaged pickle can fail in any way
        return None


def _check_zip(path: Path) -> None:
    """Refuse a ZIP that is cut short, damaged or not of `torch.save`; PyTorch's reader skips the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            leaves = {name.partition("/")[2] for name in names}
            if "manifest.json" in names:
                raise CheckpointError(f"{path} is an exported bundle, not a checkpoint; run it with mge-run --engine")
            if "constants.pkl" in leaves:
                raise CheckpointError(f"{path} is a TorchScript archive, which holds code; {_EXPECTED}")
            if "data.pkl" not in leaves:
                raise CheckpointError(f"{path} is a ZIP of {len(names)} other files; {_EXPECTED}")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}); copy it again from its source") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: entry {damaged} fails its checksum; copy it again from its source")


class _PlainValues(pickle.Unpickler):
    """Reads the plain values of a pickle; nothing that it asks for is imported or called."""

    def find_class(self, _module: str, _name: str) -> Any:
        return _Inert

    def persistent_load(self, _: Any) -> Any:
        return _Inert()


class _Inert:
    """Stands for every object that a pickle asks for: accepts anything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...


def _foreign_kind(head: bytes, size: int) -> str | None:
    """Name the kind of a file that is no pickle; None: it may be one."""
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file, which mge-train --init takes for a bare backbone"
    if head.startswith(b"\x80"):  # PROTO, which begins every pickle of protocol 2 and later
        return None
    text = head.decode("utf-8", "replace")
    if all(character.isprintable() or character in "\t\r\n" for character in text):
        return f"a text file that begins with {text[:24]!r}"
    return "not a file of torch.save"


def _why_unreadable(error: Exception) -> str:
    text = " ".join(str(error).split())
    if match := re.search(r"GLOBAL (\S+) (?:was not|whose)", text):
        return (
            f"asks for the Python object {match[1]}, which could run code, so it was not opened; "
            "expected tensors and plain values alone (save model.state_dict(), not the model)"
        )
    if "Unsupported operand" in text or "Invalid magic number" in text:
        return f"is a Python pickle that torch.save did not write, so it was not opened; {_EXPECTED}"
    # PyTorch wraps the reason in advice to load the file unsafely, which is not ours.
    reason = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0][:120]
    return f"is cut short, damaged or not a file of torch.save ({type(error).__name__}: {reason}); {_EXPECTED}"


@contextmanager
def taking_up(path: Path) -> Generator[None]:
    """Say in one line that the training state of a file does not fit, whatever gives out inside the block.

    Raises:
        TrainingError: a part is missing, or of another kind than this version writes.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainingError(
            f"{path} holds a training state that cannot be taken up ({type(error).__name__}: {brief(error)}); expected "
            f"last.pt of this version of mge: fine-tune its model with --init {path}"
        ) from error
