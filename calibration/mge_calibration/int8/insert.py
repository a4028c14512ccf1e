"""Which layers of a graph can be quantized, and the Q/DQ nodes around them as TensorRT takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

LEVELS = 127  # magnitudes that symmetric INT8 tells apart, beside zero
# DequantizeLinear makes FP16 from opset 19 on; TensorRT 10.3 of JetPack 6 knows up to 20.
OPSET = 19
_ZERO = "zero_point"  # of every quantized activation
# Between a convolution and a residual sum: operators that work on each value by itself, or choose among values.
_BETWEEN = frozenset({"Add", "Cast", "Clip", "HardSwish", "LeakyRelu", "MaxPool", "Mul", "Relu", "Sigmoid"})


@dataclass(frozen=True)
class Layer:
    """One operator that may be quantized."""

    name: str  # as people know it: the weight's name without ".weight"; of a sum "add" and the layer before it
    node: str  # ONNX node name
    operator: str  # "Conv" or "Add"
    activations: tuple[str, ...]  # tensors that it reads and that get a range: one of a Conv, two of an Add
    weight: str | None  # initializer of a Conv


def find_layers(model: onnx.ModelProto, backbone_weight: Callable[[str], bool]) -> tuple[Layer, ...]:
    """List what of a graph may be quantized, in the order of its nodes.

    A sum is a residual one if both of its terms come from the backbone's convolutions through nothing but activations
    and pooling. So neither biases nor anything of heads, attention or crop is among them.

    Args:
        model: a graph, every node named.
        backbone_weight: whether an initializer is a convolution's weight in the backbone.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    made_by_backbone: dict[str, bool] = {}  # tensor -> whether it is made by the backbone's convolutions

    def from_backbone(tensor: str) -> bool:
        if tensor not in made_by_backbone:
            made_by_backbone[tensor] = False  # a graph has no cycles; this bounds a damaged one
            node = producers.get(tensor)
            if node is not None and node.op_type == "Conv":
                made_by_backbone[tensor] = backbone_weight(node.input[1])
            elif node is not None and node.op_type in _BETWEEN:
                terms = [name for name in node.input if name and name not in constants]
                made_by_backbone[tensor] = bool(terms) and all(from_backbone(name) for name in terms)
        return made_by_backbone[tensor]

    layers: list[Layer] = []
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in constants and backbone_weight(node.input[1]):
            weight = node.input[1]
            layers.append(Layer(_short(weight), node.name, "Conv", (node.input[0],), weight))
        elif node.op_type == "Add" and not constants & set(node.input) and all(map(from_backbone, node.input)):
            name = f"add after {layers[-1].name}"
            layers.append(Layer(name, node.name, "Add", tuple(dict.fromkeys(node.input)), None))
    return tuple(layers)


