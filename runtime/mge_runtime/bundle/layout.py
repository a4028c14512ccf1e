"""Names of the entries inside a bundle."""

from __future__ import annotations

import re

__all__ = [
    "ALIGNMENT",
    "CALIBRATION",
    "CHAIN",
    "MANIFEST",
    "cpu_graph_entry",
    "engine_description",
    "engine_plan",
    "graph_entry",
    "is_entry_name",
    "is_target",
    "target_of",
    "weights_entry",
]

ALIGNMENT = 4096  # bytes: every entry's data starts on a page, so that it can be mapped into memory in place
MANIFEST = "manifest.json"
CALIBRATION = "calibration.json"
CHAIN = "onnx/chain.onnx"  # all graphs in one, over the same weights: for whoever takes the files out

_GRAPH = r"[A-Za-z0-9_]{1,64}"
_TARGET = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ENTRY_NAME = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(CALIBRATION)}|onnx/{_GRAPH}\.((cpu\.)?onnx|weights)"
    rf"|engines/{_TARGET}/(engine\.json|{_GRAPH}\.plan)"
)


def graph_entry(graph: str) -> str:
    """Entry with a graph's ONNX model."""
    return f"onnx/{graph}.onnx"


def cpu_graph_entry(graph: str) -> str:
    """Entry with the same graph encoded for CPUs, over the same weights; in INT8 bundles alone."""
    return f"onnx/{graph}.cpu.onnx"


def weights_entry(graph: str) -> str:
    """Entry with a graph's weights in ONNX's external-data layout; missing where it has none."""
    return f"onnx/{graph}.weights"


def engine_description(target: str) -> str:
    """Entry that describes the engines of one target."""
    return f"engines/{target}/engine.json"


def engine_plan(target: str, graph: str) -> str:
    """Entry with a graph's engine for one target."""
    return f"engines/{target}/{graph}.plan"


def target_of(name: str) -> str | None:
    """The target an engine's entry belongs to; None for other entries."""
    parts = name.split("/")
    return parts[1] if parts[0] == "engines" and len(parts) == 3 else None


def is_target(name: str) -> bool:
    """Whether `name` can name a target, such as "tensorrt-10.3-sm87-linux-aarch64"."""
    return re.fullmatch(_TARGET, name) is not None


def is_entry_name(name: str) -> bool:
    """Whether a bundle may hold an entry of this name; none of them leads out of a folder it is extracted to."""
    return _ENTRY_NAME.fullmatch(name) is not None
