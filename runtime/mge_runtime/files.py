"""Write files whole or not at all."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from mge_runtime.errors import OutputError

__all__ = ["atomic_path", "lock"]

_POLL = 0.1  # seconds between looks at a lock that another holds


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Generator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    The temporary file lies in the same folder, so the last step is one rename: readers see the old file or the whole
    new one. On any error, `KeyboardInterrupt` included, the temporary file is removed and `path` stays as it was.

    Raises:
        OutputError: the folder is missing or cannot be written. An `OSError` of the block that belongs elsewhere (a
            closed pipe, a file of another name) passes as it is.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror}; expected a writable folder, name another place"
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a published file gets the mode that the user's umask gives any other.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        _flush(temporary)
        temporary.replace(target)
    except BrokenPipeError:
        raise  # no regular file raises it: it is the reader of what the block prints that has enough
    except OSError as error:
        if error.filename is not None and str(error.filename) not in (str(temporary), str(target)):
            raise
        reason = error.strerror or error
        raise OutputError(f"cannot write {target}: {reason}; the old file, if any, is unchanged") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def lock(descriptor: int, waiting: Callable[[], None] = lambda: None) -> None:
    """Hold an open file for this process until the descriptor is closed; wait for whoever holds it.

    Windows has no lock that lets others read meanwhile; there nothing is held.

    Args:
        descriptor: of the file.
        waiting: is called ten times a second as long as another holds the file; what it raises ends the waiting.

    Raises:
        OSError: the file system has no locks.
    """
    if sys.platform != "win32":
        import fcntl

        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                time.sleep(_POLL)
            else:
                return


def _flush(path: Path) -> None:
    """Push the file's bytes to the disk, so that a power cut after the rename cannot leave an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
