"""Expansions of one cell to a map that is only averaged again."""

import numpy as np
import onnx
import pytest
import torch

from mge_export.graph import export_graph, inlined
from mge_export.level import drop_expansions
from mge_export.precision import Precision
from mge_export.stages import build_stages
from mge_runtime.backends.ort import load_onnxruntime

onnxruntime = load_onnxruntime()


def graph(*, relu=True, reads_map=False, axes=(2, 3), cell=(2, 3), rest=(5, 3, 4), batch=None, axis="batch"):
    """Vector [B, 5] -> one cell -> map [B, 5, 3, 4] -> / 12 -> ReLU -> mean; the map may be an output itself."""
    node = onnx.helper.make_node
    constants = {
        "cell": np.array(cell),
        "rest": np.array(rest),
        "fixed": np.array([batch or 1]),
        "axes": np.array(axes),
        "count": np.array(12, np.float32),
    }
    last = "cut" if relu else "scaled"
    nodes = [
        node("Unsqueeze", ["x", "cell"], ["one"], name="one"),
        node("Shape", ["x"], ["batch"], name="batch", start=0, end=1),
        node("Concat", ["fixed" if batch else "batch", "rest"], ["map"], name="map", axis=0),
        node("Expand", ["one", "map"], ["level"], name="level"),
        node("Div", ["level", "count"], ["scaled"], name="scaled"),
        *([node("Relu", ["scaled"], ["cut"], name="cut")] if relu else []),
        node("ReduceMean", [last, "axes"], ["y"], name="y", keepdims=1),
    ]
    outputs = [onnx.helper.make_tensor_value_info("y", 1, None)]
    if reads_map:
        outputs.append(onnx.helper.make_tensor_value_info("level", 1, None))
    inputs = [onnx.helper.make_tensor_value_info("x", 1, [axis, 5])]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = onnx.helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def answer(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("relu", [True, False])
def test_the_mean_of_a_level_map_is_its_one_value(relu):
    model = graph(relu=relu)
    x = np.random.default_rng(0).normal(0, 1, (4, 5)).astype(np.float32)
    wanted = answer(model, x)
    assert drop_expansions(model) == 1
    assert "Expand" not in {node.op_type for node in model.graph.node}
    found = answer(model, x)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-6)  # the mean of twelve equal numbers rounds


@pytest.mark.parametrize(
    "change",
    [{"reads_map": True}, {"axes": (2,)}, {"batch": 4}, {"cell": (1, 3), "rest": (5, 5, 4)}, {"axis": None}],
    ids=[
        "read by others",
        "averaged along one axis",
        "expanded along the batch",
        "not level",
        "of a batch without a name",
    ],
)
def test_other_maps_stay(change):
    model = graph(**change)
    before = model.SerializeToString()
    assert drop_expansions(model) == 0
    assert model.SerializeToString() == before


def test_an_exported_expert_has_no_gradient_map_and_the_same_attention(tiny):
    stage = build_stages(tiny.make_model(), Precision.FP32)[1]
    model = inlined(export_graph(stage))
    image = np.random.default_rng(0).normal(0, 1, (2, *stage.spec.inputs[0].shape[1:])).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in stage.spec.outputs]
    found = dict(zip(names, session.run(names, {session.get_inputs()[0].name: image}), strict=True))
    wanted = stage.module(torch.from_numpy(image))[names.index("heatmap_1")].numpy()
    np.testing.assert_allclose(found["heatmap_1"], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert "Expand" not in {node.op_type for node in model.graph.node}
