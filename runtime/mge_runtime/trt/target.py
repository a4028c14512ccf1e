"""What engines are built for: targets, what a user asks for, batch sizes; and which GPUs TensorRT-RTX serves."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from mge_runtime.errors import BackendError, BundleError
from mge_runtime.machine import Gpu, Machine
from mge_runtime.manifest import Manifest

# What engines are to be built for ahead of time, with TensorRT-RTX: "sm86" and so on.
Capabilities: TypeAlias = tuple[str, ...]

NATIVE = "native"
TURING = "sm75"
# `tensorrt_rtx.ComputeCapability` of 1.7.
RTX_CAPABILITIES = (TURING, "sm80", "sm86", "sm89", "sm120", "sm121")
# GPUs that people bring to TensorRT-RTX and that it does not serve; TensorRT does.
NOT_RTX = {"sm87": "Jetson Orin", "sm90": "Hopper", "sm100": "Blackwell for data centers", "sm110": "Jetson Thor"}
LARGEST_BATCH = 1024  # a frame batch of this size is 600 MB at 448 pixels; more is a typing error
PRODUCTS = ("Gemm", "MatMul", "Einsum")  # ONNX operators that become matrix products

_RTX = "rtx:"
_NAME = re.compile(
    r"(?P<backend>tensorrt|tensorrt-rtx)-(?P<version>\d+\.\d+)(?P<capabilities>(-sm\d{2,3})+)"
    r"-(?P<system>linux|windows)-(?P<arch>x86_64|aarch64)"
)


@dataclass(frozen=True)
class Target:
    """What the engines of one target run on.

    An engine of full TensorRT is for the GPU model it was built on; one of TensorRT-RTX serves every GPU of the compute
    capabilities it names.
    """

    backend: str  # "tensorrt" or "tensorrt-rtx"
    version: str  # of that library, major and minor: "10.3"
    capabilities: tuple[str, ...]  # compute capabilities in ascending order: ("sm86", "sm120")
    system: str  # "linux" or "windows"
    arch: str  # "x86_64" or "aarch64"

    @property
    def name(self) -> str:
        """For example "tensorrt-10.3-sm87-linux-aarch64"."""
        return "-".join((self.backend, self.version, *self.capabilities, self.system, self.arch))

    @classmethod
    def parse(cls, name: str) -> Target:
        """Read a name.

        Raises:
            BundleError: it names no target.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise BundleError(
                f"the bundle has engines for {name!r}, which is no target; expected a name such as "
                "tensorrt-10.3-sm87-linux-aarch64: build them again with mge-build"
            )
        capabilities = tuple(match["capabilities"][1:].split("-"))
        return cls(match["backend"], match["version"], capabilities, match["system"], match["arch"])

    def __str__(self) -> str:
        return self.name


def parse_request(text: str) -> Capabilities | None:
    """What a `--target` asks for: None for `native`, the capabilities of `rtx:sm86,sm89,sm120`.

    Raises:
        BackendError: it is neither "native" nor "rtx:" with compute capabilities that TensorRT-RTX knows.
    """
    if text == NATIVE:
        return None
    names = [name.strip().lower() for name in text[len(_RTX) :].split(",")]
    if not text.startswith(_RTX) or not all(names):
        raise BackendError(f"the target is {text!r}; expected {NATIVE}, or rtx:sm86,sm89,sm120")
    for name in names:
        if name in NOT_RTX:
            device = f"{name} ({NOT_RTX[name]})"
            raise BackendError(f"the target is {text!r}; {device} has no TensorRT-RTX: run mge-build on that device")
        if name not in RTX_CAPABILITIES:
            known = ", ".join(RTX_CAPABILITIES)
            raise BackendError(f"the target is {text!r}; {name!r} is no compute capability of TensorRT-RTX: {known}")
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class BatchRange:
    """An optimization profile: every batch from `least` to `most` runs, `usual` runs best."""

    least: int = 1
    usual: int = 1
    most: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most <= LARGEST_BATCH:
            raise BackendError(
                f"the batch range is {self}; expected MIN <= OPT <= MAX between 1 and {LARGEST_BATCH}, such as 1,1,8"
            )

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Read "MIN,OPT,MAX", or "N" (this batch size alone).

        Raises:
            BackendError: it is none of these.
        """
        if not re.fullmatch(r"\d{1,9}(, ?\d{1,9}, ?\d{1,9})?", text, re.ASCII):
            raise BackendError(f"the batch range is {text[:40]!r}; expected MIN,OPT,MAX, such as 1,1,8")
        numbers = [int(part) for part in text.split(",")]
        return cls(numbers[0], numbers[len(numbers) // 2], numbers[-1])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(least, usual, most)."""
        return self.least, self.usual, self.most

    def __str__(self) -> str:
        """For example "1,1,8"."""
        return ",".join(map(str, self.sizes))


def rtx_refusal(gpu: Gpu, manifest: Manifest | None) -> str | None:
    """Why TensorRT-RTX can run nothing on a GPU, or not this model; None: it can."""
    if gpu.capability not in RTX_CAPABILITIES:
        kind = f" ({NOT_RTX[gpu.capability]})" if gpu.capability in NOT_RTX else ""
        return f"TensorRT-RTX does not serve {gpu.capability}{kind}; full TensorRT does"
    return turing_refusal(manifest) if gpu.capability == TURING and manifest is not None else None


def turing_refusal(manifest: Manifest) -> str | None:
    """Why TensorRT-RTX cannot build a model for Turing; None: it can, as far as the precision plans tell.

    TensorRT-RTX 1.7's own words: "Cannot compile operation for Turing (SM75): FP32 GEMM is not supported".
    """
    for graph in manifest.graphs:
        plan = manifest.precision.get(graph.name, {})
        operators = cast("Mapping[str, Mapping[str, int]]", plan.get("operators") or {})
        single = [name for name in PRODUCTS if any("float32" in kind for kind in operators.get(name, {}))]
        if single or (plan.get("type") == "fp32" and "Conv" in operators):
            return (
                f"graph {graph.name} cannot run on {TURING}: its {' and '.join(single) or 'convolutions'} are in FP32, "
                "and TensorRT-RTX has no FP32 matrix products for Turing; expected backbones and Linear heads in FP16: "
                "mge-export --fp16 --target rtx:sm75"
            )
    return None


def build_command(backend: str, machine: Machine, gpu: Gpu, bundle: Path) -> str:
    """The command that builds the engines of a backend for a GPU, and where it runs.

    TensorRT-RTX needs no GPU to build, and builds for the operating system and architecture that it runs on.
    """
    folder = Path.cwd()
    path = shlex.quote(str(bundle.relative_to(folder) if bundle.is_relative_to(folder) else bundle))
    if backend == "tensorrt":
        return f"mge-build {path} (on this device)"
    return f"mge-build {path} --target rtx:{gpu.capability} --into-bundle (on any {machine.platform} machine)"
