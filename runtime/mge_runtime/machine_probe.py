"""Ask this machine what it is.

Without an NVIDIA driver nothing of CUDA or TensorRT is imported: a bare CPU is described from package metadata alone.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import platform
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mge_runtime.machine import Gpu, Machine, this_platform

__all__ = ["available_memory", "describe_machine"]

# Name in a description -> the module, and the distributions that may bring it.
_LIBRARIES = {
    "tensorrt": ("tensorrt", ("tensorrt",)),
    "tensorrt-rtx": ("tensorrt_rtx", ("tensorrt-rtx",)),
    "onnxruntime": ("onnxruntime", ("onnxruntime-gpu", "onnxruntime")),
    "cuda-core": ("cuda.core", ("cuda-core",)),
    "cuda-bindings": ("cuda.bindings", ("cuda-bindings",)),
}
_UNKNOWN = "unknown"  # version of a library that was not looked up, or has no metadata and was not imported
_MEMORY = Path("/proc/meminfo")
_MODEL = Path("/proc/device-tree/model")  # on boards with a device tree, as a Jetson


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
    libraries = {name: _UNKNOWN for name, (module, _) in _LIBRARIES.items() if _has_module(module)}
    broken: dict[str, str] = {}
    cuda, problem = _driver_cuda() if gpus else (None, "not asked for")
    devices: tuple[Gpu, ...] = ()
    if cuda is not None:
        devices, problem = _gpus(cuda, libraries, broken)
    if devices or not quick:
        libraries |= {name: _version(_LIBRARIES[name][1]) for name in libraries}
    for name in list(libraries) if devices or always else ():
        if imported is None or name in imported:
            _import(name, libraries, broken)
    return Machine(
        system=system,
        arch=arch,
        python=platform.python_version(),
        gpus=devices,
        gpu_problem=problem,
        driver_cuda=cuda,
        libraries=libraries,
        broken=broken,
        providers=_providers(),
        board=_board(),
    )


def available_memory() -> int | None:
    """Bytes of memory that new work can have without swapping, as Linux estimates it; None elsewhere."""
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _has_module(name: str) -> bool:
    """Whether a module could be imported; its parents are, it is not."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a parent is missing or broken
        return False
    # A folder without a module, such as the type stubs of TensorRT leave, has a spec and no origin.
    return spec is not None and spec.origin is not None


def _version(distributions: tuple[str, ...]) -> str:
    import importlib.metadata  # brings half the email package

    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return _UNKNOWN


def _import(name: str, libraries: dict[str, str], broken: dict[str, str]) -> None:
    """Import a library: it gets the version that the module itself names, or goes to `broken`."""
    from mge_runtime.backends.onnxruntime import load_onnxruntime

    try:
        module: Any = load_onnxruntime() if name == "onnxruntime" else importlib.import_module(_LIBRARIES[name][0])
    except Exception as error:  # a broken native library raises what it likes
        broken[name] = _line(error)
        del libraries[name]
        return
    libraries[name] = str(getattr(module, "__version__", libraries[name]))


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
    install = f'pip install "cuda-core[cu{cuda.partition(".")[0]}]"'
    if "cuda-core" not in libraries:
        return (), f"an NVIDIA driver for CUDA {cuda} is here, and cuda-core is not installed: {install}"
    try:
        # The package picks its CUDA 12 or 13 half when it is imported, which a type checker cannot follow.
        core: Any = importlib.import_module("cuda.core")
        bindings: Any = importlib.import_module("cuda.bindings.driver")
    except Exception as error:  # cuda-core without bindings, or with those of another CUDA
        broken["cuda-core"] = _line(error)
        libraries.pop("cuda-core", None)
        return (), f"cuda-core cannot be imported ({_line(error)}): {install}"
    try:
        gpus: list[Gpu] = []
        for device in core.Device.get_all_devices():
            major, minor = device.compute_capability
            status, memory = bindings.cuDeviceTotalMem(device.device_id)
            if status != bindings.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"cuDeviceTotalMem: {status}")
            properties = device.properties
            gpus.append(
                Gpu(
                    name=device.name,
                    capability=f"sm{major}{minor}",
                    memory=int(memory),
                    multiprocessors=properties.multiprocessor_count,
                    integrated=bool(properties.integrated),
                )
            )
    except Exception as error:  # CUDAError, or what cuda-core raises where the driver lacks a function
        return (), f"the NVIDIA driver for CUDA {cuda} is here, and its devices cannot be used: {_line(error)}"
    return tuple(gpus), None if gpus else f"the NVIDIA driver for CUDA {cuda} is here, and it finds no device"


def _providers() -> tuple[str, ...]:
    """ONNX Runtime's execution providers, where it was imported anyway."""
    module: Any = sys.modules.get("onnxruntime")
    return tuple(module.get_available_providers()) if hasattr(module, "get_available_providers") else ()


def _board() -> str | None:
    try:
        return _MODEL.read_bytes().rstrip(b"\0").decode(errors="replace").strip() or None
    except OSError:
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
