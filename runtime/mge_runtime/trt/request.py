"""What a user asks to build for: `native`, or `rtx:sm86,sm89,sm120`."""

from __future__ import annotations

from dataclasses import dataclass

from mge_runtime.errors import BackendError
from mge_runtime.trt.target import NOT_RTX, RTX_CAPABILITIES

__all__ = ["NATIVE", "TargetRequest"]

NATIVE = "native"
_PREFIX = "rtx:"


@dataclass(frozen=True)
class TargetRequest:
    """One `--target`."""

    capabilities: tuple[str, ...] | None  # ahead of time with TensorRT-RTX; None: for the GPU that is present

    @classmethod
    def parse(cls, text: str) -> TargetRequest:
        """Read a `--target`.

        Raises:
            BackendError: it is neither "native" nor "rtx:" with compute capabilities that TensorRT-RTX knows.
        """
        if text == NATIVE:
            return cls(None)
        names = [name.strip().lower() for name in text[len(_PREFIX) :].split(",")]
        if not text.startswith(_PREFIX) or not all(names):
            raise BackendError(f"the target is {text!r}; expected {NATIVE}, or rtx:sm86,sm89,sm120")
        for name in names:
            if name in NOT_RTX:
                raise BackendError(
                    f"the target is {text!r}; {name} ({NOT_RTX[name]}) has no TensorRT-RTX: run mge-build on that "
                    "device, which has TensorRT"
                )
            if name not in RTX_CAPABILITIES:
                known = ", ".join(RTX_CAPABILITIES)
                raise BackendError(
                    f"the target is {text!r}; {name!r} is no compute capability of TensorRT-RTX: {known}"
                )
        return cls(tuple(dict.fromkeys(names)))
