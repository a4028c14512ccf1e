"""Engines beside the ONNX graphs: which ones an export builds, and building them before the bundle is published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mge_runtime.cli.build import shown_progress
from mge_runtime.errors import BackendError
from mge_runtime.interrupt import Interrupt
from mge_runtime.machine_probe import describe_machine
from mge_runtime.trt.batch import BatchRange
from mge_runtime.trt.builder import BuildOptions
from mge_runtime.trt.keep import build_targets, native_library
from mge_runtime.trt.request import NATIVE, TargetRequest
from mge_runtime.trt.turing import TURING
from mge_runtime.trt.vendor import load_vendor

__all__ = ["EnginePlan"]

ONNX = "onnx"  # the target that needs no engine


@dataclass(frozen=True)
class EnginePlan:
    """What `--target` and `--batch` ask for."""

    requests: tuple[TargetRequest, ...]
    batch: BatchRange
    asked: bool  # False: nobody named a target, so native engines are built only where that is possible

    @classmethod
    def parse(cls, targets: Sequence[str], batch: str) -> EnginePlan:
        """Read the command line.

        Raises:
            BackendError: an unknown target or a batch range that is none.
        """
        names = list(dict.fromkeys(targets)) or [NATIVE]
        requests = tuple(TargetRequest.parse(name) for name in names if name != ONNX)
        return cls(requests, BatchRange.parse(batch), bool(targets))

    @property
    def turing(self) -> bool:
        """Whether a target is Turing, which needs its linear heads in half."""
        return any(TURING in (request.capabilities or ()) for request in self.requests)

    def check(self, *, fp16: bool) -> None:
        """Find out before the export what cannot be built after it.

        Raises:
            BackendError: FP32 for Turing, a library that is missing, or no GPU where one was asked for.
        """
        if self.turing and not fp16:
            raise BackendError(
                f"the target {TURING} (Turing) was asked for in FP32; TensorRT-RTX has no FP32 matrix products there: "
                "add --fp16, or leave it out of --target"
            )
        for request in self.requests:
            if request.capabilities is not None:
                load_vendor("tensorrt-rtx")
            elif self.asked:
                native_library(describe_machine(), 0)

    def build(self, path: Path, interrupt: Interrupt, say: Callable[[str], None]) -> None:
        """Add the engines to a bundle that is not published yet.

        Raises:
            BuildError: a stage cannot be built or is not of its precision.
            BackendError: as for `check`.
            OutputError: the bundle cannot be written.
        """
        requests = self.requests
        if not self.asked:
            try:
                native_library(describe_machine(), 0)
            except BackendError as error:
                say(f"no engines, ONNX alone: {error}")
                requests = ()
        if self.turing:
            say("the linear heads are in FP16 for every target, because of sm75")
        if requests:
            with shown_progress(interrupt) as progress:
                build_targets(
                    path, requests, into_bundle=True, options=BuildOptions(self.batch), say=say, progress=progress
                )
