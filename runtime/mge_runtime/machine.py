"""What this machine is, as far as it decides which engine runs here: platform, GPUs, driver, libraries.

A machine is plain data, so that choosing can be tested against descriptions of machines that are not at hand.
Without an NVIDIA driver nothing of CUDA or TensorRT is imported: a bare CPU is described from package metadata alone.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mge_runtime.errors import BackendError, BundleError, InputError, brief
from mge_runtime.fields import Field, dump_json, parse_json

# Name in a description, as a rule the distribution's, -> the module.
_LIBRARIES = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "onnxruntime": "onnxruntime",
    "cuda-core": "cuda.core",
    "cuda-bindings": "cuda.bindings",
}
_UNKNOWN = "unknown"  # version of a library that was not looked up, or has no metadata and was not imported
_MODEL = Path("/proc/device-tree/model")  # on boards with a device tree, as a Jetson


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
    providers: tuple[str, ...] = ()  # ONNX Runtime's execution providers, where it was imported
    board: str | None = None  # "NVIDIA Jetson AGX Orin Developer Kit", where the device tree says so

    @property
    def platform(self) -> str:
        """For example "linux x86_64"."""
        return f"{self.system} {self.arch}"

    @property
    def is_jetson(self) -> bool:
        """Whether this is a Jetson, where CUDA and TensorRT come with JetPack."""
        return self.board is not None and "jetson" in self.board.lower()

    def missing(self, library: str, install: str) -> str | None:
        """Why a library cannot be used, with what installs it; None: it can."""
        if (error := self.broken.get(library)) is not None:
            return f"{library} cannot be imported ({error}); install it again: {install}"
        return None if library in self.libraries else f"{library} is not installed: {install}"

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
        return dump_json(asdict(self))

    @classmethod
    def from_json(cls, data: bytes, document: str = "machine.json") -> Machine:
        """Read what `to_json` wrote; messages call it `document`.

        Raises:
            InputError: no JSON, or a field that is missing, unknown or of the wrong type (named by its path).
        """
        try:
            root = parse_json(data, document, "record the machine again with mge-info --machine")
            fields = root.members(tuple(cls.__dataclass_fields__))
            return cls(
                system=fields["system"].text(),
                arch=fields["arch"].text(),
                python=fields["python"].text(),
                gpus=tuple(Gpu.from_field(gpu) for gpu in fields["gpus"].items()),
                gpu_problem=fields["gpu_problem"].optional(Field.text),
                driver_cuda=fields["driver_cuda"].optional(Field.text),
                libraries={name: version.text() for name, version in fields["libraries"].table().items()},
                broken={name: error.text() for name, error in fields["broken"].table().items()},
                providers=tuple(provider.text() for provider in fields["providers"].items()),
                board=fields["board"].optional(Field.text),
            )
        except BundleError as error:  # what `Field` raises; this document is no bundle's
            raise InputError(str(error)) from error


def this_platform() -> tuple[str, str]:
    """The operating system and the architecture of this machine, as targets name them: ("linux", "x86_64")."""
    arch = platform.machine().lower()
    return platform.system().lower(), {"amd64": "x86_64", "arm64": "aarch64"}.get(arch, arch)


def describe_machine(
    imported: Collection[str] | None = None, *, always: bool = False, gpus: bool = True, quick: bool = False
) -> Machine:
    """Describe the machine for the Python that runs.

    Args:
        imported: the libraries to import where there is a GPU, which alone shows whether they work; None: all.
        always: import them without a GPU too.
        gpus: whether to ask the driver for GPUs.
        quick: leave the versions out where there is no GPU: nothing depends on them there, and looking them up takes
            longer than everything else.

    Returns:
        The description. What is missing or broken is said in it; nothing is raised.
    """
    system, arch = this_platform()
    libraries = {name: _UNKNOWN for name, module in _LIBRARIES.items() if _has_module(module)}
    broken: dict[str, str] = {}
    cuda, problem = _driver_cuda() if gpus else (None, "not asked for")
    devices: tuple[Gpu, ...] = ()
    if cuda is not None:
        devices, problem = _gpus(cuda, libraries, broken)
    if devices or not quick:
        libraries |= {name: _version(name) for name in libraries}
    wanted = [name for name in libraries if imported is None or name in imported] if devices or always else []
    for name in wanted:
        try:
            libraries[name] = str(getattr(_import(name), "__version__", libraries[name]))
        except Exception as error:  # a broken native library raises what it likes
            broken[name] = brief(error)
            del libraries[name]
    onnxruntime: Any = sys.modules.get("onnxruntime")  # None: not imported
    return Machine(
        system=system,
        arch=arch,
        python=platform.python_version(),
        gpus=devices,
        gpu_problem=problem,
        driver_cuda=cuda,
        libraries=libraries,
        broken=broken,
        providers=tuple(getattr(onnxruntime, "get_available_providers", tuple)()),
        board=_board(),
    )


def install_extra(name: str) -> str:
    """What to do where a library of an extra is missing; mge is on no index, so pip alone would not find it."""
    return f"install mge again, with its extra {name}"


def import_library(module: str, install: str, load: Callable[[str], Any] = importlib.import_module) -> Any:
    """Import a module of a library.

    Args:
        module: its name.
        install: what installs it.
        load: imports it.

    Raises:
        BackendError: it is missing or broken.
    """
    if not _has_module(module):
        raise BackendError(f"the module {module} is not installed: {install}")
    try:
        return load(module)
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        raise BackendError(f"{module} cannot be imported: {brief(error)}; install it again: {install}") from error


def _has_module(name: str) -> bool:
    """Whether a module could be imported; its parents are, it is not."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a parent is missing or broken
        return False
    # A folder without a module, such as the type stubs of TensorRT leave, has a spec and no origin.
    return spec is not None and spec.origin is not None


