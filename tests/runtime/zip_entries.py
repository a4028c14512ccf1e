"""A bundle's entries, read and written as a tool would that knows ZIP files and nothing of manifests."""

import zipfile

from mge_runtime.bundle.archive import ArchiveWriter


def read_entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_entries(path, entries):
    with path.open("w+b") as stream:
        archive = ArchiveWriter(stream)
        for name, data in entries.items():
            archive.add(name, [data])
        archive.finish()
