"""Open a bundle: directory and manifest at once, everything else when it is asked for."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from mge_runtime.bundle.archive import (
    CALIBRATION,
    CARD,
    CHAIN,
    MANIFEST,
    ArchiveEntry,
    cpu_graph_entry,
    engine_description,
    engine_plan,
    graph_entry,
    read_directory,
    target_of,
    weights_entry,
)
from mge_runtime.bundle.attachments import Calibration, EngineDescription
from mge_runtime.errors import BundleError
from mge_runtime.fields import LARGEST
from mge_runtime.files import atomic_path, check_writable
from mge_runtime.hub import HubAddress
from mge_runtime.machine import cpu_count
from mge_runtime.manifest import Entry, Manifest

LABELS = "labels.txt"  # beside ONNX files: the names of the classes

_T = TypeVar("_T")
_CHUNK = 1 << 20  # bytes; entries are read through a buffer, so that mapped pages do not fill the memory


class WatchedFile:
    """A bundle's file kept open, to notice when somebody writes into it; close it after use.

    Weights that are mapped change with the file: after `cp new.plan mge.plan` half of them may be another model's.
    A rename (`mv`) does no harm, since what is open here stays as it is.
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

    def check(self) -> None:
        """Check that nobody wrote into the file; this takes some microseconds.

        Raises:
            BundleError: its size or its time of change is another.
        """
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise BundleError(
                f"{self.path} was overwritten while it was open, and with it the weights that are mapped from it; open "
                "it again, and replace a bundle by a rename (mv), never in place (cp, scp, rsync --inplace)"
            )


