"""Check what was parsed, and what was built, against the precision that was asked for.

The graph's types are law in a strongly typed network, so the parsed network says what an engine will compute in; that
needs no GPU (`attested: network`). On a device the engine itself is read back by its inspector (`attested: engine`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from mge_runtime.bundle.onnx_graph import node_operators
from mge_runtime.errors import BuildError
from mge_runtime.fields import JsonValue
from mge_runtime.trt.target import PRODUCTS
from mge_runtime.trt.vendor import dtype_name

if TYPE_CHECKING:
    import tensorrt as trt


_FLOATS = {"float16", "float32", "bfloat16", "fp8"}
# What a graph's convolutions compute in, by its precision plan's type. In a parsed network a quantized one reads what
# its DEQUANTIZE layers give, so there INT8 is FP16, too; in an engine it may be either.
_WANTED = {"fp32": "float32", "fp16": "float16", "int8": "float16"}
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# Words of the inspector, in the order in which they are looked for. TensorRT 10 says "Format/Datatype": "Channel major
# FP16 format where channel % 8 == 0", TensorRT 11 says "DataType": "Half".
_WORDS = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "uint8": None,
    "int8": "int8",
}

Counts = Mapping[str, Mapping[str, int]]  # operator or layer type -> floating type -> how many


def attest_network(graph: str, network: trt.INetworkDefinition, model: bytes, plan: Mapping[str, JsonValue]) -> Counts:
    """Check every layer of a parsed network against the graph's precision plan.

    Every convolution must compute in the plan's type and all of the plan's must be there; every layer that came from an
    ONNX node may give only floating types that the plan lists for that operator. A plan that lists no operators is
    checked by its convolutions alone.

    Args:
        graph: its name, for errors.
        network: as parsed, strongly typed.
        model: the ONNX bytes it was parsed from.
        plan: `Manifest.precision` of the graph: "type" and, as mge-export writes it, "operators"; of INT8 also
            "quantized", whose "convolutions" must each read two DEQUANTIZE layers.

    Returns:
        Layer type -> floating type -> layers.

    Raises:
        BuildError: the network is not what the plan says, e.g. FP32 where FP16 was asked for.
    """
    operators, planned = node_operators(model), _planned(plan)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    counts: dict[str, Counter[str]] = {}
    for layer in layers:
        kinds = {dtype_name(layer.get_output(number).dtype) for number in range(layer.num_outputs)} & _FLOATS
        counts.setdefault(layer.type.name, Counter()).update(kinds)
        node = _NODE.search(layer.metadata)
        name = node[1] if node else layer.name  # which begins as the node's does, should metadata be missing
        operator = operators.get(name)
        if operator is not None and planned:
            allowed = {part for kind in planned.get(operator, {}) for part in kind.split("/")}
            if wrong := kinds - allowed:
                raise BuildError(
                    f"graph {graph}: node {name!r} ({operator}) computes in {sorted(wrong)[0]}; the "
                    f"precision plan has {' and '.join(sorted(allowed)) or 'no floating type'} there: export again"
                )
    found, products = (counts.get(kind, Counter[str]()) for kind in ("CONVOLUTION", "MATRIX_MULTIPLY"))
    _check_type(graph, found, plan)
    if planned:
        wanted = {name: dict(planned[name]) for name in ("Conv", *PRODUCTS) if name in planned}
        products_fit = set(products) <= {kind for name in PRODUCTS for kind in wanted.get(name, ())}
        if found != Counter(wanted.get("Conv", {})) or not products_fit:
            raise BuildError(
                f"graph {graph}: the parsed network has the convolutions {dict(found)} and the matrix products "
                f"{dict(products)}; the precision plan has {wanted}: export again"
            )
    if plan.get("type") == "int8":
        _check_quantized(graph, layers, plan)
    return _plain(counts)


def attest_engine(graph: str, information: str, plan: Mapping[str, JsonValue]) -> Counts | None:
    """Check a built engine against the graph's precision plan, by what its inspector says.

    TensorRT may fuse layers beyond recognition, TensorRT-RTX usually does. Where convolutions can be told, each must
    compute in the plan's type; where some cannot, the engine does not tell, and the network's attestation stands.

    Args:
        graph: its name, for errors.
        information: JSON of `EngineInspector.get_engine_information`, of a DETAILED engine, TensorRT 10 or 11.
        plan: `Manifest.precision` of the graph.

    Returns:
        Layer type -> floating type -> layers with a tensor or weights of that type; None: the engine does not tell.

    Raises:
        BuildError: a convolution is not of the plan's precision, or the JSON cannot be read.
    """
    try:
        layers = json.loads(information)["Layers"]
        described = [cast("dict[str, Any]", layer) for layer in layers if isinstance(layer, dict)]  # else names alone
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"graph {graph}: the engine inspector gave no list of layers ({error!r})") from error
    counts: dict[str, Counter[str]] = {}
    convolutions: Counter[str] = Counter()
    for layer in described:
        inputs, weights = layer.get("Inputs", []), layer.get("Weights")
        kinds = _inspected(*inputs, *layer.get("Outputs", []), weights)
        name = str(layer.get("LayerType", "unknown"))
        counts.setdefault(name, Counter()).update(kinds)
        if kinds and "conv" in f"{name} {layer.get('ParameterType', '')}".lower():
            # Its output may be cast in the same kernel; its weights and what it reads cannot.
            types = _inspected(*inputs[:1], weights) or kinds
            if plan.get("type") == "int8" and "int8" in types:  # its scales or bias may be floats
                types = {"int8"}
            convolutions.update(types - {_WANTED.get(str(plan.get("type")))} or types)
    _check_type(graph, convolutions, plan)
    told = _plain(counts)
    return told if told and convolutions.total() >= sum(_planned(plan).get("Conv", {}).values()) else None


def _check_type(graph: str, convolutions: Counter[str], plan: Mapping[str, JsonValue]) -> None:
    wanted = _WANTED.get(str(plan.get("type")))
    for kind, number in convolutions.items():
        if wanted is not None and kind not in (wanted, plan.get("type")):  # "int8" is the name of a type, too
            raise BuildError(
                f"graph {graph}: {number} convolutions compute in {kind}; expected {wanted}, as the bundle says: "
                "export it again"
            )


def _check_quantized(graph: str, layers: Sequence[trt.ILayer], plan: Mapping[str, JsonValue]) -> None:
    """Count the convolutions whose input and weights both come from a DEQUANTIZE layer."""
    quantized = cast("Mapping[str, JsonValue]", plan.get("quantized") or {})
    dequantized = {layer.get_output(0).name for layer in layers if layer.type.name == "DEQUANTIZE"}
    found = sum(
        layer.num_inputs >= 2 and all(layer.get_input(index).name in dequantized for index in (0, 1))
        for layer in layers  # weights that are no tensor but the layer's own are no input
        if layer.type.name == "CONVOLUTION"
    )
    if found == 0 or found != quantized.get("convolutions", found):
        raise BuildError(
            f"graph {graph}: {found} convolutions read two DequantizeLinear; expected "
            f"{quantized.get('convolutions', 'some')}, as the bundle says: export it again"
        )


def _planned(plan: Mapping[str, JsonValue]) -> Counts:
    return cast("Counts", plan.get("operators") or {})


def _plain(counts: Mapping[str, Counter[str]]) -> Counts:
    return {kind: dict(sorted(number.items())) for kind, number in sorted(counts.items()) if number}


def _inspected(*tensors: Any) -> set[str]:
    """The types of tensors or weights, as the inspector describes them."""
    found: set[str | None] = set()
    for tensor in tensors:
        if isinstance(tensor, dict):
            facts = cast("dict[str, Any]", tensor)
            text = str(facts.get("DataType") or facts.get("Format/Datatype") or facts.get("Type")).lower()
            found.add(next((kind for word, kind in _WORDS.items() if word in text), None))
    return {kind for kind in found if kind is not None}
