"""Open a bundle: directory and manifest at once, everything else when it is asked for."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mge_runtime.bundle.archive import ArchiveEntry, ArchiveError, read_directory
from mge_runtime.bundle.attachments import Calibration, EngineDescription
from mge_runtime.bundle.diagnose import not_a_bundle
from mge_runtime.bundle.layout import (
    CALIBRATION,
    CHAIN,
    MANIFEST,
    cpu_graph_entry,
    engine_description,
    engine_plan,
    graph_entry,
    target_of,
    weights_entry,
)
from mge_runtime.cpus import cpu_count
from mge_runtime.errors import BundleError
from mge_runtime.fields import LARGEST
from mge_runtime.files import atomic_path
from mge_runtime.manifest import Entry, Manifest

__all__ = ["Bundle", "Region", "WatchedFile"]

_CHUNK = 1 << 20  # bytes; hashing reads through a buffer, so that it does not fill memory with mapped pages


class WatchedFile:
    """A bundle's file kept open, to notice when somebody writes into it; close it after use.

    Weights that are mapped change with the file: after `cp new.plan mge.plan` half of them may be another model's. A
    file that takes the place of this one (`mv`) does no harm, since what is open here stays as it is.
    """

    def __init__(self, path: Path, descriptor: int, status: os.stat_result | None = None) -> None:
        self.path = path
        self.descriptor = descriptor  # -1: closed
        self.status = status or os.fstat(descriptor)  # as it was before anything was read

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back; closing twice does nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def duplicate(self) -> WatchedFile:
        """The same file, to be closed by itself."""
        return WatchedFile(self.path, os.dup(self.descriptor), self.status)

    def check(self) -> None:
        """Make sure that nobody wrote into the file; this takes some microseconds.

        Raises:
            BundleError: its size or its time of change is another.
        """
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise BundleError(
                f"{self.path} was overwritten while it was open, and with it the weights that are mapped from it; open "
                "it again, and replace a bundle by a rename (mv), never in place (cp, scp, rsync --inplace)"
            )


@dataclass(frozen=True)
class Region:
    """Where an entry's data lies on disk."""

    path: Path  # absolute, no symbolic links
    offset: int  # bytes, a multiple of 4096
    size: int  # bytes


