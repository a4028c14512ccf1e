"""PyTorch's ways of computing the same model, from the toolchain: imported only where a checkpoint was named."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mge_runtime.bench.contender import Contender
from mge_runtime.bench.deadline import NO_TIME, UNBOUNDED, Deadline, TimeUp
from mge_runtime.errors import BackendError, CheckpointError
from mge_runtime.machine import cpu_count
from mge_runtime.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["NEEDED", "check_checkpoint", "eager_contenders"]

NEEDED = 'pip install "mge[train,export]"'
_CHUNK = 1 << 20  # bytes
# Fields of the checkpoint's config that change what is computed, beside those that the manifest holds by itself.
_COSTLY = ("parts_per_class", "gate_width", "normalize_features", "attention_head")


def check_checkpoint(ckpt: Path, manifest: Manifest) -> None:
    """That a checkpoint holds the bundle's model: the file it was exported from, or one of the same shape.

    Raises:
        BackendError: PyTorch or the toolchain is missing.
        CheckpointError: the file cannot be read, or holds another model.
    """
    checkpoint: Any = _imported("mge.checkpoint")
    if manifest.checkpoint_sha256 is not None and _sha256(ckpt) == manifest.checkpoint_sha256:
        return
    config: Any = checkpoint.load_checkpoint(ckpt).config
    pairs: list[tuple[str, Any, Any]] = [
        ("trunk", config.arch, manifest.model.get("arch")),
        ("input of so many pixels", config.image_size, manifest.preprocess.size),
        ("number of experts", config.experts, len(manifest.views)),
        ("number of classes", config.num_classes, len(manifest.class_names)),
        ("list of classes", list(config.classes), list(manifest.class_names)),
        # A bundle of another exporter need not say these.
        *(
            (f"{key} in its config", getattr(config, key), manifest.model[key])
            for key in _COSTLY
            if key in manifest.model
        ),
    ]
    for what, found, expected in pairs:
        if found != expected:
            shown = "" if isinstance(found, list) else f": {found}, not {expected}"
            raise CheckpointError(
                f"{ckpt} does not belong to the bundle, it has another {what}{shown}; "
                "expected the checkpoint that the bundle was exported from"
            )


def eager_contenders(
    ckpt: Path, frames: NDArray[np.uint8], threads: int | None, device: str, deadline: Deadline = UNBOUNDED
) -> tuple[list[Contender], dict[str, str]]:
    """Eager PyTorch as the method's authors run it, and compiled.

    Args:
        ckpt: a checkpoint that `check_checkpoint` let pass.
        frames: uint8 [B, S, S, 3].
        threads: as for `Pipeline.open`; None: as many as the chain then takes, whatever PyTorch's own default is.
        device: "cpu" or "cuda:0".
        deadline: what is not open by then is left out; compiling takes minutes for large trunks.

    Returns:
        The contenders, and why others do not work, by name.

    Raises:
        BackendError: PyTorch or the toolchain is missing.
        CheckpointError: the file cannot be read.
    """
    make: Callable[..., Iterable[object]] = _imported("mge_export.eager").eager_contenders
    if threads is None and device == "cpu":
        threads = cpu_count()  # PyTorch's own default may be another (OMP_NUM_THREADS)
    found: list[Contender] = []
    missing: dict[str, str] = {}
    try:
        with deadline.enforced():
            for way in make(ckpt, frames, threads, device):
                if isinstance(way, Exception):
                    missing[str(getattr(way, "name", "PyTorch"))] = _line(way)
                else:
                    found.append(cast("Contender", way))
    except TimeUp:
        missing["more of PyTorch (torch.compile is the last)"] = NO_TIME
    return found, missing


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"--ckpt needs PyTorch and mge's toolchain ({_line(error)}): {NEEDED}") from error


def _sha256(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; expected a checkpoint") from error
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
