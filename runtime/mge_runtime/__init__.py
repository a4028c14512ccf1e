"""Inference with a trained mixture of granularity-specific experts, without PyTorch.

    from mge_runtime import Pipeline

    with Pipeline.open("mge.plan") as pipeline:
        prediction = pipeline.predict("bird.jpg")

Names are imported when they are first used: a command that only prints its help needs neither NumPy nor Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mge_runtime.batching import Batcher
    from mge_runtime.bundle import Bundle, write_bundle
    from mge_runtime.errors import BackendError, BundleError, InputError, MGEError, OutputError
    from mge_runtime.manifest import Manifest
    from mge_runtime.pipeline import Pipeline
    from mge_runtime.prediction import Prediction

    __version__: str

__all__ = [
    "BackendError",
    "Batcher",
    "Bundle",
    "BundleError",
    "InputError",
    "MGEError",
    "Manifest",
    "OutputError",
    "Pipeline",
    "Prediction",
    "write_bundle",
]

_HOMES = {
    "batching": ("Batcher",),
    "bundle": ("Bundle", "write_bundle"),
    "errors": ("BackendError", "BundleError", "InputError", "MGEError", "OutputError"),
    "manifest": ("Manifest",),
    "pipeline": ("Pipeline",),
    "prediction": ("Prediction",),
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("mge")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
