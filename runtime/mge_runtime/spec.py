"""What the export writes and the runtime reads: tensors, graphs, views, preprocessing.

Every class is a frozen dataclass of plain values; `to_dict` and `from_dict` (in `mge_runtime.manifest`) turn them into
the bundle's JSON. Nothing here knows what an expert is: tensor names wire the chain.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BATCH", "GraphSpec", "Preprocess", "TensorSpec", "ViewSpec"]

BATCH = "batch"  # the name of the one dynamic axis, always the first


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str  # unique in the chain: one graph's output is the input of this name of those after it
    dtype: str  # NumPy's name: "uint8", "float32", "float16", "int64"
    shape: tuple[int | str, ...]  # BATCH for the dynamic first axis, sizes for the others


@dataclass(frozen=True)
class GraphSpec:
    """One graph of the chain, an expert as a rule: `onnx/<name>.onnx` with its weights beside it.

    The chain may stop after any of its graphs.
    """

    name: str  # letters, digits and "_"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    logits: str  # the output [B, C] that is the chain's if it stops after this graph


@dataclass(frozen=True)
class ViewSpec:
    """What one expert saw and said, as tensor names; `Prediction` reports it."""

    logits: str  # [B, C], this expert alone
    heatmap: str  # [B, h, w], its attention on its own image, low resolution
    box: str | None  # [B, 4], the crop of the *previous* view's image that this view shows; None: the whole image


@dataclass(frozen=True)
class Preprocess:
    """From a decoded RGB image to the chain's input `frame`; normalisation is inside the graph."""

    resize: int  # pixels, the shorter side after resizing (Pillow's bilinear, antialiased); >= size
    size: int  # pixels, the side of the centre crop and of every expert's input
    mean: tuple[float, float, float]  # per RGB channel in [0, 1], subtracted in the graph
    std: tuple[float, float, float]  # per RGB channel, > 0, divided by in the graph
