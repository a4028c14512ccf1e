"""Check that stages, segments and views fit each other, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

from mge_runtime.errors import BundleError
from mge_runtime.spec import BATCH, SegmentSpec, StageSpec, TensorSpec, ViewSpec

__all__ = ["check_wiring"]

DTYPES = ("uint8", "int8", "int32", "int64", "float16", "float32")
_STAGE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")


def check_wiring(
    stages: Sequence[StageSpec],
    segments: Sequence[SegmentSpec],
    views: Sequence[ViewSpec],
    gate: str | None,
    *,
    size: int,
    classes: int,
    frame: str,
) -> None:
    """Check a chain.

    Args:
        stages: all stages.
        segments: every stage once, in the order they run.
        views: what each expert saw and said.
        gate: name of the gate's tensor, if any.
        size: side S of the frame, pixels.
        classes: number C of classes.
        frame: name of the chain's input, uint8 [B, S, S, 3].

    Raises:
        BundleError: they do not fit; the message names stage and tensor.
    """
    by_name = {stage.name: stage for stage in stages}
    if len(by_name) != len(stages):
        _fail("two stages have the same name", "names that differ")
    for stage in stages:
        if not _STAGE_NAME.fullmatch(stage.name):
            _fail(f"a stage is called {stage.name!r}", 'letters, digits and "_", at most 64')
        for tensor in (*stage.inputs, *stage.outputs):
            if tensor.dtype not in DTYPES:
                _fail(f"{stage.name}.{tensor.name} is of type {tensor.dtype!r}", "one of " + ", ".join(DTYPES))
    order = [name for segment in segments for name in segment.stages]
    if sorted(order) != sorted(by_name) or not order:
        _fail(f"the segments run {order}", f"every stage once: {sorted(by_name)}")
    known = {frame: TensorSpec(frame, "uint8", (BATCH, size, size, 3))}
    for segment in segments:
        for name in segment.stages:
            _check_inputs(by_name[name], known)
            for tensor in by_name[name].outputs:
                if tensor.name in known:
                    _fail(f"{name} puts out {tensor.name!r} a second time", "one source for each tensor")
                known[tensor.name] = tensor
        _check_tensor(known, segment.answer, "an answer", (BATCH, classes))
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


def _check_inputs(stage: StageSpec, known: dict[str, TensorSpec]) -> None:
    for tensor in stage.inputs:
        source = known.get(tensor.name)
        if source is None:
            _fail(f"{stage.name} takes in {tensor.name!r}, which nothing before it puts out", "stages in running order")
        if source != tensor:
            _fail(
                f"{stage.name} takes in {tensor.name!r} as {tensor.dtype} {list(tensor.shape)}",
                f"what its source puts out, {source.dtype} {list(source.shape)}",
            )


def _check_tensor(known: dict[str, TensorSpec], name: str, role: str, shape: tuple[int | str | None, ...]) -> None:
    tensor = known.get(name)
    if tensor is None:
        _fail(f"{role} is tensor {name!r}, which no stage puts out", "an output of a stage that has run")
    fits = len(tensor.shape) == len(shape) and all(e in (None, s) for e, s in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != "float32":
        wanted = ["any" if axis is None else axis for axis in shape]
        _fail(f"{role} is tensor {name!r}, {tensor.dtype} {list(tensor.shape)}", f"float32 {wanted}")


def _fail(found: str, expected: str) -> NoReturn:
    raise BundleError(f"manifest.json: {found}; expected {expected}: export the bundle again")