def insert_quantization(
    model: onnx.ModelProto,
    layers: Iterable[Layer],
    ranges: Mapping[str, float],
    means: Mapping[str, np.ndarray],
) -> onnx.ModelProto:
    """Quantize layers: each reads its activations through one Q/DQ pair a tensor, its weight through a DQ.

    Everything is symmetric int8 with a zero point of 0, weights by output channel; scales have the type of the weights,
    so that what stays float stays in that type. Only the chosen layers read the dequantized tensors: whatever else
    reads the same tensor, as the crop reads the image, still reads the original. Biases stay float.

    The bias of a convolution takes up what rounding its weight adds to its sums on average: the missing part of the
    weight, times the mean of what it is multiplied with (M. Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction", ICCV 2019, section 4.2; here the means are measured).

    Args:
        model: a graph with its weights; left as it is.
        layers: of `find_layers`.
        ranges: tensor name -> magnitude of code 127, for every activation of the layers.
        means: tensor name -> mean of each channel, [C], of the same.

    Returns:
        Another model, with its weights; the same nodes in the same order, and the new ones before their readers.
    """
    chosen = {layer.node: layer for layer in layers}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if not chosen:
        return result
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    # A residual sum has no weight of its own: its scales are of the type of the convolutions around it.
    weight_name = next(n.input[1] for n in graph.node if n.op_type == "Conv" and n.input[1] in constants)
    kind = numpy_helper.to_array(constants[weight_name]).dtype
    added: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        added[name] = numpy_helper.from_array(value, name)
        return name

    def activation(tensor: str) -> str:
        scale, coded, result = f"{tensor}_scale", f"{tensor}_quantized", f"{tensor}_dequantized"
        if scale not in added:
            bound = positive_bound(tensor, producers, constants)
            constant(scale, _scale(ranges[tensor], bound, kind))
            zero = constant(_ZERO, np.zeros((), np.int8))
            nodes.append(_coding_node("QuantizeLinear", tensor, scale, zero, coded))
            nodes.append(_coding_node("DequantizeLinear", coded, scale, zero, result))
        return result

    def weight(name: str) -> str:
        scale, zero, coded, result = (f"{name}_{part}" for part in ("scale", "zero_point", "quantized", "dequantized"))
        if coded not in added:
            codes, scales = quantize_weight(numpy_helper.to_array(constants[name]))
            constant(coded, codes)
            constant(scale, scales)
            constant(zero, np.zeros(len(scales), np.int8))
            nodes.append(_coding_node("DequantizeLinear", coded, scale, zero, result, axis=0))
        return result

    for node in graph.node:
        if (layer := chosen.get(node.name)) is None:
            nodes.append(node)
            continue
        inputs = [activation(name) if name in layer.activations else name for name in node.input]
        if layer.weight is not None:
            inputs[1] = weight(layer.weight)
            bias = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else np.zeros((), kind)
            values = numpy_helper.to_array(constants[layer.weight])
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            lost = _lost(values, means[layer.activations[0]], groups)
            inputs[2:] = [constant(f"{layer.weight}_bias", (bias + lost).astype(kind))]
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        changed.input[:] = inputs
        nodes.append(changed)
    read = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    for field, parts in (("node", nodes), ("initializer", [*initializers, *added.values()])):
        result.graph.ClearField(field)
        getattr(result.graph, field).extend(parts)
    result.graph.ClearField("value_info")
    for opset in result.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)
    return result


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Code a convolution's weight [O, I, h, w] as int8, each output channel with its own scale.

    Returns:
        Codes in [-127, 127], and scales [O] in the weight's type.
    """
    wide = weight.astype(np.float32)
    magnitude = np.abs(wide).reshape(len(wide), -1).max(1)
    # BatchNorms folded into a depthwise convolution leave channels of a thousandth of the others' magnitude: their
    # scales are among FP16's subnormal numbers and still have digits enough. A channel of zeros needs a scale, too.
    scales = np.maximum(magnitude / LEVELS, np.finfo(weight.dtype).smallest_subnormal).astype(weight.dtype)
    codes = np.rint(wide / scales.astype(np.float32).reshape(-1, *[1] * (wide.ndim - 1)))
    return np.clip(codes, -LEVELS, LEVELS).astype(np.int8), scales


def _lost(weight: np.ndarray, mean: np.ndarray, groups: int) -> np.ndarray:
    """What rounding a weight takes from each output channel's mean, [O]; the map's edges, where it is padded, aside."""
    codes, scales = quantize_weight(weight)
    decoded = codes * scales.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    missing = (weight - decoded).reshape(*weight.shape[:2], -1).sum(2)  # [O, I / groups]
    inputs = np.repeat(mean.reshape(groups, -1), len(weight) // groups, axis=0)  # [O, I / groups]
    return (missing * inputs).sum(1)


def positive_bound(
    tensor: str, producers: Mapping[str, onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> float | None:
    """The largest value that a ReLU or a clip from 0 on lets pass; None: the tensor may be negative.

    Args:
        tensor: its name.
        producers: of the graph's tensors.
        constants: its initializers.
    """
    node = producers.get(tensor)
    if node is not None and node.op_type == "Relu":
        return float("inf")
    if node is None or node.op_type != "Clip" or len(node.input) < 2 or node.input[1] not in constants:
        return None
    if float(numpy_helper.to_array(constants[node.input[1]])) != 0:
        return None
    if len(node.input) < 3 or not node.input[2]:
        return float("inf")
    return float(numpy_helper.to_array(constants[node.input[2]])) if node.input[2] in constants else None


def _scale(largest: float, bound: float | None, kind: np.dtype) -> np.ndarray:
    """The step of a code; with a bound, the highest code stays below it, so that the clip can be dropped."""
    scale = np.asarray(max(largest / LEVELS, float(np.finfo(kind).smallest_subnormal)), kind)
    if bound is not None and float(scale) * LEVELS >= bound:
        scale = np.asarray(np.nextafter(np.asarray(bound / LEVELS, kind), np.asarray(0, kind)), kind)
    return scale


def _coding_node(
    operator: str, source: str, scale: str, zero: str, result: str, axis: int | None = None
) -> onnx.NodeProto:
    return helper.make_node(operator, [source, scale, zero], [result], name=f"node_{result}", axis=axis)


def _short(weight: str) -> str:
    """`expert.backbone.layers.conv1.weight` -> `conv1`, `gate.backbone.layers.conv1.weight` -> `gate.conv1`."""
    return weight.removesuffix(".weight").removeprefix("expert.").replace("backbone.layers.", "", 1)
