"""Changes to tiny bundles, and their entries as a tool sees them that knows ZIP files and nothing of manifests."""

import zipfile
from dataclasses import replace

from mge_runtime.bundle import Bundle, add_engine, write_bundle
from mge_runtime.bundle.archive import ArchiveWriter

TARGET = "tensorrt-10.3-sm87-linux-aarch64"


def read_entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_entries(path, entries):
    with path.open("w+b") as stream:
        archive = ArchiveWriter(stream)
        for name, data in entries.items():
            archive.add(name, [data])
        archive.finish()


def change_byte(path, entry):
    """Flip a bit of an entry's first byte."""
    with Bundle.open(path) as bundle:
        offset = bundle.entry(entry).offset
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def manifest_hash(path):
    with Bundle.open(path) as bundle:
        return bundle.manifest_sha256


def add_engines(path, target=TARGET, plans=None, details=None):
    """Add bytes in place of engines, by default for every graph."""
    with Bundle.open(path) as bundle:
        plans = plans or {graph.name: b"engine" for graph in bundle.manifest.graphs}
        digest = bundle.manifest_sha256
    add_engine(path, target, plans, details or {}, manifest_sha256=digest)


def write_changed(tiny, path, **changes):
    """Write the tiny bundle with other values in its manifest."""
    graphs = tiny.make_graphs()
    return write_bundle(path, replace(tiny.make_manifest(graphs), **changes), {g.spec.name: g.model() for g in graphs})
