"""Engines that a device built for itself: where they lie, found by the manifest's hash and the device.

<cache>/engines/<manifest's hash, 16 digits>/<target>-<hash of the GPU, 8 digits>/engine.json, <graph>.plan
<cache>/timing/<target>-<hash of the GPU, 8 digits>.cache
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from mge_runtime.bundle import EngineDescription
from mge_runtime.cache import cache_folder
from mge_runtime.errors import BundleError, OutputError
from mge_runtime.files import file_sha256, lock
from mge_runtime.machine import Gpu
from mge_runtime.manifest import Entry
from mge_runtime.trt.engines import DESCRIPTION, CachedEngines, EngineDetails
from mge_runtime.trt.target import Target

__all__ = ["cached_engines", "store_engines", "timing_cache_path"]


_ATTEMPTS = 100  # to read while others replace what is read; each of them is a build


def timing_cache_path(target: Target, gpu: Gpu) -> Path:
    """The file of measured kernels that builds for this device share."""
    return cache_folder() / "timing" / f"{target.name}-{_device_hash(gpu)}.cache"


def cached_engines(manifest_sha256: str) -> list[CachedEngines]:
    """The engines that were built for a bundle and can be read, the newest first; what is damaged is passed over."""
    folder = _manifest_folder(manifest_sha256)
    found: list[CachedEngines] = []
    for _ in range(_ATTEMPTS):
        places = _folders(folder)
        found = []
        for place in places:
            with suppress(BundleError):
                found.append(CachedEngines(place, place.name.rsplit("-", 2)[0], manifest_sha256))
        if places == _folders(folder):  # else somebody replaced what was read
            break
    return found


def store_engines(
    manifest_sha256: str, target: Target, gpu: Gpu, plans: Mapping[str, Path], details: EngineDetails
) -> CachedEngines:
    """Copy built engines into the cache, whole or not at all; older ones for the same device go afterwards.

    Args:
        manifest_sha256: of the bundle they were built from.
        target: what they are for.
        gpu: the device.
        plans: a file for each graph.
        details: how they were built.

    Raises:
        OutputError: the cache cannot be written.
    """
    prefix = f"{target.name}-{_device_hash(gpu)}-"
    place = _manifest_folder(manifest_sha256) / f"{prefix}{secrets.token_hex(4)}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with (place.parent / ".lock").open("wb") as held:
            lock(held.fileno())  # of two that store at once, the second waits, and replaces the first
            older = [path for path in _folders(place.parent) if path.name.startswith(prefix)]
            _write(place, plans, EngineDescription(manifest_sha256, target.name, {}, details.to_dict()))
            stored = CachedEngines(place, target.name, manifest_sha256)
            for path in older:
                shutil.rmtree(path, ignore_errors=True)
            return stored
    except OSError as error:
        raise OutputError(
            f"cannot keep the engines in {place}: {error.strerror or error}; expected a writable folder with room, "
            "set MGE_CACHE_DIR to one, or build with --into-bundle"
        ) from error


def _write(place: Path, plans: Mapping[str, Path], description: EngineDescription) -> None:
    for left in place.parent.glob(".new-*"):  # by a process that died: the caller holds the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=place.parent) as name:
        fresh = Path(name) / "engines"
        fresh.mkdir()
        entries: dict[str, Entry] = {}
        for graph, path in plans.items():
            shutil.copyfile(path, fresh / f"{graph}.plan")
            entries[graph] = Entry(file_sha256(path), path.stat().st_size)
        (fresh / DESCRIPTION).write_bytes(replace(description, plans=entries).to_json())
        fresh.rename(place)


def _folders(parent: Path) -> list[Path]:
    """The folders of engines below one, the newest first; none where it cannot be read."""
    for _ in range(_ATTEMPTS):
        try:
            found = [(path.stat().st_mtime_ns, path) for path in parent.iterdir() if not path.name.startswith(".")]
        except OSError:
            if not parent.is_dir():
                break
        else:  # none of them went while it was looked at: what took its place may be missing in the list
            return [path for _, path in sorted(found, reverse=True)]
    return []


def _manifest_folder(manifest_sha256: str) -> Path:
    return cache_folder() / "engines" / manifest_sha256[:16]


def _device_hash(gpu: Gpu) -> str:
    return hashlib.sha256(json.dumps(asdict(gpu), sort_keys=True).encode()).hexdigest()[:8]
