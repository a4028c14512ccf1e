"""`mge.plan`: one file with a model's stages, its manifest, and room for calibrations and engines."""

from mge_runtime.bundle.attachments import Calibration, EngineDescription
from mge_runtime.bundle.reader import Bundle, Region
from mge_runtime.bundle.writer import StageModel, add_calibration, add_engine, write_bundle

__all__ = [
    "Bundle",
    "Calibration",
    "EngineDescription",
    "Region",
    "StageModel",
    "add_calibration",
    "add_engine",
    "write_bundle",
]
