"""Write a bundle, or add to one: streaming, and whole or not at all."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mge_runtime.bundle.archive import (
    CALIBRATION,
    CARD,
    CHAIN,
    MANIFEST,
    ArchiveWriter,
    cpu_graph_entry,
    engine_description,
    engine_plan,
    graph_entry,
    is_target,
    target_of,
    weights_entry,
)
from mge_runtime.bundle.attachments import Calibration, EngineDescription
from mge_runtime.bundle.onnx_graph import relocate
from mge_runtime.bundle.reader import Bundle
from mge_runtime.errors import BundleError, OutputError, printable
from mge_runtime.fields import LARGEST, JsonValue
from mge_runtime.files import atomic_path, is_temporary, lock
from mge_runtime.manifest import Entry, Manifest

_LOGGER = logging.getLogger("mge_runtime")
_CHUNK = 1 << 22  # bytes read at once


@dataclass(frozen=True)
class GraphModel:
    """A graph's ONNX model, as bytes or as files."""

    # Serialized ModelProto; its external data, if any, lies in files "<graph>.weights" of the chain.
    graph: bytes | Path
    weights: bytes | Path | None = None  # its own such file; None: it has no external data, or what others have
    cpu: bytes | Path | None = None  # the graph encoded for CPUs, over the same weights; of INT8 bundles alone


def write_bundle(
    path: str | os.PathLike[str],
    manifest: Manifest,
    models: Mapping[str, GraphModel],
    *,
    chain: bytes | None = None,
    check: Callable[[Path], None] | None = None,
) -> Manifest:
    """Write a bundle. Weights are streamed; on any error nothing is left behind and an old file stays as it was.

    Args:
        path: where to write, usually `mge.plan`.
        manifest: everything but `entries`, which are filled in here.
        models: of every graph, by its name.
        chain: `onnx/chain.onnx`, all graphs in one over the same weights; None: the bundle has none.
        check: is called with the finished file before it takes its place; what it raises keeps it from that.

    Returns:
        The manifest as it was written.

    Raises:
        BundleError: the graphs do not fit each other, a model is missing, or a graph refers to other files.
        OutputError: `path` cannot be written, or the bundle would exceed 4 GiB.
    """
    manifest.check()
    names = [graph.name for graph in manifest.graphs]
    if sorted(models) != sorted(names):
        raise BundleError(f"models of the graphs {sorted(models)} were given; expected {sorted(names)}")
    _check_references(models)
    with ExitStack() as locks, atomic_path(path) as temporary:
        with temporary.open("w+b") as stream:
            archive = ArchiveWriter(stream)
            entries: dict[str, Entry] = {}
            for graph in names:
                model = models[graph]
                parts = ((graph_entry, model.graph), (cpu_graph_entry, model.cpu), (weights_entry, model.weights))
                for entry, data in parts:
                    if data:
                        entries[entry(graph)] = _add_hashed(archive, entry(graph), data)
            if chain is not None:
                archive.add(CHAIN, [chain])
            manifest = replace(manifest, entries=entries)
            document = manifest.to_json()
            Manifest.from_json(document)  # what is written can be opened
            archive.add(MANIFEST, [document])
            archive.finish()
        if check is not None:
            check(temporary)
        locks.enter_context(_locked(path))  # what others are adding belongs to the file that goes
    return manifest


def add_calibration(
    path: str | os.PathLike[str],
    values: Mapping[str, JsonValue],
    *,
    manifest_sha256: str | None = None,
    chain: Callable[[bytes], bytes] | None = None,
) -> None:
    """Add a calibration to a bundle, or replace the one it has; everything else stays byte for byte.

    Args:
        path: the bundle.
        values: as in `Calibration`.
        manifest_sha256: hash of the manifest that it was measured with; None: the one that is there.
        chain: from the bundle's `onnx/chain.onnx` to the one that takes its place; None: it stays.

    Raises:
        BundleError: the bundle cannot be read, has another manifest by now, or was replaced meanwhile.
        OutputError: it cannot be written.
    """
    with _updating(path) as (bundle, archive):  # nobody else puts another file in its place meanwhile
        if manifest_sha256 not in (None, bundle.manifest_sha256):
            raise BundleError(
                f"{bundle.path} was replaced while it was calibrated: found manifest {bundle.manifest_sha256[:12]}, "
                f"expected {manifest_sha256[:12]}, which predicted the images; calibrate it again"
            )
        moved = chain is not None and CHAIN in bundle.sizes
        _copy(bundle, archive, without={CALIBRATION, CHAIN} if moved else {CALIBRATION})
        if chain is not None and moved:
            archive.add(CHAIN, [chain(bundle.read(CHAIN))])
        document = Calibration(bundle.manifest_sha256, values).to_json()
        Calibration.from_json(document, manifest_sha256=bundle.manifest_sha256)
        archive.add(CALIBRATION, [document])


