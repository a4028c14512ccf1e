"""A hand-made chain of the same shape as an exported one: K experts, in the last a gate; a few kilobytes, no torch.

The numbers mean nothing, but every output depends on the image, boxes included. Weights come as float32 and float16,
and everything is computed in FP32 from plain weights: ONNX Runtime on CUDA takes DequantizeLinear and MatMul together,
and then differs by 2e-3 from the CPU.
"""

from __future__ import annotations

import sys

import numpy as np
from onnx import TensorProto, helper

from mge_runtime.bundle import GraphModel, write_bundle
from mge_runtime.manifest import Crops, GraphSpec, Manifest, Preprocess, TensorSpec, ViewSpec

SIZE, RESIZE, CLASSES, EXPERTS, CELLS = 32, 36, 5, 3, 8
_ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
}


def _spec(name: str) -> TensorSpec:
    kind, _, _ = name.partition("_")
    shapes = {
        "frame": (SIZE, SIZE, 3),
        "image": (3, SIZE, SIZE),
        "logits": (CLASSES,),
        "mean": (CLASSES,),
        "box": (4,),
        "heatmap": (CELLS, CELLS),
        "gate": (EXPERTS,),
    }
    return TensorSpec(name, "uint8" if kind == "frame" else "float32", ("batch", *shapes[kind]))


