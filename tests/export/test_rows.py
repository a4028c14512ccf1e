"""Products with a one-hot vector that become a Gather of rows."""

import numpy as np
import onnx
import pytest

from mge_export.graph import export_graph
from mge_export.precision import Precision
from mge_export.rows import gather_rows
from mge_export.stages import build_stages
from mge_runtime.backends.ort import load_onnxruntime

onnxruntime = load_onnxruntime()

CLASSES, CHANNELS = 4, 6


def graph(
    *,
    counted=None,
    keepdims=0,
    column=(1,),
    matrix=None,
    follow=(),
    reads_one_hot=False,
    reads_row=False,
    swap=False,
    transposed=0,
):
    """Scores [B, 4] -> first guess -> one-hot @ [4, 6] -> what follows; the one-hot or the row may be outputs too."""
    node = onnx.helper.make_node
    rng = np.random.default_rng(0)
    matrix = rng.normal(0, 1, (CLASSES, CHANNELS)).astype(np.float32) if matrix is None else matrix
    constants = {
        "counted": np.arange(CLASSES) if counted is None else np.array(counted),
        "column": np.array(column),
        "matrix": matrix,
        "cells": np.array([2, 3]),
        "sixteen": np.array(16, np.float32),
        "each": np.arange(1, 1 + CHANNELS, dtype=np.float32),
    }
    steps = {
        "Unsqueeze": ["cells"],
        "Div": ["sixteen"],
        "DivEach": ["each"],
        "Relu": [],
        "ReduceMean": ["cells"],
        "Softmax": [],
    }
    nodes = [
        node("ArgMax", ["scores"], ["guess"], name="guess", axis=1, keepdims=keepdims),
        node("Unsqueeze", ["guess", "column"], ["guesses"], name="guesses"),
        node("Equal", ["guesses", "counted"] if swap else ["counted", "guesses"], ["is"], name="is"),
        node("Cast", ["is"], ["one_hot"], name="one_hot", to=1),
        *(node("Transpose", ["matrix" * (n == 0) or f"t{n}"], [f"t{n + 1}"], name=f"t{n}") for n in range(transposed)),
        node("MatMul", ["one_hot", f"t{transposed}" if transposed else "matrix"], ["row"], name="row"),
    ]
    last = "row"
    for number, step in enumerate(follow):
        kind = "Div" if step == "DivEach" else step
        nodes.append(node(kind, [last, *steps[step]], [f"y{number}"], name=f"y{number}"))
        last = f"y{number}"
    value = onnx.helper.make_tensor_value_info
    outputs = [value(last, 1, None)]
    outputs += [value("one_hot", 1, None)] if reads_one_hot else []
    outputs += [value("row", 1, None)] if reads_row else []
    read = {name for one in nodes for name in one.input}
    tensors = [onnx.numpy_helper.from_array(v, name) for name, v in constants.items() if name in read]
    made = onnx.helper.make_graph(nodes, "g", [value("scores", 1, ["batch", CLASSES])], outputs, tensors)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def answers(model, scores):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"scores": scores})


def kinds(model):
    return [node.op_type for node in model.graph.node]


SCORES = np.random.default_rng(1).normal(0, 1, (7, CLASSES)).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({}, ["ArgMax", "Gather"]),
        ({"swap": True}, ["ArgMax", "Gather"]),
        ({"column": (-1,)}, ["ArgMax", "Gather"]),
        ({"matrix": np.arange(24, dtype=np.float32).reshape(CHANNELS, CLASSES), "transposed": 1}, ["ArgMax", "Gather"]),
        ({"transposed": 2}, ["ArgMax", "Gather"]),
        ({"follow": ("Unsqueeze", "Div", "Relu", "ReduceMean")}, ["ArgMax", "Gather"]),
        ({"follow": ("Relu", "Softmax", "Relu")}, ["ArgMax", "Gather", "Softmax", "Relu"]),
        ({"follow": ("DivEach", "Relu")}, ["ArgMax", "Gather", "Div", "Relu"]),
        ({"follow": ("Relu",), "reads_row": True}, ["ArgMax", "Gather", "Relu"]),
        ({"reads_one_hot": True}, ["ArgMax", "Unsqueeze", "Equal", "Cast", "Gather"]),
    ],
    ids=[
        "alone",
        "swapped",
        "counted from the end",
        "transposed",
        "transposed twice",
        "Grad-CAM's",
        "mixed",
        "by a vector",
        "row read",
        "one-hot read",
    ],
)
def test_a_row_is_gathered_with_what_is_computed_from_it_alone(change, left):
    model = graph(**change)
    wanted = answers(model, SCORES)
    assert gather_rows(model) == 1
    assert kinds(model) == left
    found = answers(model, SCORES)
    assert [value.shape for value in found] == [value.shape for value in wanted]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        {"counted": [1, 0, 2, 3]},
        {"column": (0,), "keepdims": 1, "counted": [[0, 1, 2, 3]]},
        {"matrix": np.full((CLASSES, CHANNELS), np.inf, np.float32)},
    ],
    ids=["counted otherwise", "no column", "not finite"],
)
def test_other_products_stay(change):
    model = graph(**change)
    before = model.SerializeToString()
    assert gather_rows(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("half_linear", [False, True])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_an_exported_expert_reads_one_row(tiny, precision, half_linear):
    stage = build_stages(tiny.make_model(), precision, half_linear=half_linear)[1]
    assert not {"MatMul", "Equal"} & set(kinds(export_graph(stage).model))
