"""Run a trained mixture of granularity-specific experts without PyTorch.

    from mge_runtime import Pipeline

    with Pipeline.open("mge.plan") as pipeline:
        prediction = pipeline.predict("bird.jpg")

Names are imported when they are first used: a command that only prints its help needs neither NumPy nor Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle, write_bundle
    from mge_runtime.errors import BackendError, BundleError, InputError, MGEError, OutputError
    from mge_runtime.manifest import Manifest
    from mge_runtime.pipeline import Pipeline
    from mge_runtime.pool import PipelinePool
    from mge_runtime.prediction import Prediction

    __version__: str

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "InputError",
    "MGEError",
    "Manifest",
    "OutputError",
    "Pipeline",
    "PipelinePool",
    "Prediction",
    "write_bundle",
]

_HOMES = {
    "BackendError": "errors",
    "Bundle": "bundle",
    "BundleError": "errors",
    "InputError": "errors",
    "MGEError": "errors",
    "Manifest": "manifest",
    "OutputError": "errors",
    "Pipeline": "pipeline",
    "PipelinePool": "pool",
    "Prediction": "prediction",
    "write_bundle": "bundle",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("mge")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
