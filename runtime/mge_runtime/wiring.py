"""Check that graphs and views fit each other, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

from mge_runtime.errors import BundleError
from mge_runtime.spec import BATCH, GraphSpec, TensorSpec, ViewSpec

__all__ = ["check_wiring"]

DTYPES = ("uint8", "int8", "int32", "int64", "float16", "float32")
_GRAPH_NAME = re.compile(r"(?!chain$)[A-Za-z0-9_]{1,64}")  # `chain.onnx` is all of them in one


def check_wiring(
    graphs: Sequence[GraphSpec],
    views: Sequence[ViewSpec],
    gate: str | None,
    *,
    size: int,
    classes: int,
    frame: str,
) -> None:
    """Check a chain.

    Args:
        graphs: in the order they run.
        views: what each expert saw and said.
        gate: name of the gate's tensor, if any.
        size: side S of the frame, pixels.
        classes: number C of classes.
        frame: name of the chain's input, uint8 [B, S, S, 3].

    Raises:
        BundleError: they do not fit; the message names graph and tensor.
    """
    if not graphs or len({graph.name for graph in graphs}) != len(graphs):
        _fail(f"the graphs are {[graph.name for graph in graphs]}", "at least one, and names that differ")
    known = {frame: TensorSpec(frame, "uint8", (BATCH, size, size, 3))}
    for graph in graphs:
        if not _GRAPH_NAME.fullmatch(graph.name):
            _fail(f"a graph is called {graph.name!r}", 'letters, digits and "_", at most 64')
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.dtype not in DTYPES:
                _fail(f"{graph.name}.{tensor.name} is of type {tensor.dtype!r}", "one of " + ", ".join(DTYPES))
        _check_inputs(graph, known)
        for tensor in graph.outputs:
            if tensor.name in known:
                _fail(f"{tensor.name!r} is an output of {graph.name} and of a graph before it", "one source for each")
            known[tensor.name] = tensor
        own = {tensor.name: tensor for tensor in graph.outputs}
        _check_tensor(own, graph.logits, f"the logits after {graph.name}", (BATCH, classes))
    for number, view in enumerate(views, 1):
        _check_tensor(known, view.logits, f"the logits of view {number}", (BATCH, classes))
        _check_tensor(known, view.heatmap, f"the heat map of view {number}", (BATCH, None, None))
        if view.box is not None:
            _check_tensor(known, view.box, f"the box of view {number}", (BATCH, 4))
        if (view.box is None) != (number == 1):
            _fail(f"view {number} has the box {view.box!r}", "null for the first view alone, which shows the frame")
    if not views:
        _fail("there is no view", "one for each expert")
    if gate is not None:
        _check_tensor(known, gate, "the gate", (BATCH, len(views)))


def _check_inputs(graph: GraphSpec, known: dict[str, TensorSpec]) -> None:
    for tensor in graph.inputs:
        source = known.get(tensor.name)
        if source is None:
            _fail(f"{graph.name} has the input {tensor.name!r}, no output of one before it", "graphs in running order")
        if source != tensor:
            _fail(
                f"{graph.name} has the input {tensor.name!r} as {tensor.dtype} {list(tensor.shape)}",
                f"what it is as an output, {source.dtype} {list(source.shape)}",
            )


def _check_tensor(known: dict[str, TensorSpec], name: str, role: str, shape: tuple[int | str | None, ...]) -> None:
    tensor = known.get(name)
    if tensor is None:
        _fail(f"{role} is tensor {name!r}, which is no output", "an output of a graph that has run")
    fits = len(tensor.shape) == len(shape) and all(e in (None, s) for e, s in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != "float32":
        wanted = ["any" if axis is None else axis for axis in shape]
        _fail(f"{role} is tensor {name!r}, {tensor.dtype} {list(tensor.shape)}", f"float32 {wanted}")


def _fail(found: str, expected: str) -> NoReturn:
    raise BundleError(f"manifest.json: {found}; expected {expected}: export the bundle again")
