"""The timing cache: kernels that TensorRT measured, so that the next build measures less."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from mge_runtime.errors import OutputError
from mge_runtime.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TimingCache"]


class TimingCache:
    """A file of measurements that a build reads and adds to.

    One that the user named must be usable, which is found out here, before anything is built. The default one saves
    time where it can and is never a reason to fail.

    Args:
        path: the file; it may be missing.
        named: whether the user named it.
        say: is told, once, that the default one cannot be used.

    Raises:
        OutputError: a named file cannot be read or written.
    """

    def __init__(self, path: Path, *, named: bool, say: Callable[[str], None]) -> None:
        self._path: Path | None = path
        self._named = named
        self._say = say
        self.content = b""  # what TensorRT is given, and gives back
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():  # a pipe would wait, a device never end
                raise OSError(errno.EINVAL, "it is no regular file")
            self.content = path.read_bytes() if path.exists() else b""
            with atomic_path(path) as temporary:
                temporary.write_bytes(self.content)
        except (OSError, OutputError) as error:
            self._failed(error)

    def store(self, content: bytes) -> None:
        """Keep what TensorRT has measured by now; called after each graph, so that a build that is stopped keeps it.

        Raises:
            OutputError: a named file cannot be written.
        """
        self.content = content
        if self._path is None or not content:
            return
        try:
            with atomic_path(self._path) as temporary:
                temporary.write_bytes(content)
        except (OSError, OutputError) as error:
            self._failed(error)

    def _failed(self, error: OSError | OutputError) -> None:
        reason = error.strerror or error if isinstance(error, OSError) else error
        if self._named:
            raise OutputError(f"cannot use the timing cache {self._path}: {reason}; name another file") from error
        self._say(f"no timing cache, the next build measures anew: {reason}")
        self._path = None
