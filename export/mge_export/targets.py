"""Engines beside the ONNX graphs: which ones an export builds, and building them before the bundle is published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mge_runtime.cli.build import shown_progress
from mge_runtime.errors import BackendError, BuildError
from mge_runtime.interrupt import Interrupt
from mge_runtime.machine import Machine, describe_machine
from mge_runtime.trt.build import build_targets, native_library
from mge_runtime.trt.builder import BuildOptions
from mge_runtime.trt.target import NATIVE, TURING, BatchRange, Capabilities, parse_request
from mge_runtime.trt.vendor import load_vendor

ONNX = "onnx"  # the target that needs no engine


@dataclass(frozen=True)
class EnginePlan:
    """What `--target` and `--batch` ask for, on this machine."""

    requests: tuple[Capabilities | None, ...]  # None: for the GPU that is present
    batch: BatchRange
    asked: bool  # False: nobody named a target, so native engines are built only where that is possible
    machine: Machine
    # The library that builds native engines here, or why none can; None: they are not wanted.
    native: str | BackendError | None

    @classmethod
    def parse(cls, targets: Sequence[str], batch: str, machine: Machine | None = None) -> EnginePlan:
        """Read the command line.

        Args:
            targets: of --target; none: native engines where they can be built.
            batch: of --batch.
            machine: this one; None: look, where native engines are wanted.

        Raises:
            BackendError: an unknown target or a batch range that is none.
        """
        names = list(dict.fromkeys(targets)) or [NATIVE]
        requests = tuple(parse_request(name) for name in names if name != ONNX)
        wanted = None in requests
        machine = machine or describe_machine(quick=not wanted)
        native: str | BackendError | None = None
        if wanted:
            try:
                native = native_library(machine, 0)
            except BackendError as error:
                native = error
        return cls(requests, BatchRange.parse(batch), bool(targets), machine, native)

    @property
    def turing(self) -> bool:
        """Whether TensorRT-RTX is to build for Turing, which needs linear heads in half."""
        native = self.native == "tensorrt-rtx" and self.machine.gpus[0].capability == TURING
        return native or any(TURING in request for request in self.requests if request)

    def check(self, *, fp16: bool) -> None:
        """Find out before the export what cannot be built after it.

        Raises:
            BackendError: FP32 for Turing, a library that is missing, or no GPU where one was asked for.
        """
        if self.turing and not fp16 and self.asked:
            raise BackendError(
                f"the target {TURING} (Turing) was asked for in FP32; TensorRT-RTX has no FP32 matrix products there: "
                "add --fp16, or leave it out of --target"
            )
        if any(self.requests):
            load_vendor("tensorrt-rtx")
        if self.asked and isinstance(self.native, BackendError):
            raise self.native

    def build(self, path: Path, interrupt: Interrupt, say: Callable[[str], None]) -> None:
        """Add the engines to a bundle before it is published; those that nobody asked for do not keep it from that.

        Raises:
            BuildError: a graph cannot be built or is not of its precision.
            BackendError: as for `check`.
            OutputError: the bundle cannot be written.
        """
        if not self.requests:
            return
        if not self.asked and isinstance(self.native, BackendError):
            say(f"no engines, ONNX alone: {self.native}")
            return
        if self.turing:
            say(f"the linear heads are in FP16 for every target, because of {TURING}")
        try:
            build_targets(
                path,
                self.requests,
                into_bundle=True,
                options=BuildOptions(self.batch),
                machine=self.machine,
                interrupt=interrupt,
                say=say,
                progress=shown_progress(),
            )
        except (BuildError, BackendError) as error:
            if self.asked or interrupt.requested:
                raise
            say(f"no engines, ONNX alone: {error}")