def add_card(path: str | os.PathLike[str], card: str, *, sha256: str) -> None:
    """Attach a model card to a bundle, or replace the one it has; everything else stays byte for byte.

    Args:
        path: the bundle.
        card: Markdown with YAML front matter, at most 4 MB.
        sha256: `Bundle.sha256` of what it describes, which a card is no part of.

    Raises:
        BundleError: the bundle cannot be read, or is another by now.
        OutputError: it cannot be written, or the card is larger.
    """
    if len(data := card.encode()) > LARGEST:
        raise OutputError(f"the model card has {len(data)} bytes; expected at most {LARGEST}: shorten its text")
    with _updating(path) as (bundle, archive):
        if bundle.sha256 != sha256:
            raise BundleError(
                f"{bundle.path} was changed while its card was written: found {bundle.sha256[:12]}, expected "
                f"{sha256[:12]}, which was measured; write the card again"
            )
        _copy(bundle, archive, without={CARD})
        archive.add(CARD, [data])


def add_engine(
    path: str | os.PathLike[str],
    target: str,
    plans: Mapping[str, bytes | Path],
    details: Mapping[str, JsonValue],
    *,
    manifest_sha256: str,
) -> None:
    """Add the engines of one target to a bundle, or replace those it has; everything else stays byte for byte.

    Args:
        path: the bundle.
        target: what the engines are for, such as "tensorrt-10.3-sm87-linux-aarch64".
        plans: each graph's engine, by its name.
        details: free: builder, options, attestation.
        manifest_sha256: hash of the manifest whose ONNX they were built from.

    Raises:
        BundleError: the bundle cannot be read, has another manifest by now, was replaced meanwhile, or has no such
            graph.
        OutputError: it cannot be written.
    """
    if not is_target(target):
        raise BundleError(f"an engine's target is called {target!r}; expected letters, digits, '.', '_' and '-'")
    with _updating(path) as (bundle, archive):
        if bundle.manifest_sha256 != manifest_sha256:
            raise BundleError(
                f"the engines were built from the manifest {manifest_sha256[:12]}; {bundle.path} has "
                f"{bundle.manifest_sha256[:12]} by now: build them again"
            )
        if unknown := sorted(set(plans) - {graph.name for graph in bundle.manifest.graphs}):
            raise BundleError(f"an engine for the graph {unknown[0]!r} was given; the bundle has no such graph")
        _copy(bundle, archive, without=[name for name in bundle.sizes if target_of(name) == target])
        entries = {graph: _add_hashed(archive, engine_plan(target, graph), plan) for graph, plan in plans.items()}
        document = EngineDescription(manifest_sha256, target, entries, details).to_json()
        EngineDescription.from_json(document, target=target, manifest_sha256=manifest_sha256)
        archive.add(engine_description(target), [document])


@contextmanager
def _updating(path: str | os.PathLike[str]) -> Generator[tuple[Bundle, ArchiveWriter]]:
    """Rewrite a bundle beside itself; of two that do so at once the second waits for the first."""
    with _locked(path), Bundle.open(path) as bundle, ExitStack() as stack:
        bundle.check_writable()
        temporary = stack.enter_context(atomic_path(bundle.path))
        with temporary.open("w+b") as stream:
            archive = ArchiveWriter(stream)
            yield bundle, archive
            archive.finish()
            os.fsync(stream.fileno())  # which may take long; after it nothing is left but the rename
        # Whoever put another file in its place without the lock, as `mv` does, meant it to stay.
        if not bundle.in_place():
            raise BundleError(
                f"{bundle.path} was replaced or overwritten while something was added to it; the new file stays as it "
                "is: do it again if the new file needs it"
            )


@contextmanager
def _locked(path: str | os.PathLike[str]) -> Generator[None]:
    """Keep others from rewriting the file that `path` names by now, until what was written took its place."""
    with ExitStack() as stack:
        # Where there is no such file, or no locks (Windows; some network disks), there is nothing to wait for.
        while sys.platform != "win32" and not is_temporary(path):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                stack.callback(os.close, descriptor)
                try:
                    lock(descriptor, wait=False)
                except BlockingIOError:
                    _LOGGER.warning("waiting for another process that writes %s", printable(str(path)))
                    lock(descriptor)
                if os.path.samestat(Path(path).stat(), os.fstat(descriptor)):
                    break
                stack.close()  # whoever had locked it has put a new file in its place
            except OSError:
                break
        yield


def _copy(bundle: Bundle, archive: ArchiveWriter, *, without: Collection[str]) -> None:
    for name in bundle.sizes:
        if name not in without:
            archive.add(name, bundle.chunks(name, quick=True))


def _add_hashed(archive: ArchiveWriter, name: str, data: bytes | Path) -> Entry:
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                yield chunk

    added = archive.add(name, chunks())
    return Entry(digest.hexdigest(), added.size, f"{added.crc:08x}")


def _check_references(models: Mapping[str, GraphModel]) -> None:
    """A graph that opens only beside some other file must not reach a bundle."""
    places: dict[str, tuple[int, int]] = {}
    for name, model in models.items():
        if (weights := model.weights) is not None:
            size = len(weights) if isinstance(weights, bytes) else weights.stat().st_size
            places[Path(weights_entry(name)).name] = (0, size)
    for model in models.values():
        for graph in filter(None, (model.graph, model.cpu)):
            relocate(graph if isinstance(graph, bytes) else graph.read_bytes(), places, location="")
