"""Which operators of a graph are quantised: the convolutions of its backbones and the residual sums between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

__all__ = ["Layer", "find_layers"]

# Between a convolution and a residual sum: operators that work on each value by itself, or choose among values.
_BETWEEN = frozenset({"Add", "Cast", "Clip", "HardSwish", "LeakyRelu", "MaxPool", "Mul", "Relu", "Sigmoid"})


@dataclass(frozen=True)
class Layer:
    """One operator that may be quantised."""

    name: str  # as people know it: the weight's name without ".weight"; of a sum "add" and the layer before it
    node: str  # ONNX node name
    operator: str  # "Conv" or "Add"
    activations: tuple[str, ...]  # tensors that it reads and that get a range: one of a Conv, two of an Add
    weight: str | None  # initialiser of a Conv


def find_layers(model: onnx.ModelProto, trunk_weight: Callable[[str], bool]) -> tuple[Layer, ...]:
    """List what of a graph may be quantised, in the order of its nodes.

    A sum is a residual one if both of its terms come from the trunk's convolutions through nothing but activations and
    pooling. So neither biases nor anything of heads, attention or crop is among them.

    Args:
        model: a graph, every node named.
        trunk_weight: whether an initialiser is a convolution's weight in the trunk.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    trunk: dict[str, bool] = {}  # tensor -> whether it is made by the trunk's convolutions

    def from_trunk(tensor: str) -> bool:
        if tensor not in trunk:
            trunk[tensor] = False  # a graph has no cycles; this bounds a damaged one
            node = producers.get(tensor)
            if node is not None and node.op_type == "Conv":
                trunk[tensor] = trunk_weight(node.input[1])
            elif node is not None and node.op_type in _BETWEEN:
                terms = [name for name in node.input if name and name not in constants]
                trunk[tensor] = bool(terms) and all(from_trunk(name) for name in terms)
        return trunk[tensor]

    layers: list[Layer] = []
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in constants and trunk_weight(node.input[1]):
            weight = node.input[1]
            layers.append(Layer(_short(weight), node.name, "Conv", (node.input[0],), weight))
        elif node.op_type == "Add" and not constants & set(node.input) and all(map(from_trunk, node.input)):
            name = f"add after {layers[-1].name}"
            layers.append(Layer(name, node.name, "Add", tuple(dict.fromkeys(node.input)), None))
    return tuple(layers)


def _short(weight: str) -> str:
    """`expert.trunk.layers.conv1.weight` -> `conv1`, `gate.trunk.layers.conv1.weight` -> `gate.conv1`."""
    return weight.removesuffix(".weight").removeprefix("expert.").replace("trunk.layers.", "", 1)
