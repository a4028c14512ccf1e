"""What is checked (a bundle on one backend), with which frames, and what one check found."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mge_runtime.compare import TOLERANCES, Tolerances
from mge_runtime.fields import JsonValue
from mge_runtime.machine import Machine
from mge_runtime.manifest import Manifest, Preprocess

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.pipeline import Pipeline

__all__ = ["BATCH", "Frames", "Result", "Subject", "drawn_frames", "open_subject"]

BATCH = 8  # the largest batch that is checked
_DRAWN = 12  # frames: a batch of eight and a remainder


@dataclass(frozen=True)
class Result:
    """What one check found."""

    outcome: Literal["passed", "failed", "not run"]  # "not run" is neither passed nor failed
    found: str  # what failed, why it did not run, or what passed
    numbers: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])  # what was measured

    @classmethod
    def of(cls, failures: list[str], found: str, numbers: Mapping[str, JsonValue]) -> Result:
        """Passed if nothing failed."""
        return cls("failed" if failures else "passed", "; ".join(failures) or found, numbers)


@dataclass(frozen=True)
class Subject:
    """A bundle on one backend."""

    path: Path
    manifest: Manifest
    manifest_sha256: str
    targets: tuple[str, ...]  # that the bundle holds engines for
    backend: str  # "onnxruntime", "tensorrt" or "tensorrt-rtx"
    device: str  # "cpu" or "cuda:0"
    machine: Machine
    open: Callable[[bool], Pipeline]  # opens it anew: with CUDA graphs, or without
    reference: Callable[[], Pipeline] | None  # opens ONNX Runtime on the CPU; None: that is what is checked

    @property
    def precision(self) -> str:
        """Of its graphs: "fp32", "fp16" or "int8"."""
        if self.manifest.is_int8:
            return "int8"
        return "fp32" if all(plan.get("type") == "fp32" for plan in self.manifest.precision.values()) else "fp16"

    @property
    def tolerances(self) -> Tolerances:
        """How far its outputs may be from a reference's."""
        return TOLERANCES[self.precision]


def open_subject(
    path: str | os.PathLike[str],
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    *,
    mmap: bool = True,
) -> Subject:
    """Choose what runs a bundle here; takes what `Pipeline.open` takes.

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
        choice = choose(device, backend, bundle=bundle)
        return Subject(
            path=Path(path),
            manifest=bundle.manifest,
            manifest_sha256=bundle.manifest_sha256,
            targets=bundle.targets,
            backend=choice.backend,
            device=choice.device,
            machine=describe_machine(always=True),
            open=lambda graphs: Pipeline.open(path, choice.device, choice.backend, threads, graphs=graphs, mmap=mmap),
            reference=None
            if choice.device == "cpu"
            else lambda: Pipeline.open(path, "cpu", "onnxruntime", threads, mmap=mmap),
        )


@dataclass(frozen=True)
class Frames:
    """Frames to check with, and where they come from."""

    frames: NDArray[np.uint8]  # [N, S, S, 3], RGB
    source: str  # for people


def drawn_frames(spec: Preprocess) -> Frames:
    """Draw soft color fields with a few bright shapes, the same at every call.

    A network is less certain of them than of photographs, so differences change classes sooner.
    """
    from PIL import Image

    from mge_runtime.preprocess import to_frame

    rng = np.random.default_rng(2019)
    frames: list[NDArray[np.uint8]] = []
    for _ in range(_DRAWN):
        cells = rng.integers(0, 256, (*rng.integers(3, 9, 2), 3), np.uint8)
        side = spec.resize + int(rng.integers(0, 64))
        image = np.array(
            Image.fromarray(cells).resize((side + int(rng.integers(0, 64)), side), Image.Resampling.BICUBIC)
        )
        for _ in range(int(rng.integers(1, 4))):
            y, x = rng.integers(0, side // 2, 2)
            height, width = rng.integers(side // 8, side // 2, 2)
            image[y : y + height, x : x + width] //= 2
            image[y : y + height, x : x + width] += rng.integers(0, 128, 3, np.uint8)
        frames.append(to_frame(image, spec)[0])
    return Frames(np.stack(frames), f"{_DRAWN} drawn images; name photographs to check with them")
