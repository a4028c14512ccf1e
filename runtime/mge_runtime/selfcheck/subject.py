"""What is checked: a bundle on one backend, opened as often as a check needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mge_runtime.fields import JsonValue
from mge_runtime.machine import Machine
from mge_runtime.manifest import Manifest
from mge_runtime.selfcheck.limits import Limits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.trt.engines import EngineSet

__all__ = ["Opened", "Subject", "open_subject", "run_all"]


class Opened(Protocol):
    """An opened pipeline, as far as checks use it; `Pipeline` is one."""

    max_batch: int | None

    def run(self, frames: Any, *, outputs: Collection[str] | None = None) -> Mapping[str, Any]:
        """Tensors by name; the first axis is the batch."""
        ...

    def report(self) -> dict[str, JsonValue]:
        """What `DeviceExecutor.report` says; empty on a CPU."""
        ...

    def close(self) -> None:
        """Release it."""
        ...


@dataclass(frozen=True)
class Subject:
    """A bundle on one backend."""

    path: Path
    manifest: Manifest
    manifest_sha256: str
    backend: str  # "onnxruntime", "tensorrt" or "tensorrt-rtx"
    device: str  # "cpu" or "cuda:0"
    machine: Machine
    open: Callable[[bool], Opened]  # opens it anew: with CUDA graphs, or without
    reference: Callable[[], Opened] | None  # opens ONNX Runtime on the CPU; None: that is what is checked
    engines: EngineSet | None = None  # that run, for the TensorRT backends

    @property
    def limits(self) -> Limits:
        """How far its answers may be from others'."""
        return Limits.of(self.manifest)

    def __str__(self) -> str:
        """For example "tensorrt on cuda:0"."""
        return f"{self.backend} on {self.device}"


def open_subject(
    path: str | os.PathLike[str],
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    *,
    mmap: bool = True,
) -> Subject:
    """Choose what runs a bundle here, as `Pipeline.open` does.

    Args:
        path: the bundle.
        device: "auto", "cpu" or "cuda:0".
        backend: "auto", "onnxruntime", "tensorrt" or "tensorrt-rtx".
        threads: processors to compute with on the CPU; None: all.
        mmap: as for `Pipeline.open`.

    Raises:
        BundleError: the file is missing, no bundle or damaged.
        BackendError: nothing can run it here.
    """
    from mge_runtime.backends import choose
    from mge_runtime.bundle import Bundle
    from mge_runtime.machine import describe_machine
    from mge_runtime.pipeline import Pipeline

    with Bundle.open(path) as bundle:
        bundle.verify()  # a report names the manifest's hash, and opening does not hash the weights
        manifest, digest = bundle.manifest, bundle.manifest_sha256
        choice = choose(device, backend, bundle=bundle)

    def opened(graphs: bool) -> Opened:
        return Pipeline.open(path, choice.device, choice.backend, threads, graphs=graphs, mmap=mmap)

    def reference() -> Opened:
        return Pipeline.open(path, "cpu", "onnxruntime", threads, mmap=mmap)

    return Subject(
        path=Path(path),
        manifest=manifest,
        manifest_sha256=digest,
        backend=choice.backend,
        device=choice.device,
        machine=describe_machine(always=True),
        open=opened,
        reference=None if choice.device == "cpu" else reference,
        engines=choice.engines,
    )


def run_all(
    opened: Opened, frames: NDArray[np.uint8], outputs: Collection[str], batch: int
) -> dict[str, NDArray[np.float32]]:
    """Run any number of frames in groups of `batch`; the last group may be smaller.

    Raises:
        BackendError: a run failed.
    """
    import numpy as np

    runs = [opened.run(frames[start : start + batch], outputs=outputs) for start in range(0, len(frames), batch)]
    return {name: np.concatenate([tensors[name] for tensors in runs]) for name in outputs}
