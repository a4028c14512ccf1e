"""From a graph's ONNX bytes to a strongly typed network, as its parser read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mge_runtime.errors import BuildError
from mge_runtime.manifest import BATCH, GraphSpec, TensorSpec
from mge_runtime.trt.vendor import Vendor

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Parsed", "dtype_name", "parse_graph"]

# `tensorrt.DataType` by member name -> NumPy's name.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


class Parsed(NamedTuple):
    """A network with what must live as long as it does."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser  # owns the weights that the network points to


def parse_graph(vendor: Vendor, spec: GraphSpec, model: bytes, path: Path) -> Parsed:
    """Parse a graph and check the network's inputs and outputs against its specification.

    Args:
        vendor: the library.
        spec: inputs and outputs that it must have.
        model: serialised ModelProto.
        path: a file beside which the graph's external data lies.

    Raises:
        BuildError: an operator is not supported (the message names the node), or the border differs.
    """
    api, messages = vendor.api, vendor.messages
    messages.take()
    builder = api.Builder(vendor.logger)
    # Required on 10; 11 knows no other networks and ignores it.
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, vendor.logger)
    if not parser.parse(model, path=str(path)):  # pyright: ignore[reportUnknownMemberType] - a buffer
        raise BuildError(f"{vendor.name} {vendor.version} cannot parse graph {spec.name}: {_errors(parser, vendor)}")
    messages.take()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for role, tensors, expected in (("inputs", inputs, spec.inputs), ("outputs", outputs, spec.outputs)):
        found = sorted((tensor.name, dtype_name(tensor.dtype), _sizes(tensor.shape)) for tensor in tensors)
        wanted = sorted((tensor.name, tensor.dtype, _dynamic(tensor)) for tensor in expected)
        if [item[:2] for item in found] != [item[:2] for item in wanted] or (role == "inputs" and found != wanted):
            raise BuildError(f"graph {spec.name} was parsed with the {role} {found}; expected {wanted}: export again")
    return Parsed(builder, network, parser)


def dtype_name(dtype: trt.DataType) -> str:
    """NumPy's name of a TensorRT type, or TensorRT's own where NumPy has none: "float16", "fp8"."""
    return _DTYPES.get(dtype.name, dtype.name.lower())


def _sizes(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(dims[axis] for axis in range(len(dims)))


def _dynamic(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(-1 if axis == BATCH else int(axis) for axis in spec.shape)


def _errors(parser: trt.OnnxParser, vendor: Vendor) -> str:
    """The parser's own errors, each with its node; the log repeats them in pieces."""
    logged = vendor.messages.take()
    lines: list[str] = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reason = " ".join(error.desc().split())
        lines.append(f"node {error.node_name()!r} ({error.node_operator()}): {error.code().name}, {reason}")
    return "; ".join(lines) or logged or "it gave no reason"
