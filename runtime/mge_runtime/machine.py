"""What this machine is, as far as it decides which engine runs here: platform, GPUs, driver, libraries.

A machine is plain data, so that choosing can be tested against descriptions of machines that are not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mge_runtime.fields import Field

__all__ = ["Gpu", "Machine"]


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str  # as the driver calls it: "Orin", "NVIDIA GeForce RTX 3060"
    capability: str  # compute capability: "sm87"
    memory: int  # bytes
    multiprocessors: int
    integrated: bool = False  # shares its memory with the CPU, as on a Jetson

    @classmethod
    def from_field(cls, f: Field) -> Gpu:
        """Read what `dataclasses.asdict` made.

        Raises:
            BundleError: a field is missing, unknown or of another type.
        """
        fields = f.members(("name", "capability", "memory", "multiprocessors", "integrated"))
        return cls(
            name=fields["name"].text(),
            capability=fields["capability"].text(),
            memory=fields["memory"].integer(),
            multiprocessors=fields["multiprocessors"].integer(1),
            integrated=bool(fields["integrated"].value),
        )


@dataclass(frozen=True)
class Machine:
    """One machine, as seen by the Python that asked."""

    system: str  # "linux" or "windows"
    arch: str  # "x86_64" or "aarch64"
    python: str  # "3.10.12"
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str | None = None  # why no GPU can be used, for people; None where there is one
    driver_cuda: str | None = None  # newest CUDA version the driver serves: "12.6"
    # Distribution-like name -> version, of those that can be imported: "tensorrt", "tensorrt-rtx", "onnxruntime",
    # "cuda-core". A library that is there but broken has its error in `broken` instead.
    libraries: Mapping[str, str] = field(default_factory=dict[str, str])
    broken: Mapping[str, str] = field(default_factory=dict[str, str])
    providers: tuple[str, ...] = ()  # ONNX Runtime's execution providers: "CUDAExecutionProvider", ...
    board: str | None = None  # "NVIDIA Jetson AGX Orin Developer Kit", where the device tree says so
