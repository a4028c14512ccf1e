"""Hold what was parsed, and what was built, against the precision that was asked for.

The graph's types are law in a strongly typed network, so the parsed network says what an engine will compute in; that
needs no GPU (`attested: network`). On a device the engine itself is read back by its inspector (`attested: engine`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from mge_runtime.bundle.onnx_graph import node_operators
from mge_runtime.errors import BuildError
from mge_runtime.fields import JsonValue
from mge_runtime.trt.network import dtype_name

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["attest_engine", "attest_network"]

FLOATS = ("float16", "float32", "bfloat16", "fp8")
# What a graph's convolutions compute in, by its precision plan's type. In a parsed network a quantised one reads what
# its DEQUANTIZE layers put out, so there INT8 is FP16, too; in an engine it may be either.
_WANTED = {"fp32": "float32", "fp16": "float16", "int8": "float16"}
_PRODUCTS = ("Gemm", "MatMul", "Einsum")  # ONNX operators that become matrix products
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

Counts = Mapping[str, Mapping[str, int]]  # operator or layer type -> floating type -> how many


def attest_network(graph: str, network: trt.INetworkDefinition, model: bytes, plan: Mapping[str, JsonValue]) -> Counts:
    """Hold every layer of a parsed network to the graph's precision plan.

    Every convolution must compute in the plan's type and all of the plan's must be there; every layer that came from an
    ONNX node may put out only floating types that the plan lists for that operator. A plan that lists no operators
    holds convolutions, and matrix products where it has no convolutions or is FP32, to its type.

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
    operators = node_operators(model)
    planned = _planned(plan)
    counts: dict[str, Counter[str]] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds = {dtype_name(layer.get_output(number).dtype) for number in range(layer.num_outputs)} & set(FLOATS)
        for kind in kinds:
            counts.setdefault(layer.type.name, Counter())[kind] += 1
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
    found = counts.get("CONVOLUTION", Counter[str]())
    products = counts.get("MATRIX_MULTIPLY", Counter[str]())
    _check(graph, "convolutions", found, plan)
    if not planned and (plan.get("type") == "fp32" or not found):
        _check(graph, "matrix products", products, plan)  # nothing says that the heads are of another type
    if planned and not set(products) <= {kind for name in _PRODUCTS for kind in planned.get(name, ())}:
        raise BuildError(
            f"graph {graph}: the parsed network has the matrix products {dict(products)}; the precision plan has "
            f"{ {name: dict(planned[name]) for name in _PRODUCTS if name in planned} }: export again"
        )
    if planned and found != Counter(planned.get("Conv", {})):
        raise BuildError(
            f"graph {graph}: the parsed network has the convolutions {dict(found)}; the precision plan has "
            f"{dict(planned.get('Conv', {}))}: export again"
        )
    if plan.get("type") == "int8":
        _check_quantized(graph, network, plan)
    return {kind: dict(sorted(number.items())) for kind, number in sorted(counts.items())}


def attest_engine(graph: str, information: str, plan: Mapping[str, JsonValue]) -> Counts | None:
    """Hold a built engine to the graph's precision plan, from what its inspector says.

    TensorRT may fuse layers beyond recognition, TensorRT-RTX usually does. Where convolutions can be told, each must
    compute in the plan's type; where some cannot, the engine does not tell, and the network's attestation stands.

    Args:
        graph: its name, for errors.
        information: JSON of `EngineInspector.get_engine_information`, of a DETAILED engine, TensorRT 10 or 11.
        plan: `Manifest.precision` of the graph.

    Returns:
        Layer type -> floating type -> layers with a tensor or weights of that type; None: the engine does not tell.

    Raises:
        BuildError: a convolution is not of the plan's precision, or the answer cannot be read.
    """
    counts: dict[str, Counter[str]] = {}
    wanted = _WANTED.get(str(plan.get("type")))
    convolutions: Counter[str] = Counter()
    for layer in _layers(graph, information):
        kinds = set(_types(layer))
        name = str(layer.get("LayerType", "unknown"))
        for kind in kinds:
            counts.setdefault(name, Counter())[kind] += 1
        if kinds and "conv" in f"{name} {layer.get('ParameterType', '')}".lower():
            # Its output may be cast in the same kernel; its weights and what it reads cannot.
            types = set(_compute_types(layer)) or kinds
            if plan.get("type") == "int8" and "int8" in types:  # its scales or bias may be floats
                types = {"int8"}
            convolutions.update(types - {wanted} or types)
    _check(graph, "convolutions", convolutions, plan)
    if not counts or convolutions.total() < sum(_planned(plan).get("Conv", {}).values()):
        return None
    return {kind: dict(sorted(number.items())) for kind, number in sorted(counts.items())}