class Bundle:
    """A bundle open for reading; use it as a context manager or call `close`.

    Opening checks the directory (every header), the manifest and that each model entry it names is there in its size
    and with its CRC-32. Graphs and engines are hashed when they are read; what is mapped is checked by `verifying`.
    Reading is safe from several threads.
    """

    def __init__(self, file: WatchedFile, *, maps_weights: bool = True, address: HubAddress | None = None) -> None:
        self.path = file.path
        self._address = address  # where `path` lies in the Hub's cache
        self.maps_weights = maps_weights  # whether backends may map the weights; else they load them
        self._file = file
        self._mapped = mmap.mmap(file.descriptor, 0, access=mmap.ACCESS_READ)
        with os.fdopen(os.dup(file.descriptor), "rb") as stream:
            self._entries = read_directory(stream, len(self._mapped), str(self.path))
        self.sizes = {name: entry.size for name, entry in self._entries.items()}  # bytes, in the order of the file
        # What it holds engines for.
        self.targets = tuple(sorted({target for name in self.sizes if (target := target_of(name)) is not None}))
        if MANIFEST not in self._entries:
            raise BundleError(
                f"cannot open {self.path}: it holds no {MANIFEST}; expected a bundle that mge-export wrote"
            )
        self.manifest, self.manifest_sha256 = self._document(
            MANIFEST, lambda data: (Manifest.from_json(data), hashlib.sha256(data).hexdigest())
        )
        self._check_entries()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, maps_weights: bool = True) -> Bundle:
        """Open a bundle for reading.

        Args:
            path: the file, or its address on the Hugging Face Hub, `hf://owner/name[@revision][/file]`.
            maps_weights: whether backends may map its weights, as `mmap` of `mge_runtime.Pipeline.open`.

        Raises:
            BundleError: the file is missing, no bundle, damaged, cut short or of a newer schema, or the Hub does not
                give it.
            BackendError: the extra `hf` is not installed.
        """
        address = HubAddress.parse(os.fspath(path))
        if address is not None:
            path = address.download()
        try:
            resolved = Path(os.path.realpath(path, strict=True))
            # Not blocking, for a pipe that nobody writes to.
            descriptor = os.open(resolved, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
            file = WatchedFile(resolved, descriptor)
            if not stat.S_ISREG(file.status.st_mode):
                kind = "a folder" if stat.S_ISDIR(file.status.st_mode) else "no regular file"
                raise BundleError(f"cannot open {path}: it is {kind}; expected an mge.plan file")
            if file.status.st_size == 0:  # which cannot be mapped
                raise BundleError(
                    f"cannot open {path}: it is empty (0 bytes); expected a bundle that mge-export wrote: copy or "
                    "export it again"
                )
            return cls(file, maps_weights=maps_weights, address=address)
        except FileNotFoundError as error:
            raise BundleError(f"no bundle at {path}: the file does not exist; check the name") from error
        except (OSError, ValueError) as error:  # ValueError: no name of a file, or one that is empty by now
            reason = getattr(error, "strerror", None) or error
            raise BundleError(f"cannot open {path}: {reason}; expected a readable mge.plan file") from error

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; what `view` lent stays valid until it is dropped."""
        if self._file.descriptor < 0:
            return
        self._file.close()
        with suppress(BufferError):  # a lent view keeps the mapping alive
            self._mapped.close()

    def check_writable(self) -> None:
        """Find out before the work that nothing could be added to the file.

        Raises:
            BundleError: it is of the Hub, whose cache nobody writes into.
            OutputError: its place cannot be written.
        """
        if self._address is not None:
            raise BundleError(
                f"{self._address} is on the Hub and can only be read: download it (hf download "
                f"{self._address.repository} {self._address.file} --revision {self._address.revision} --local-dir .), "
                "then name that file"
            )
        check_writable(self.path)

    @property
    def sha256(self) -> str:
        """One hash over everything that can change a prediction, whatever the entries' order; nothing large is read.

        It is the SHA-256 of what `sha256sum` prints of the bundle's JSON documents (`calibration.json`,
        `engines/*/engine.json`, `manifest.json`) and of `onnx/chain.onnx`, sorted by their names. The manifest names
        the hashes of graphs and weights, `engine.json` those of engines; `verify` checks these.

        Raises:
            BundleError: a document was damaged.
        """
        total = hashlib.sha256()
        for name in sorted(name for name in self.sizes if name.endswith(".json") or name == CHAIN):
            digest = hashlib.sha256()
            for chunk in self.chunks(name):
                digest.update(chunk)
            total.update(f"{digest.hexdigest()}  {name}\n".encode())
        return total.hexdigest()

    def entry(self, name: str) -> ArchiveEntry:
        """Where an entry's data lies in the file, for whoever maps it; its hash is not checked here.

        Raises:
            BundleError: there is no such entry, or the bundle is closed.
        """
        if self._file.descriptor < 0:
            raise BundleError(f"{self.path} is closed; open it again")
        if name not in self._entries:
            raise BundleError(f"{self.path} holds no entry {name}; it was damaged: copy or export it again")
        return self._entries[name]

    def view(self, name: str) -> memoryview:
        """An entry's bytes, mapped and read-only: engines are too large to copy. Its hash is not checked here."""
        entry = self.entry(name)
        return memoryview(self._mapped)[entry.offset : entry.offset + entry.size]

    def read(self, name: str) -> bytes:
        """An entry's bytes, checked as by `chunks`."""
        return b"".join(map(bytes, self.chunks(name)))

    def chunks(self, name: str, *, quick: bool = False) -> Iterator[memoryview]:
        """An entry's bytes in pieces, each valid until the next; they are checked at the end.

        Args:
            name: the entry.
            quick: check them against the CRC-32 that the manifest names instead of the SHA-256, an eighth of the time:
                that finds damage and files of another model, not bytes that somebody made to have the same CRC-32.
                Documents and `onnx/chain.onnx`, which no manifest names, are always checked so.

        Raises:
            BundleError: there is no such entry, or its bytes were damaged.
        """
        entry = self.entry(name)
        expected = None if quick else self._expected(name)
        digest, crc = hashlib.sha256(), 0
        buffer = memoryview(bytearray(min(_CHUNK, entry.size)))
        position, end = entry.offset, entry.offset + entry.size
        while position < end and (count := self._read_at(position, buffer[: end - position])):
            if expected is None:
                crc = zlib.crc32(buffer[:count], crc)
            else:
                digest.update(buffer[:count])
            yield buffer[:count]
            position += count
        if position < end or (crc != entry.crc if expected is None else digest.hexdigest() != expected.sha256):
            is_engine = target_of(name) is not None
            raise BundleError(
                f"{self.path}: the bytes of entry {name} do not match their hash; the file was damaged after it was "
                f"written: copy it again, or {'build these engines' if is_engine else 'export it'} again"
            )

    def extract(self, folder: str | os.PathLike[str], names: Iterable[str] | None = None) -> list[Path]:
        """Write entries as ordinary files, checked against their hashes, and `onnx/labels.txt`, a class a line.

        `onnx/chain.onnx`, the whole chain, and each `onnx/<graph>.onnx` are then ordinary ONNX models with external
        data, for Triton, DeepStream, trtexec or C++.

        Args:
            folder: where to; files of the same names are replaced, each whole or not at all.
            names: the entries (all of them by default), `chain_entries()` for instance.

        Returns:
            The files that were written.

        Raises:
            BundleError: an entry was damaged.
            OutputError: the folder cannot be written.
        """
        written: list[Path] = []
        for name in self.sizes if names is None else names:
            target = Path(folder) / name  # names were checked: none leads out of the folder
            with suppress(OSError):  # atomic_path says what is wrong with the folder
                target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as temporary, temporary.open("wb") as out:
                out.writelines(self.chunks(name))
            written.append(target)
        labels = Path(folder) / "onnx" / LABELS
        write_labels(labels, self.manifest.class_names)
        return [*written, labels]

    def chain_entries(self) -> list[str]:
        """The names of `chain.onnx` and of the weights that it refers to."""
        return [CHAIN, *(name for name in self.sizes if name.endswith(".weights"))]

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
        with self.verifying(self.sizes if names is None else names, quick=False):
            pass

    @contextmanager
    def verifying(self, names: Iterable[str], *, quick: bool = True) -> Generator[None]:
        """Check entries, as by `chunks`, in other threads while a block runs: what it made counts only once it ended.

        Raises:
            BundleError: an entry's bytes were damaged; where the block failed too, this is the likely reason for it.
        """

        def check(entry: ArchiveEntry) -> None:
            for _ in self.chunks(entry.name, quick=quick):
                pass

        entries = sorted(map(self.entry, names), key=lambda entry: -entry.size)
        threads = min(cpu_count() - 1, 4) if quick else cpu_count()  # quick: one processor is left to the block
        with ThreadPoolExecutor(max(1, threads), thread_name_prefix="mge-hash") as pool:
            checks = pool.map(check, entries)
            try:
                yield
            finally:
                list(checks)

    def in_place(self) -> bool:
        """Whether `path` still names the file that is open here, as it was.

        Asked by whoever opens `path` by itself: another process may replace or overwrite it at any time.
        """
        try:
            self._file.check()
            return os.path.samestat(self.path.stat(), self._file.status)
        except (OSError, BundleError):
            return False

    def watched(self) -> WatchedFile:
        """This file for whoever goes on using what it mapped after the bundle is closed."""
        return WatchedFile(self.path, os.dup(self._file.descriptor), self._file.status)

    def calibration(self) -> Calibration | None:
        """The calibration, if one was added.

        Raises:
            BundleError: it is damaged or belongs to another manifest.
        """
        if CALIBRATION not in self._entries:
            return None
        digest = self.manifest_sha256
        return self._document(CALIBRATION, lambda data: Calibration.from_json(data, manifest_sha256=digest))

    def card(self) -> str | None:
        """The model card, if one was attached: Markdown with YAML front matter, as a stranger may have written it.

        Raises:
            BundleError: it is damaged.
        """
        return self._document(CARD, lambda data: data.decode(errors="replace")) if CARD in self._entries else None

    def engine(self, target: str) -> EngineDescription:
        """What the bundle says of the engines of one target; their plans are entries `engines/<target>/<graph>.plan`.

        Raises:
            BundleError: there is none, it is damaged, or it was built from another manifest.
        """
        name = engine_description(target)
        if name not in self._entries:
            raise BundleError(f"{self.path} holds no engine for {target}; it has {', '.join(self.targets) or 'none'}")
        digest = self.manifest_sha256
        description = self._document(
            name, lambda data: EngineDescription.from_json(data, target=target, manifest_sha256=digest)
        )
        for graph, plan in description.plans.items():
            self._check_listed(engine_plan(target, graph), plan, name)
        return description

    def _read_at(self, position: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.descriptor, [buffer], position)
        part = self._mapped[position : position + len(buffer)]  # Windows has no read at a position
        buffer[: len(part)] = part
        return len(part)

    def _expected(self, name: str) -> Entry | None:
        """What the manifest or an engine's description says of an entry; None: it has no more than its CRC-32."""
        target = target_of(name)
        if target is None or name == engine_description(target):
            return self.manifest.entries.get(name)
        for graph, plan in self.engine(target).plans.items():
            if engine_plan(target, graph) == name:
                return plan
        raise BundleError(
            f"{self.path} holds {name}, which its {engine_description(target)} does not list; it was changed after it "
            "was written: build these engines again with mge-build"
        )

    def _document(self, name: str, read: Callable[[bytes], _T]) -> _T:
        """What `read` makes of a JSON document; it knows no file, so its errors get the bundle's path."""
        size = self.entry(name).size
        if size > LARGEST:
            raise BundleError(
                f"{self.path}: entry {name} has {size} bytes; expected at most {LARGEST}: it was changed after it was "
                "written, export it again"
            )
        data = b"".join(map(bytes, self.chunks(name, quick=True)))
        try:
            return read(data)
        except BundleError as error:
            raise BundleError(f"{self.path}: {error}") from error

    def _check_entries(self) -> None:
        """Check the manifest's entries against the directory and the graphs."""
        names = [graph.name for graph in self.manifest.graphs]
        needed = {*map(graph_entry, names), *(map(cpu_graph_entry, names) if self.manifest.is_int8 else ())}
        listed = self.manifest.entries.keys()
        present = {name for name in self._entries if name.startswith("onnx/")} - {CHAIN}
        if wrong := (needed - listed) | (listed - needed - {*map(weights_entry, names)}) | (present ^ listed):
            raise BundleError(
                f"cannot open {self.path}: its manifest and its entries differ at {min(wrong)}; "
                "it was changed after it was written: export it again"
            )
        for name, entry in self.manifest.entries.items():
            self._check_listed(name, entry, MANIFEST)

    def _check_listed(self, name: str, listed: Entry, document: str) -> None:
        """Check what the archive says of an entry against what a document says; the bytes are not read."""
        found = self.entry(name)
        if (found.size, f"{found.crc:08x}") != (listed.size, listed.crc32):
            raise BundleError(
                f"{self.path}: entry {name} has {found.size} bytes with the CRC-32 {found.crc:08x}, {document} says "
                f"{listed.size} and {listed.crc32}; it was changed after it was written: export it again"
            )


def write_labels(path: Path, class_names: Sequence[str]) -> None:
    """Write one class a line, by index.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
