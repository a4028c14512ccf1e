"""A maximum over a convolution's map, written as pooling."""

import numpy as np
import onnx
import pytest
import torch

from mge_export.graph import export_graph, inlined
from mge_export.pooling import pool_maxima
from mge_export.precision import Precision
from mge_export.stages import build_stages
from mge_runtime.backends.ort import load_onnxruntime

onnxruntime = load_onnxruntime()


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_every_experts_part_convolution_is_pooled(tiny, precision):
    stages = build_stages(tiny.make_model(), precision)
    for stage in stages:
        graph = export_graph(stage).model.graph
        pools = [node for node in graph.node if node.op_type == "GlobalMaxPool"]
        assert len(pools) == stage.spec.name.startswith("expert")
        for pool in pools:
            (conv,) = (node for node in graph.node if pool.input[0] in node.output)  # in half: no Cast of the whole map
            assert (conv.op_type, conv.input[1].rpartition(".")[0].rpartition(".")[2]) == ("Conv", "part_conv")


def reduction(*, axes=(2, 3), keepdims=0, source="map", half=False, also=None, rank=4):
    """Image [B, 2, 6, 6] -> convolution -> maximum over some axes of it, or of the image.

    Args:
        axes: of the maximum.
        keepdims: of the maximum.
        source: what it is taken of: "map" or "image".
        half: convolve in half, and widen before the maximum.
        also: a tensor that is an output, too.
        rank: of the image; 5 is a volume.
    """
    kind = np.float16 if half else np.float32
    space = [6] * (rank - 2)
    weight = torch.randn(3, 2, *[1] * (rank - 2), generator=torch.Generator().manual_seed(0)).numpy().astype(kind)
    node = onnx.helper.make_node
    nodes = [node("Conv", ["image", "weight"], ["map"], name="conv")]
    if half:
        nodes.append(node("Cast", ["map"], ["wide"], name="widen", to=onnx.TensorProto.FLOAT))
        source = "wide"
    nodes.append(node("ReduceMax", [source, "axes"], ["top"], name="top", keepdims=keepdims))
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    outputs = [onnx.helper.make_tensor_value_info("top", 1, None)]
    if also is not None:
        outputs.append(onnx.helper.make_tensor_value_info(also, 1 if also == "wide" else element, None))
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("image", element, ["batch", 2, *space])],
        outputs,
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(np.array(axes), "axes")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def answer(model, image):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("also", [None, "map"])
def test_the_values_are_the_same(half, also):
    model = reduction(axes=[3, 2], half=half, also=also)
    image = np.random.default_rng(0).normal(0, 1, (4, 2, 6, 6)).astype(np.float16 if half else np.float32)
    wanted = answer(model, image)
    assert pool_maxima(model) == 1
    assert [tensor.name for tensor in model.graph.initializer] == ["weight"]
    found = answer(model, image)
    assert found.shape == (4, 3)
    # ONNX Runtime's CPU provider computes halves in FP32 and rounds them where it hands them on: by 2**-11 at most.
    np.testing.assert_allclose(found, wanted, rtol=2**-11 if half else 0)


@pytest.mark.parametrize(
    "change",
    [
        {"axes": [2]},
        {"axes": [1, 2]},
        {"keepdims": 1},
        {"source": "image"},
        {"rank": 5},
        {"half": True, "also": "wide"},
    ],
    ids=str,
)
def test_other_reductions_stay(change):
    model = reduction(**change)
    before = model.SerializeToString()
    assert pool_maxima(model) == 0
    assert model.SerializeToString() == before


def test_exported_graphs_answer_as_before(tiny):
    stage = build_stages(tiny.make_model(), Precision.FP32)[1]
    model = inlined(export_graph(stage))
    assert "GlobalMaxPool" in {node.op_type for node in model.graph.node}
    image = np.random.default_rng(0).normal(0, 1, (2, *stage.spec.inputs[0].shape[1:])).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits_1"], {session.get_inputs()[0].name: image})
    np.testing.assert_allclose(logits, stage.module(torch.from_numpy(image))[0].numpy(), rtol=1e-4, atol=1e-4)
