"""Whether engines run on a device: decided from their description alone, before a byte of them is deserialised."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path

from mge_runtime.machine import Gpu, Machine
from mge_runtime.manifest import Manifest
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.target import NOT_RTX, RTX_CAPABILITIES, Target
from mge_runtime.trt.turing import TURING, turing_refusal
from mge_runtime.trt.vendor import LIBRARIES

__all__ = ["build_command", "library_refusal", "rtx_refusal", "why_not"]

_JETPACK = "TensorRT comes with JetPack: sudo apt install nvidia-jetpack, in an environment with --system-site-packages"


def why_not(
    target: Target,
    details: EngineDetails,
    built: Collection[str],
    machine: Machine,
    gpu: Gpu | None,
    manifest: Manifest,
) -> str | None:
    """Why the engines of one target do not run on a GPU of a machine; None: they do.

    An engine runs on the version of the library that built it, in full, on the same operating system and architecture.
    One of full TensorRT is for the GPU model it was built on (the same name and number of multiprocessors); one of
    TensorRT-RTX is for every GPU of the compute capabilities that it names.

    Args:
        target: what the engines are for.
        details: the rest of their description.
        built: the graphs that they were built from.
        machine: the machine.
        gpu: its GPU; None: it has none that can be used.
        manifest: of the bundle, for its graphs.

    Returns:
        What was found and what is here, to follow the target's name.
    """
    if (target.system, target.arch) != (machine.system, machine.arch):
        return f"is for {target.system} {target.arch}, this machine is {machine.platform}"
    if gpu is None:
        return f"is for {' or '.join(target.capabilities)}, this machine has no GPU that can be used"
    if gpu.capability not in target.capabilities:
        return f"is for {' or '.join(target.capabilities)}, this GPU is {gpu}"
    if target.backend == "tensorrt":
        if details.gpu is None:
            return "does not say which GPU it was built on"
        if (details.gpu.name, details.gpu.multiprocessors) != (gpu.name, gpu.multiprocessors):
            return f"was built on {_model(details.gpu)}, this GPU is {_model(gpu)}"
    if (installed := machine.libraries.get(target.backend)) is None:
        return f"needs {target.backend} {details.version}, which is not installed here"
    if installed != details.version:
        return f"was built by {target.backend} {details.version}, {installed} is installed here"
    if missing := [graph.name for graph in manifest.graphs if graph.name not in built]:
        return f"has no engine for the graph {missing[0]}"
    return None


def library_refusal(name: str, machine: Machine, gpu: Gpu) -> str | None:
    """Why one of the two libraries can do nothing on a GPU of a machine; None: it can.

    Args:
        name: "tensorrt" or "tensorrt-rtx".
        machine: the machine.
        gpu: its GPU.
    """
    library = LIBRARIES[name]
    if name == "tensorrt-rtx" and (refusal := rtx_refusal(gpu, None)) is not None:
        return refusal
    if (error := machine.broken.get(name)) is not None:
        return f"{library.module} cannot be imported ({error}); install it again: {library.install}"
    if (version := machine.libraries.get(name)) is None:
        install = _JETPACK if name == "tensorrt" and machine.is_jetson else library.install
        return f"{library.module} is not installed: {install}"
    return library.refusal(version)


def rtx_refusal(gpu: Gpu, manifest: Manifest | None) -> str | None:
    """Why TensorRT-RTX can run nothing on a GPU, or not this model; None: it can."""
    if gpu.capability not in RTX_CAPABILITIES:
        kind = f" ({NOT_RTX[gpu.capability]})" if gpu.capability in NOT_RTX else ""
        return f"TensorRT-RTX does not serve {gpu.capability}{kind}; full TensorRT does"
    if gpu.capability == TURING and manifest is not None:
        refusals = (turing_refusal(graph.name, manifest.precision.get(graph.name, {})) for graph in manifest.graphs)
        return next((refusal for refusal in refusals if refusal is not None), None)
    return None


def build_command(backend: str, machine: Machine, gpu: Gpu, bundle: Path) -> str:
    """The command that builds the engines of a backend for a GPU, and where it runs.

    TensorRT-RTX needs no GPU to build, and builds for the operating system and architecture that it runs on.

    Args:
        backend: "tensorrt" or "tensorrt-rtx".
        machine: the machine.
        gpu: its GPU.
        bundle: its path; what lies in the working folder is named from there.
    """
    folder = Path.cwd()
    path = shlex.quote(str(bundle.relative_to(folder) if bundle.is_relative_to(folder) else bundle))
    if backend == "tensorrt":
        return f"mge-build {path} (on this device)"
    return f"mge-build {path} --target rtx:{gpu.capability} --into-bundle (on any {machine.platform} machine)"


def _model(gpu: Gpu) -> str:
    return f"{gpu} with {gpu.multiprocessors} multiprocessors"