def _check_quantized(graph: str, network: trt.INetworkDefinition, plan: Mapping[str, JsonValue]) -> None:
    """Count the convolutions whose input and weights both come from a DEQUANTIZE layer."""
    quantized = cast("Mapping[str, JsonValue]", plan.get("quantized") or {})
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    dequantized = {layer.get_output(0).name for layer in layers if layer.type.name == "DEQUANTIZE"}
    found = 0
    for layer in layers:
        # A convolution whose weights are no tensor but the layer's own has one input.
        if layer.type.name == "CONVOLUTION" and layer.num_inputs >= 2:
            found += all(layer.get_input(index).name in dequantized for index in (0, 1))
    if found == 0 or found != quantized.get("convolutions", found):
        raise BuildError(
            f"graph {graph}: {found} convolutions read two DequantizeLinear; expected "
            f"{quantized.get('convolutions', 'some')}, as the bundle says: export it again"
        )


def _planned(plan: Mapping[str, JsonValue]) -> Counts:
    return cast("Counts", plan.get("operators") or {})


def _check(graph: str, what: str, found: Counter[str], plan: Mapping[str, JsonValue]) -> None:
    wanted = _WANTED.get(str(plan.get("type")))
    if wanted is None:
        return
    for kind, number in found.items():
        if kind not in (wanted, plan.get("type")):  # "int8" is the name of a type, too
            raise BuildError(
                f"graph {graph}: {number} {what} compute in {kind}; expected {wanted}, as the bundle says: "
                "export it again"
            )


def _layers(graph: str, information: str) -> Iterator[dict[str, Any]]:
    try:
        document = json.loads(information)
    except ValueError as error:
        raise BuildError(f"graph {graph}: the engine inspector's answer is no JSON ({error})") from error
    layers: Any = cast("dict[str, Any]", document).get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        raise BuildError(f"graph {graph}: the engine inspector's answer has no list of layers; expected one")
    # Without detail a layer is its name alone.
    yield from (cast("dict[str, Any]", layer) for layer in cast("list[Any]", layers) if isinstance(layer, dict))


def _types(layer: dict[str, Any]) -> Iterator[str]:
    for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ()), layer.get("Weights")):
        yield from _float_type(tensor)


def _compute_types(layer: dict[str, Any]) -> Iterator[str]:
    for tensor in (*layer.get("Inputs", ())[:1], layer.get("Weights")):
        yield from _float_type(tensor)


def _float_type(tensor: Any) -> Iterator[str]:
    if not isinstance(tensor, dict):
        return
    # 10: "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"; 11: "DataType": "Half".
    found = cast("dict[str, Any]", tensor)
    text = str(found.get("DataType") or found.get("Format/Datatype") or found.get("Type") or "").lower()
    kinds = (
        ("float16", ("fp16", "half")),
        ("bfloat16", ("bf16",)),
        ("float32", ("fp32", "float")),
        ("int8", ("int8",)),
    )
    text = text.replace("uint8", "")
    for kind, words in kinds:
        if any(word in text for word in words):
            yield kind
            return