class Bundle:
    """A bundle open for reading; use it as a context manager or call `close`.

    Opening checks the directory (every header), the manifest and that each model entry it names is there in its size
    and with its CRC-32. Graphs and engines are hashed when they are read; what is mapped is checked by `verifying`.
    Reading is safe from several threads.
    """

    def __init__(self, file: WatchedFile, *, maps_weights: bool = True) -> None:
        self.path = path = file.path
        self.maps_weights = maps_weights  # whether backends may map the weights; else they load them
        self._file = file
        self._mapped = mmap.mmap(file.descriptor, 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._mapped)
        try:
            entries = read_directory(self._view)
        except ArchiveError as error:
            raise not_a_bundle(str(path), bytes(self._view[:256]), len(self._view), str(error)) from error
        self._entries = {entry.name: entry for entry in entries}
        if MANIFEST not in self._entries:
            raise BundleError(f"cannot open {path}: it holds no {MANIFEST}; expected a bundle that mge-export wrote")
        data = self._read_by_crc(MANIFEST)
        self.manifest_sha256 = hashlib.sha256(data).hexdigest()
        with _naming(path):
            self.manifest = Manifest.from_json(data)
        self._check_entries()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, maps_weights: bool = True) -> Bundle:
        """Open a bundle for reading.

        Args:
            path: the file.
            maps_weights: whether backends may map its weights, as `mmap` of `mge_runtime.Pipeline.open`.

        Raises:
            BundleError: the file is missing, no bundle, damaged, cut short or of a newer schema.
        """
        try:
            resolved = Path(path).resolve(strict=True)
            # A pipe that nobody writes to would block for ever.
            descriptor = os.open(resolved, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError as error:
            raise BundleError(f"no bundle at {path}: the file does not exist; check the name") from error
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
            raise _cannot_open(path, error) from error
        file = WatchedFile(resolved, descriptor)
        try:
            if stat.S_ISDIR(file.status.st_mode):
                raise BundleError(f"cannot open {path}: it is a folder; expected an mge.plan file, name one inside it")
            if not stat.S_ISREG(file.status.st_mode):
                raise BundleError(f"cannot open {path}: it is no regular file; expected an mge.plan file")
            if file.status.st_size == 0:
                raise not_a_bundle(str(path), b"", 0, "")
            return cls(file, maps_weights=maps_weights)
        except (OSError, ValueError) as error:  # ValueError: it is empty by now
            file.close()
            raise _cannot_open(path, error) from error
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; what `view` lent stays valid until it is dropped."""
        if self._file.descriptor < 0:
            return
        self._file.close()
        self._view.release()
        with suppress(BufferError):  # a lent view keeps the mapping alive
            self._mapped.close()

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size in bytes of every entry, in the order of the file."""
        return {entry.name: entry.size for entry in self._entries.values()}

    @property
    def sha256(self) -> str:
        """One hash over everything that can change an answer, whatever the order of the entries; nothing large is read.

        It is the SHA-256 of what `sha256sum` prints of the bundle's JSON documents (`calibration.json`,
        `engines/*/engine.json`, `manifest.json`) and of `onnx/chain.onnx`, sorted by their names. The manifest names
        the hashes of graphs and weights, `engine.json` those of engines; `verify` checks these.

        Raises:
            BundleError: a document was damaged.
        """
        documents = sorted(name for name in self._entries if name.endswith(".json") or name == CHAIN)
        total = hashlib.sha256()
        for name in documents:
            digest = hashlib.sha256()
            for chunk in self.chunks(name):
                digest.update(chunk)
            total.update(f"{digest.hexdigest()}  {name}\n".encode())
        return total.hexdigest()

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that the bundle holds engines for, sorted."""
        return tuple(sorted({target for name in self._entries if (target := target_of(name)) is not None}))

    def region(self, name: str) -> Region:
        """Where an entry lies on disk, for whoever maps it; its hash is not checked here.

        Raises:
            BundleError: there is no such entry.
        """
        entry = self._entry(name)
        return Region(self.path, entry.offset, entry.size)

    def view(self, name: str) -> memoryview:
        """An entry's bytes, mapped and read-only: engines are too large to copy. Its hash is not checked here.

        Raises:
            BundleError: there is no such entry.
        """
        entry = self._entry(name)
        return memoryview(self._mapped)[entry.offset : entry.offset + entry.size]

    def read(self, name: str) -> bytes:
        """An entry's bytes, checked against its hash (documents and `onnx/chain.onnx`: against the CRC-32).

        Raises:
            BundleError: there is no such entry, or its bytes were damaged.
        """
        parts: list[bytes] = []
        self._verify(self._entry(name), lambda chunk: parts.append(bytes(chunk)))
        return b"".join(parts)

    def verify(self, names: Iterable[str] | None = None, *, expected: str | None = None) -> None:
        """Check entries (all of them by default) against their hashes, in parallel.

        Args:
            names: the entries.
            expected: what `sha256` must be, told by whom you trust; the bundle's own hashes find damage alone, since
                whoever changes an entry can change the hash beside it.

        Raises:
            BundleError: the bundle has another hash, there is no such entry, or its bytes were damaged.
        """
        if expected is not None and expected.lower() != self.sha256:
            raise BundleError(
                f"{self.path} has the hash {self.sha256}; expected {expected}: its model, its calibration or its "
                "engines are others than those that this hash was told for; get the file again"
            )
        with self.verifying(self._entries if names is None else names, threads=cpu_count()):
            pass

    @contextmanager
    def verifying(self, names: Iterable[str], *, threads: int | None = None, quick: bool = False) -> Generator[None]:
        """Check entries in other threads while the block runs; what the block made counts only once it has ended.

        Args:
            names: the entries.
            threads: how many to use; default: one processor is left to the block.
            quick: hold them by the CRC-32 that the manifest names instead of the SHA-256, an eighth of the time: that
                finds damage and files of another model, not bytes that somebody made to have the same CRC-32.

        Raises:
            BundleError: an entry's bytes were damaged; where the block failed too, this is the likely reason for it.
        """
        entries = sorted((self._entry(name) for name in names), key=lambda entry: -entry.size)
        check = self._verify_quickly if quick else self._verify
        workers = threads or max(1, min(cpu_count() - 1, 4))
        with ThreadPoolExecutor(workers, thread_name_prefix="mge-hash") as pool:
            checks = [pool.submit(check, entry) for entry in entries]
            try:
                yield
            finally:
                try:
                    for done in checks:
                        done.result()
                finally:
                    pool.shutdown(cancel_futures=True)

    def in_place(self, descriptor: int | None = None) -> bool:
        """Whether `path` still names the file that is open here (and as `descriptor`, if one is given), as it was.

        Asked by whoever opens `region().path` by itself: another process may replace or overwrite it at any time.
        """
        try:
            self._file.check()
            opened = [os.fstat(d) for d in (self._file.descriptor, descriptor) if d is not None]
            return all(os.path.samestat(self.path.stat(), status) for status in opened)
        except (OSError, BundleError):
            return False

    def watched(self) -> WatchedFile:
        """This file for whoever goes on using what it mapped after the bundle is closed.

        Raises:
            BundleError: the bundle is closed.
        """
        self._entry(MANIFEST)
        return self._file.duplicate()

    def calibration(self) -> Calibration | None:
        """The calibration, if one was added.

        Raises:
            BundleError: it is damaged or belongs to another manifest.
        """
        if CALIBRATION not in self._entries:
            return None
        data = self._read_by_crc(CALIBRATION)
        with _naming(self.path):
            return Calibration.from_json(data, manifest_sha256=self.manifest_sha256)

    def engine(self, target: str) -> EngineDescription:
        """What the bundle says of the engines of one target; their plans are entries `engines/<target>/<graph>.plan`.

        Raises:
            BundleError: there is none, it is damaged, or it was built from another manifest.
        """
        name = engine_description(target)
        if name not in self._entries:
            raise BundleError(f"{self.path} holds no engine for {target}; it has {', '.join(self.targets) or 'none'}")
        data = self._read_by_crc(name)
        with _naming(self.path):
            description = EngineDescription.from_json(data, target=target, manifest_sha256=self.manifest_sha256)
        for graph, plan in description.plans.items():
            self._check_listed(engine_plan(target, graph), plan, name)
        return description

    def extract(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every entry to a folder, as any unzip would, checked against its hash.

        `onnx/<graph>.onnx` with `<graph>.weights` beside it is then an ordinary ONNX model with external data. Files of
        the same names are replaced, each whole or not at all.

        Returns:
            The files that were written.

        Raises:
            BundleError: an entry was damaged.
            OutputError: the folder cannot be written.
        """
        written: list[Path] = []
        for entry in self._entries.values():
            target = Path(folder) / entry.name  # names were checked: none leads out of the folder
            with suppress(OSError):  # atomic_path says what is wrong with the folder
                target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as temporary, temporary.open("wb") as out:
                self._verify(entry, out.write)
            written.append(target)
        return written

    def chunks(self, name: str) -> Iterator[bytes]:
        """An entry's bytes in pieces, checked against its CRC-32 at the end.

        Raises:
            BundleError: there is no such entry, or its bytes were damaged.
        """
        entry = self._entry(name)
        crc = 0
        for chunk in self._chunks(entry):
            crc = zlib.crc32(chunk, crc)
            yield bytes(chunk)
        if crc != entry.crc:
            raise self._damaged(name)

    def _verify_quickly(self, entry: ArchiveEntry) -> None:
        expected = self._expected(entry.name)
        if expected is not None and expected.crc32 is None:
            self._verify(entry)
            return
        crc = 0
        for chunk in self._chunks(entry):
            crc = zlib.crc32(chunk, crc)
        if crc != entry.crc:
            raise self._damaged(entry.name)

    def _verify(self, entry: ArchiveEntry, write: Callable[[memoryview], object] | None = None) -> None:
        expected = self._expected(entry.name)
        digest, crc = hashlib.sha256(), 0
        for chunk in self._chunks(entry):
            if expected is not None:
                digest.update(chunk)
            else:
                crc = zlib.crc32(chunk, crc)
            if write is not None:
                write(chunk)
        if crc != entry.crc if expected is None else digest.hexdigest() != expected.sha256:
            raise self._damaged(entry.name)

    def _chunks(self, entry: ArchiveEntry) -> Iterator[memoryview]:
        if self._file.descriptor < 0:
            raise BundleError(f"{self.path} is closed; open it again")
        buffer = memoryview(bytearray(min(_CHUNK, max(entry.size, 1))))
        position, end = entry.offset, entry.offset + entry.size
        while position < end:
            count = self._read_at(position, buffer[: end - position])
            if count == 0:
                raise self._damaged(entry.name)
            yield buffer[:count]
            position += count

    def _read_at(self, position: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.descriptor, [buffer], position)
        part = self._view[position : position + len(buffer)]  # Windows has no read at a position
        buffer[: len(part)] = part
        return len(part)

    def _expected(self, name: str) -> Entry | None:
        """What the manifest or an engine's description says of an entry; None for those held by CRC-32 alone."""
        if name in self.manifest.entries:
            return self.manifest.entries[name]
        target = target_of(name)
        if target is None or name == engine_description(target):
            return None
        for graph, plan in self.engine(target).plans.items():
            if engine_plan(target, graph) == name:
                return plan
        raise BundleError(
            f"{self.path} holds {name}, which its {engine_description(target)} does not list; it was changed after it "
            "was written: build these engines again with mge-build"
        )

    def _read_by_crc(self, name: str) -> bytes:
        if self._entry(name).size > LARGEST:
            raise BundleError(
                f"{self.path}: entry {name} has {self._entry(name).size} bytes; expected at most {LARGEST}: it was "
                "changed after it was written, export it again"
            )
        return b"".join(self.chunks(name))

    def _check_entries(self) -> None:
        """Check the manifest's entries against the directory and the graphs."""
        names = [graph.name for graph in self.manifest.graphs]
        needed = set(map(graph_entry, names))
        if self.manifest.is_int8:
            needed |= set(map(cpu_graph_entry, names))
        allowed = needed | set(map(weights_entry, names))
        listed = set(self.manifest.entries)
        present = {name for name in self._entries if name.startswith("onnx/")} - {CHAIN}
        wrong = sorted((needed - listed) | (listed - allowed) | (present ^ listed))
        if wrong:
            raise BundleError(
                f"cannot open {self.path}: its manifest and its entries differ at {wrong[0]}; "
                "it was changed after it was written: export it again"
            )
        for name, entry in self.manifest.entries.items():
            self._check_listed(name, entry, MANIFEST)

    def _check_listed(self, name: str, expected: Entry, document: str) -> None:
        """Hold what the archive says of an entry to what a document says; the bytes are not read."""
        entry = self._entry(name)
        for what, found, wanted in (
            ("bytes", str(entry.size), str(expected.size)),
            ("as CRC-32", f"{entry.crc:08x}", expected.crc32),
        ):
            if wanted not in (None, found):
                raise BundleError(
                    f"{self.path}: entry {name} has {found} {what}, {document} says {wanted}; "
                    "it was changed after it was written: export it again"
                )

    def _entry(self, name: str) -> ArchiveEntry:
        if self._file.descriptor < 0:
            raise BundleError(f"{self.path} is closed; open it again")
        entry = self._entries.get(name)
        if entry is None:
            raise BundleError(f"{self.path} holds no entry {name}; it was damaged: copy or export it again")
        return entry

    def _damaged(self, name: str) -> BundleError:
        engine = target_of(name) is not None
        advice = "copy it again, or build these engines again with mge-build" if engine else "copy or export it again"
        return BundleError(
            f"{self.path}: the bytes of entry {name} do not match their hash; "
            f"the file was damaged after it was written: {advice}"
        )


def _cannot_open(path: str | os.PathLike[str], error: Exception) -> BundleError:
    reason = getattr(error, "strerror", None) or error
    return BundleError(f"cannot open {path}: {reason}; expected a readable mge.plan file")


@contextmanager
def _naming(path: Path) -> Generator[None]:
    """Put the bundle's path before what is wrong with one of its documents, which know no file."""
    try:
        yield
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
