"""Which files were hashed and have not been touched since, so that the next start need not hash them again.

As git's index does it: a file whose inode, size and times of change are those of then holds the bytes of then. A
program cannot set back the time of an inode's change, so a copy, a restored backup or an edit is hashed anew. Bytes
that rot on a disk, or are written through a mapping that was dirty already, change no time; they are found by the
CRC-32, which is checked at every start. What passes is a change whose CRC-32 is the same, made in one of these ways.
Windows knows no time of an inode's change: there every start hashes.

<cache>/hashed/<hash of all that, 32 digits>: an empty file of this user.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mge_runtime.cache import cache_folder

__all__ = ["Untouched"]

_SETTLED = 2.0  # seconds since the last change: a change right after it could bear the same time
_KEPT = 90 * 86400.0  # seconds that a stamp lasts


class Untouched:
    """Some entries of one file, as it is now.

    Args:
        descriptor: of the open file.
        manifest_sha256: hash of what says which hashes the entries have.
        names: the entries.
    """

    def __init__(self, descriptor: int, manifest_sha256: str, names: Iterable[str]) -> None:
        self._descriptor = descriptor
        self._parts = (manifest_sha256, *sorted(names))
        self._then = self._stamp()

    def hashed_before(self) -> bool:
        """Whether they were all hashed, and found good, since the file last changed."""
        with suppress(OSError):
            if self._then is not None:
                stamp = self._then.stat()
                return stamp.st_uid == os.getuid() and time.time() - stamp.st_mtime < _KEPT
        return False

    def remember(self) -> None:
        """They were hashed and found good; a cache that cannot be written is no error."""
        with suppress(OSError):
            status = os.fstat(self._descriptor)
            changed = time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED
            if changed or self._then is None or self._then != self._stamp():
                return
            self._then.parent.mkdir(parents=True, exist_ok=True)
            for old in self._then.parent.iterdir():
                if time.time() - old.stat().st_mtime > _KEPT:
                    old.unlink(missing_ok=True)
            self._then.touch()

    def _stamp(self) -> Path | None:
        if sys.platform == "win32":
            return None
        try:
            status = os.fstat(self._descriptor)
        except OSError:  # it was closed, as whoever reads it will say
            return None
        known = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest = hashlib.sha256(repr((known, self._parts)).encode()).hexdigest()
        return cache_folder() / "hashed" / digest[:32]
