"""Read and write: files whole or not at all, their hashes and sizes, standard output."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from mge_runtime.errors import OutputError

# Ends every temporary name; its owner holds a lock, so one without a lock was left by a dead process.
_PART = ".mge-part"
_LONGEST_STEM = 150  # bytes; file systems allow 255 for the whole name
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 1 << 20  # bytes, read at once
_adopted: dict[Path, list[int]] = {}  # by temporary file: locked descriptors of the files that took its place


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Generator[Path]:
    """Yield a temporary path whose content takes the place of `path` when the block ends without an error.

    A file is replaced by one rename from the same folder: readers see the old file or the whole new one. The new one
    has the old one's permissions and, where this process may give it away, its owner. A link is followed. A pipe or a
    character device is opened before the block and written to after it. On any error, `KeyboardInterrupt` included, the
    temporary file is removed and `path` stays as it was; what a killed process left beside it goes at the next writing.

    Raises:
        OutputError: the place cannot be written, or is no file, pipe or character device. An `OSError` of the block
            that belongs elsewhere (a closed pipe, a file of another name) passes as it is.
    """
    target = Path(path)
    with ExitStack() as stack:
        stream = None
        try:
            place, old = _destination(target)
            if place is None:  # a pipe waits here for its reader; what /dev/fd/3 stands for may be a log that grows
                stream = stack.enter_context(target.open("ab", buffering=0))
                place = Path(tempfile.gettempdir(), target.name)
            temporary = stack.enter_context(_part(place, private=old is not None))
        except OSError as error:
            raise _unwritable(target, error) from error
        try:
            yield temporary
            if stream is not None:
                with temporary.open("rb") as content:
                    shutil.copyfileobj(content, stream)
                return
            if old is not None:
                if sys.platform != "win32":
                    with suppress(OSError):
                        os.chown(temporary, old.st_uid, old.st_gid)
                temporary.chmod(stat.S_IMODE(old.st_mode))
            with temporary.open("rb") as content:  # a power cut after the rename cannot leave an empty file
                os.fsync(content.fileno())
            temporary.replace(place)
        except BrokenPipeError:
            raise  # no regular file raises it: it is the reader of what is written who has enough
        except OSError as error:
            if error.filename is not None and str(error.filename) not in (str(temporary), str(target), str(place)):
                raise
            reason = error.strerror or error
            raise OutputError(f"cannot write {target}: {reason}; the old file, if any, is unchanged") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work that `atomic_path` would fail: a temporary file is written there, and removed.

    Permissions do not tell: root passes them on a read-only file system, and a disk may be full.

    Raises:
        OutputError: it would.
    """
    target = Path(path)
    try:
        place, _ = _destination(target)
        if place is not None:
            with _part(place) as temporary:
                temporary.write_bytes(bytes(4096))
    except OSError as error:
        raise _unwritable(target, error) from error


def check_output(path: Path) -> None:
    """As `check_writable`, for what must be a file of its own in a folder that is there.

    Raises:
        OutputError: it cannot be.
    """
    with suppress(OSError):  # check_writable says it
        if path.exists() and not path.is_file():
            found = "a folder; name a file in it" if path.is_dir() else "a device or a pipe"
            raise OutputError(f"cannot write {path}: it is {found}")
        if not path.parent.is_dir():
            found = "is a file;" if path.parent.exists() else "does not exist; make it or"
            raise OutputError(f"cannot write {path}: {path.parent} {found} name another place")
    check_writable(path)


def check_folder(folder: Path) -> None:
    """As `check_writable`, for a folder, which need not be there yet.

    Raises:
        OutputError: files could not be written in it.
    """
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    try:
        with _part(place / "folder") as temporary:
            temporary.write_bytes(bytes(4096))
    except OSError as error:
        raise _unwritable(folder, error) from error


@contextmanager
def temporary_folder(purpose: str) -> Generator[Path]:
    """Make a folder for large temporary files in TMPDIR; what killed processes left there goes first.

    Args:
        purpose: a word for its name.

    Raises:
        OutputError: it cannot be made, or there is no room for what the block writes.
    """
    parent = Path(tempfile.gettempdir())
    try:
        with _part(parent / f"mge-{purpose}") as part:
            folder = Path(f"{part}.d")
            folder.mkdir(mode=0o700)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if _PART not in str(error.filename) and error.errno not in _NO_ROOM:
            raise
        raise OutputError(
            f"cannot write to {parent}: {error.strerror or error}; expected a temporary folder with room: "
            "set TMPDIR to another"
        ) from error


