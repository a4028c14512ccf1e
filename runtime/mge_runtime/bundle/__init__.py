"""`mge.plan`: one file with a model's graphs, its manifest, and room for calibrations and engines."""

from mge_runtime.bundle.attachments import Calibration, EngineDescription
from mge_runtime.bundle.reader import Bundle
from mge_runtime.bundle.writer import GraphModel, add_calibration, add_card, add_engine, write_bundle

__all__ = [
    "Bundle",
    "Calibration",
    "EngineDescription",
    "GraphModel",
    "add_calibration",
    "add_card",
    "add_engine",
    "write_bundle",
]
