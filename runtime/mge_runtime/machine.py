"""What this machine is, as far as it decides which engine runs here: platform, GPUs, driver, libraries.

A machine is plain data, so that choosing can be tested against descriptions of machines that are not at hand.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from mge_runtime.errors import BundleError, InputError
from mge_runtime.fields import Field, parse_json

__all__ = ["Gpu", "Machine", "this_platform"]


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str  # as the driver calls it: "Orin", "NVIDIA GeForce RTX 3060"
    capability: str  # compute capability: "sm87"
    memory: int  # bytes
    multiprocessors: int
    integrated: bool = False  # shares its memory with the CPU, as on a Jetson

    def __str__(self) -> str:
        """For example "NVIDIA GeForce RTX 3060 (sm86)"."""
        return f"{self.name} ({self.capability})"

    @classmethod
    def from_field(cls, f: Field) -> Gpu:
        """Read what `dataclasses.asdict` made.

        Raises:
            BundleError: a field is missing, unknown or of another type.
        """
        fields = f.members(("name", "capability", "memory", "multiprocessors", "integrated"))
        capability, integrated = fields["capability"].text(), fields["integrated"].value
        if not (capability.startswith("sm") and capability[2:].isdecimal()):
            fields["capability"].fail('a compute capability such as "sm86"')
        if not isinstance(integrated, bool):
            fields["integrated"].fail("true or false")
        return cls(
            name=fields["name"].text(),
            capability=capability,
            memory=fields["memory"].integer(),
            multiprocessors=fields["multiprocessors"].integer(1),
            integrated=integrated,
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

    @property
    def platform(self) -> str:
        """For example "linux x86_64"."""
        return f"{self.system} {self.arch}"

    @property
    def is_jetson(self) -> bool:
        """Whether this is a Jetson, where CUDA and TensorRT come with JetPack."""
        return self.board is not None and "jetson" in self.board.lower()

    @property
    def summary(self) -> str:
        """All of it in one line, for people."""
        from mge_runtime.files import format_bytes

        parts = [self.board] if self.board else []
        parts += [self.platform, f"Python {self.python}"]
        for number, gpu in enumerate(self.gpus):
            shared = " shared with the CPU" if gpu.integrated else ""
            model = f"{gpu.name} ({gpu.capability}, {gpu.multiprocessors} multiprocessors)"
            parts.append(f"cuda:{number} {model}, {format_bytes(gpu.memory)}{shared}")
        parts += [] if self.gpus else ["no GPU"]
        parts += [f"driver for CUDA {self.driver_cuda}"] if self.driver_cuda else []
        parts += [f"{name} {version}" for name, version in self.libraries.items()]
        parts += [f"{name} broken" for name in self.broken]
        return ", ".join(parts)

    def to_json(self) -> bytes:
        """UTF-8 JSON, the same for equal machines."""
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, document: str = "machine.json") -> Machine:
        """Read what `to_json` wrote.

        Args:
            data: the bytes of the document.
            document: what to call it in messages.

        Raises:
            InputError: no JSON, or a field that is missing, unknown or of the wrong type (named by its path).
        """
        try:
            fields = parse_json(data, document, "record the machine again with mge-info --machine").members(_FIELDS)
            return cls(
                system=fields["system"].text(),
                arch=fields["arch"].text(),
                python=fields["python"].text(),
                gpus=tuple(Gpu.from_field(gpu) for gpu in fields["gpus"].items()),
                gpu_problem=fields["gpu_problem"].optional(Field.text),
                driver_cuda=fields["driver_cuda"].optional(Field.text),
                libraries=_texts(fields["libraries"]),
                broken=_texts(fields["broken"]),
                providers=tuple(provider.text() for provider in fields["providers"].items()),
                board=fields["board"].optional(Field.text),
            )
        except BundleError as error:  # what `Field` raises; this document is no bundle's
            raise InputError(str(error)) from error


_FIELDS = tuple(Machine.__dataclass_fields__)


def _texts(f: Field) -> dict[str, str]:
    return {name: value.text() for name, value in f.table().items()}


def this_platform() -> tuple[str, str]:
    """The operating system and the architecture of this machine, as targets name them: ("linux", "x86_64")."""
    arch = platform.machine().lower()
    return platform.system().lower(), {"amd64": "x86_64", "arm64": "aarch64"}.get(arch, arch)