def lock(descriptor: int, *, wait: bool = True) -> None:
    """Lock an open file for this process until the descriptor is closed.

    Windows has no lock that lets others read meanwhile; there nothing is locked.

    Args:
        descriptor: of the file.
        wait: for whoever has locked it, until a signal raises.

    Raises:
        BlockingIOError: another has locked it, and `wait` is off.
        OSError: the file system has no locks.
    """
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_temporary(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one that `atomic_path` yielded, which its owner has locked."""
    return os.fspath(path).endswith(_PART)


def _destination(target: Path) -> tuple[Path | None, os.stat_result | None]:
    """Where a file is put and what it replaces; no place where the target is written to as it is.

    Raises:
        OutputError: the target is of a kind that is not written.
        OSError: it cannot be looked at.
    """
    try:
        found = target.stat()
    except FileNotFoundError:  # or a link to a file that is to be made
        return Path(os.path.realpath(target)), None
    if stat.S_ISDIR(found.st_mode):
        raise OutputError(f"cannot write {target}: it is a folder; expected a file name")
    if stat.S_ISREG(found.st_mode) and not _is_descriptor(target):
        return Path(os.path.realpath(target)), found
    if stat.S_ISBLK(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        raise OutputError(f"cannot write {target}: it is a disk or a socket; expected a file, a pipe or a terminal")
    return None, None


def _is_descriptor(target: Path) -> bool:
    """Whether a name stands for an open descriptor, as /dev/stdout does: the file behind it may be another's log."""
    while target.is_symlink():
        if os.path.realpath(target.parent).startswith("/proc/"):
            return True
        target = target.parent / target.readlink()
    return False


def _unwritable(target: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {target}: {error.strerror}; expected a writable folder, name another place")


@contextmanager
def _part(place: Path, *, private: bool = False) -> Generator[Path]:
    """Make a temporary file beside a place; it is locked as long as the block runs, and gone after it."""
    _sweep(place.parent)
    stem = place.name.encode("utf-8", "ignore")[:_LONGEST_STEM].decode("utf-8", "ignore")
    while True:
        path = place.with_name(f".{stem}.{secrets.token_hex(4)}{_PART}")
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
            with suppress(OSError):  # a file system without locks, where nobody sweeps either
                lock(descriptor)
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)  # swept before it was locked
    if sys.platform == "win32":  # where an open file can be neither renamed nor removed
        os.close(descriptor)
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink()
        if sys.platform != "win32":
            if is_temporary(place):  # it may have become that file, which stays locked until its own block ends
                _adopted.setdefault(place, []).append(descriptor)
            else:
                os.close(descriptor)
            for adopted in _adopted.pop(path, ()):
                os.close(adopted)


@cache
def _sweep(folder: Path) -> None:
    """Remove what dead processes of this user left in a folder; once for each folder, for it may hold many files."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        for part in folder.glob(f".*{_PART}"):
            with suppress(OSError), ExitStack() as stack:
                descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                stack.callback(os.close, descriptor)
                lock(descriptor, wait=False)  # a living owner has locked it
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(f"{part}.d", ignore_errors=True)
                    part.unlink()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def echo(text: str, *, nl: bool = True) -> None:
    """Print to standard output.

    Raises:
        OutputError: it is closed or cannot be written; a closed pipe (`| head`) passes, which click ends quietly.
    """
    import click  # not above: opening a bundle does without

    stdout: object = sys.stdout  # None where the process was started without one
    if stdout is None:
        raise OutputError("cannot print: standard output is closed; name another place for the output")
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python would try again at its end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"cannot print: {error.strerror}; name another place for the output") from error


def format_bytes(count: int) -> str:
    """For example "98.0 MB" (1 MB = 1,000,000 bytes)."""
    if count < 1000:
        return f"{count} B"
    for unit, size in (("kB", 1e3), ("MB", 1e6)):
        if count / size < 999.95:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e9:.2f} GB"
