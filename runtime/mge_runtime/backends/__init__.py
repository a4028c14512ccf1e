"""What computes the chain: one seam (`Backend`), one module for each implementation, imported when it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mge_runtime.backends.base import Backend, Buffer, StageRunner, Streams
from mge_runtime.backends.choice import BACKENDS, Candidate, Choice, choose
from mge_runtime.errors import BackendError, BuildError, OutputError

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle
    from mge_runtime.machine import Machine
    from mge_runtime.trt.engines import EngineSet

__all__ = ["BACKENDS", "Backend", "Buffer", "Candidate", "Choice", "StageRunner", "Streams", "choose", "open_backend"]


def open_backend(
    choice: Choice,
    bundle: Bundle | None = None,
    *,
    threads: int | None = None,
    streams: Streams = 1,
    graphs: bool = True,
    say: Callable[[str], None] | None = None,
) -> Backend:
    """The backend that was chosen; engines that `choice.build` asks for are built first, which can take minutes.

    Args:
        choice: what `choose` returned.
        bundle: what it was made for, open; the TensorRT backends need it.
        threads: processors to compute with on the CPU; None: all that this process may use.
        streams: runs of the chain that may be in flight at once; they share the processors. A GPU has one.
        graphs: on a GPU, whether to run the chain as CUDA graphs where that is possible.
        say: is told what a build does, line by line; None: the logger "mge_runtime" is, as a warning.

    Raises:
        BackendError: its library is missing, broken or too old, or several streams were asked for on a GPU.
        BuildError: engines cannot be built.
    """
    if (choice.backend, choice.device) == ("onnxruntime", "cpu"):
        from mge_runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(threads, streams)
    if streams not in (1, "auto"):
        raise BackendError(f"asked for {streams} streams on {choice.device}; expected 1: open one pipeline per thread")
    if choice.backend == "onnxruntime":
        from mge_runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(choice.device_index, graphs=graphs)
    if bundle is None:
        raise BackendError(f"{choice} was to be opened without a bundle; expected the one it was chosen for")
    return _open_tensorrt(choice, bundle, graphs, say or _warn)


def _open_tensorrt(choice: Choice, bundle: Bundle, graphs: bool, say: Callable[[str], None]) -> Backend:
    from mge_runtime.trt.fit import build_command, why_not
    from mge_runtime.trt.vendor import load_vendor

    vendor, machine, engines = load_vendor(choice.backend), choice.machine, choice.engines
    if machine is None or choice.gpu is None or not (choice.build or engines):
        raise BackendError(f"{choice} names no machine or no engines; expected what `choose` returned")
    if engines is None:
        say(f"{choice}: {choice.reason}")
        engines = _build(choice, machine, bundle, say)
    # Package metadata chose the engines; the library itself has the last word, before anything is deserialised.
    here = replace(machine, libraries={**machine.libraries, vendor.name: vendor.version})
    built = engines.description.plans
    if problem := why_not(engines.target, engines.details, built, here, choice.gpu, bundle.manifest):
        command = build_command(choice.backend, machine, choice.gpu, bundle.path)
        raise BackendError(f"{engines.target} {engines.place} {problem}; build again: {command}")
    from mge_runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(vendor, engines, choice.device_index, graphs=graphs)


def _build(choice: Choice, machine: Machine, bundle: Bundle, say: Callable[[str], None]) -> EngineSet:
    from mge_runtime.interrupt import interruptible
    from mge_runtime.trt.build import build_into_cache

    other = "run mge-build first, or choose the backend onnxruntime, which needs no engines"
    # TensorRT calls back in the middle of foreign code, which a KeyboardInterrupt must not pass.
    with interruptible("building the engines", other, BuildError) as interrupt, interrupt.held():
        try:
            return build_into_cache(
                bundle,
                machine,
                choice.device_index,
                choice.backend,
                say=say,
                progress=lambda _stage, _share, _phase: not interrupt.requested,
            )
        except (BuildError, OutputError) as error:
            raise type(error)(f"{error}; {other}") from error


def _warn(line: str) -> None:
    logging.getLogger("mge_runtime").warning(line)