def _version(library: str) -> str:
    import importlib.metadata  # brings half the email package

    for distribution in ("onnxruntime-gpu", "onnxruntime") if library == "onnxruntime" else (library,):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return _UNKNOWN


def _import(library: str) -> Any:
    from mge_runtime.backends.onnxruntime import load_onnxruntime

    return load_onnxruntime() if library == "onnxruntime" else importlib.import_module(_LIBRARIES[library])


def _driver_cuda() -> tuple[str | None, str | None]:
    """The newest CUDA version that the driver serves, or None and why there is no driver."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
        version = ctypes.c_int()
        status = driver.cuDriverGetVersion(ctypes.byref(version))  # needs no cuInit
    except (OSError, AttributeError):
        return None, f"no NVIDIA driver is installed ({name} cannot be loaded)"
    if status != 0:
        return None, f"the NVIDIA driver does not answer (cuDriverGetVersion: CUDA error {status})"
    return f"{version.value // 1000}.{version.value % 1000 // 10}", None


def _gpus(cuda: str, libraries: dict[str, str], broken: dict[str, str]) -> tuple[tuple[Gpu, ...], str | None]:
    """Every CUDA device in CUDA's order, or none and why."""
    driver, install = f"NVIDIA driver for CUDA {cuda} is here", f'pip install "cuda-core[cu{cuda.partition(".")[0]}]"'
    if "cuda-core" not in libraries:
        return (), f"an {driver}, and cuda-core is not installed: {install}"
    try:
        # The package picks its CUDA 12 or 13 half when it is imported, which a type checker cannot follow.
        core: Any = importlib.import_module("cuda.core")
        bindings: Any = importlib.import_module("cuda.bindings.driver")
    except Exception as error:  # cuda-core without bindings, or with those of another CUDA
        broken["cuda-core"] = brief(error)
        del libraries["cuda-core"]
        return (), f"cuda-core cannot be imported ({brief(error)}): {install} --upgrade"
    try:
        gpus = tuple(_gpu(device, bindings) for device in core.Device.get_all_devices())
    except Exception as error:  # CUDAError, or what cuda-core raises where the driver lacks a function
        return (), f"the {driver}, and its devices cannot be used: {brief(error)}"
    return gpus, None if gpus else f"the {driver}, and it finds no device"


def _gpu(device: Any, bindings: Any) -> Gpu:
    major, minor = device.compute_capability
    status, memory = bindings.cuDeviceTotalMem(device.device_id)
    if status != bindings.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuDeviceTotalMem: {status}")
    properties = device.properties
    return Gpu(
        device.name, f"sm{major}{minor}", int(memory), properties.multiprocessor_count, bool(properties.integrated)
    )


def _board() -> str | None:
    with suppress(OSError):
        return _MODEL.read_bytes().rstrip(b"\0").decode(errors="replace").strip() or None
    return None


def cpu_count() -> int:
    """Processors this process may use: its affinity, capped by the control group's quota (Linux, version 2)."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no control group, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, -(-int(quota) // int(period))))
    return count


def cpu_model() -> str:
    """As the system calls the processor."""
    with suppress(OSError):  # not on Linux
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()