class Graph:
    """Collects nodes and weights of one graph; the weights go to one file beside the graph."""

    def __init__(self, name, inputs, outputs, logits):
        self.spec = GraphSpec(name, tuple(map(_spec, inputs)), tuple(map(_spec, outputs)), logits)
        self.nodes, self.initializers, self.weights = [], [], bytearray()

    def weight(self, name, array):
        array = np.ascontiguousarray(array)
        tensor = TensorProto(name=name, data_type=_ONNX_TYPES[array.dtype.name], dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        pairs = {"location": f"{self.spec.name}.weights", "offset": len(self.weights), "length": array.nbytes}
        for key, value in pairs.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.weights += array.tobytes()
        return name

    def const(self, name, array):
        self.initializers.append(
            helper.make_tensor(
                name, _ONNX_TYPES.get(array.dtype.name, TensorProto.INT64), array.shape, array.flatten().tolist()
            )
        )
        return name

    def node(self, operator, inputs, output, **attributes):
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def model(self):
        def info(t):
            return helper.make_tensor_value_info(t.name, _ONNX_TYPES[t.dtype], list(t.shape))

        inputs, outputs = map(info, self.spec.inputs), map(info, self.spec.outputs)
        graph = helper.make_graph(self.nodes, self.spec.name, list(inputs), list(outputs), self.initializers)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        return GraphModel(proto.SerializeToString(), bytes(self.weights) if self.weights else None)


def _f32(*values):
    return np.array(values, np.float32)


def _normalized(g):
    x = g.node("Cast", ["frame"], "float", to=TensorProto.FLOAT)
    x = g.node("Transpose", [x], "chw", perm=[0, 3, 1, 2])
    x = g.node("Div", [x, g.const("half", _f32(127.5))], "scaled")
    return g.node("Sub", [x, g.const("one", _f32(1.0))], "normalized")


def _expert(k, rng):
    last = k == EXPERTS
    inputs = ["frame"] if k == 1 else [f"image_{k}"]
    inputs += ["frame", *(f"logits_{n}" for n in range(1, k))] if last else [f"mean_logits_{k - 1}"][: k - 1]
    outputs = [f"logits_{k}", f"heatmap_{k}"]
    outputs += ["gate", "logits"] if last else [f"box_{k}", f"image_{k + 1}", f"mean_logits_{k}"]
    g = Graph(f"expert_{k}", inputs, outputs, outputs[-1])
    image = _normalized(g) if k == 1 else f"image_{k}"
    kernel = g.weight("conv.weight", rng.standard_normal((4, 3, 4, 4)).astype(np.float16))
    kernel = g.node("Cast", [kernel], "conv.float", to=TensorProto.FLOAT)
    x = g.node("Conv", [image, kernel], "features", kernel_shape=[4, 4], strides=[4, 4])
    x = g.node("Relu", [x], "active")
    pooled = g.node("Flatten", [g.node("GlobalAveragePool", [x], "pooled")], "flat")
    fc = g.weight("fc.weight", rng.standard_normal((4, CLASSES)).astype(np.float32) * 3)
    g.node("MatMul", [pooled, fc], f"logits_{k}")
    g.node("ReduceMean", [x, g.const("channel", np.array([1]))], f"heatmap_{k}", keepdims=0)
    if last:
        _mixture(g, rng)
        return g
    if k == 1:
        g.node("Identity", ["logits_1"], "mean_logits_1")
    else:
        before = g.node("Mul", [f"mean_logits_{k - 1}", g.const("before", _f32(k - 1.0))], "sum_before")
        total = g.node("Add", [before, f"logits_{k}"], "sum")
        g.node("Div", [total, g.const("count", _f32(float(k)))], f"mean_logits_{k}")
    mean = g.node("ReduceMean", [f"heatmap_{k}", g.const("space", np.array([1, 2]))], "level", keepdims=0)
    share = g.node("Sigmoid", [g.node("Unsqueeze", [mean, g.const("axis", np.array([1]))], "column")], "share")
    low = g.node("Floor", [g.node("Mul", [share, g.const("low", _f32(9, 5))], "low.float")], "corner")
    high = g.node("Floor", [g.node("Mul", [share, g.const("high", _f32(4, 7))], "high.float")], "margin")
    end = g.node("Sub", [g.const("size", _f32(SIZE)), high], "end")
    g.node("Concat", [low, end], f"box_{k}", axis=1)
    scale = g.node("Unsqueeze", [share, g.const("axes", np.array([2, 3]))], "scale")
    g.node("Mul", [image, scale], f"image_{k + 1}")
    return g


def _mixture(g, rng):
    pooled = g.node("Flatten", [g.node("GlobalAveragePool", [_normalized(g)], "gate.pooled")], "gate.flat")
    fc = g.weight("gate.weight", rng.standard_normal((3, EXPERTS)).astype(np.float32))
    g.node("Softmax", [g.node("MatMul", [pooled, fc], "scores")], "gate", axis=1)
    axis = g.const("axis", np.array([1]))
    rows = [g.node("Unsqueeze", [f"logits_{k}", axis], f"row_{k}") for k in range(1, EXPERTS + 1)]
    stacked = g.node("Concat", rows, "stacked", axis=1)
    shares = g.node("Unsqueeze", ["gate", g.const("last", np.array([2]))], "shares")
    g.node("ReduceSum", [g.node("Mul", [stacked, shares], "weighted"), axis], "logits", keepdims=0)


def make_graphs(seed=0):
    rng = np.random.default_rng(seed)
    return [_expert(k, rng) for k in range(1, EXPERTS + 1)]


def make_manifest(graphs):
    numbers = range(1, EXPERTS + 1)
    return Manifest(
        model={"arch": "tiny"},
        class_names=tuple(f"bird {i}" for i in range(CLASSES)),
        preprocess=Preprocess(RESIZE, SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        graphs=tuple(g.spec for g in graphs),
        views=tuple(ViewSpec(f"logits_{k}", f"heatmap_{k}", f"box_{k - 1}" if k > 1 else None) for k in numbers),
        crops=Crops((SIZE,) * len(numbers)),
        gate="gate",
        gmacs={g.spec.name: 1e-6 * number for number, g in enumerate(graphs, 1)},
        precision={g.spec.name: {"type": "fp32", "attested": "written by hand"} for g in graphs},
        tools={"onnx": "test"},
    )


def write_tiny_bundle(path, seed=0):
    graphs = make_graphs(seed)
    return write_bundle(path, make_manifest(graphs), {g.spec.name: g.model() for g in graphs})


if __name__ == "__main__":
    write_tiny_bundle(sys.argv[1])
