"""What an engine is for: library, version, compute capabilities, platform; and its name inside a bundle."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mge_runtime.errors import BundleError

__all__ = ["NOT_RTX", "RTX_CAPABILITIES", "Target"]

# `tensorrt_rtx.ComputeCapability` of 1.7; no SM87 (Orin), SM90 (Hopper) or SM110 (Thor), which have full TensorRT.
RTX_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")

# GPUs that people bring to TensorRT-RTX and that it does not serve; TensorRT does.
NOT_RTX = {"sm87": "Jetson Orin", "sm90": "Hopper", "sm100": "Blackwell for data centres", "sm110": "Jetson Thor"}

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
                f"the bundle has engines for {name!r}, which is no target that this version of mge knows; "
                "expected a name such as tensorrt-10.3-sm87-linux-aarch64: build them again with mge-build"
            )
        capabilities = tuple(match["capabilities"][1:].split("-"))
        return cls(match["backend"], match["version"], capabilities, match["system"], match["arch"])

    def __str__(self) -> str:
        return self.name
