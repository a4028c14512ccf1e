"""An expert's module as an ONNX graph: a small model and one raw block of weights."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx.external_data_helper import set_external_data
from onnxscript import opset18
from torch import Tensor

from mge_export.experts import ExpertGraph
from mge_export.precision import Precision
from mge_runtime.errors import ExportError
from mge_runtime.manifest import BATCH, GraphSpec, TensorSpec

# What PyTorch's exporter writes without converting, and old enough for every parser in use: TensorRT 10.3 of JetPack 6
# knows 9 to 20, ONNX Runtime knows 18 since 1.14.
OPSET = 18
ALIGNMENT = 64  # bytes, of each tensor inside the weights: a cache line and the widest vector load
INLINE_LIMIT = 1024  # bytes; smaller tensors (shapes, axes, scalars) stay in the graph, where type inference reads them


@dataclass(frozen=True)
class OnnxGraph:
    """One graph as it is written."""

    spec: GraphSpec
    precision: Precision  # of its backbones
    model: onnx.ModelProto  # its large initializers point into `weights`, ONNX's external-data layout
    weights: bytes  # little-endian, each tensor at a multiple of ALIGNMENT


def weights_name(graph: str) -> str:
    """Name of a graph's weights file, beside it."""
    return f"{graph}.weights"


def export_graph(graph: ExpertGraph) -> OnnxGraph:
    """Trace an expert's graph with a dynamic batch and write it as ONNX.

    Raises:
        ExportError: the trace fails, or inputs and outputs are not what the specification says.
    """
    spec = graph.spec
    # Any batch above 1 will do: 0 and 1 are taken for constants.
    inputs = tuple(_example(tensor, batch=2) for tensor in spec.inputs)
    batch = torch.export.Dim(BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            graph,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=(tuple({0: batch} for _ in spec.inputs),),
            custom_translation_table={
                torch.ops.aten.amax.default: _amax,
                torch.ops.aten.arange.default: _arange,
            },
            verbose=False,
        )
    if program is None:
        raise ExportError(f"{spec.name}: the exporter returned no graph; this is a defect of the exporter")
    model = program.model_proto
    _strip(model)
    _check_interface(spec, model)
    weights = externalize(model, weights_name(spec.name))
    return OnnxGraph(spec, graph.precision, model, weights)


op: Any = opset18  # its functions are typed for NumPy arrays, not for a graph's values


def _amax(value: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """The maximum of each map [B, C, h, w] as GlobalMaxPool, any other as ReduceMax.

    ONNX Runtime's CPU provider lays convolutions out in blocks of channels, in which GlobalMaxPool reads them as they
    are; before a ReduceMax it first copies the map back. For the part convolution that copy and the reduction took
    three times as long as the pooling, on a map of 2000 x 28 x 28.
    """
    if list(dim) != [2, 3] or keepdim:
        return op.ReduceMax(value, op.Constant(value_ints=list(dim)), keepdims=int(keepdim))
    cast = value.producer()
    if cast is None or cast.op_type != "Cast":
        return op.Flatten(op.GlobalMaxPool(value))
    # The exporter widens halves before a maximum; behind it there is less to widen, and the order is the same.
    return op.Cast(op.Flatten(op.GlobalMaxPool(cast.inputs[0])), to=int(value.dtype))


def _arange(end: Any, dtype: int = -1, **_: Any) -> Any:
    """Number a batch's images by the size of an input instead of its shape: Range(0, Size(x), n) / n, n of one image.

    The exporter would write Range(0, Squeeze(Shape(x)), 1). On CUDA, ONNX Runtime keeps Shape's output on the host, and
    Squeeze with it; but where it turns the layout to NHWC it looks at the graph a second time, finds that Shape has a
    place already, and puts Squeeze on the GPU between two copies, which no CUDA graph may hold. Range reads a scalar
    on the host, as Size writes it: nothing is left between the two that could be put anywhere else.
    """
    zero = op.Constant(value_int=0)
    if isinstance(end, int):
        numbers = op.Range(zero, op.Constant(value_int=end), op.Constant(value_int=1))
        return numbers if dtype < 0 else op.Cast(numbers, to=dtype)
    images = end.producer().inputs[0].producer().inputs[0]  # of Squeeze(Shape(images))
    one = op.Constant(value_int=math.prod(images.shape[1:]))
    # TensorRT knows uint8 as the input of a Cast alone; what is cast has as many numbers.
    casts = [use.node.outputs[0] for use in images.uses() if use.node.op_type == "Cast"]
    return op.Div(op.Range(zero, op.Size(*casts[:1] or [images]), one), one)


def _example(tensor: TensorSpec, batch: int) -> Tensor:
    shape = [batch if size == BATCH else int(size) for size in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: they hold stack traces with paths of this machine, and outweigh the graph."""
    graph = model.graph
    graph.ClearField("value_info")
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.doc_string = ""


def _check_interface(spec: GraphSpec, model: onnx.ModelProto) -> None:
    for role, tensors, protos in (
        ("inputs", spec.inputs, model.graph.input),
        ("outputs", spec.outputs, model.graph.output),
    ):
        found = tuple(_tensor_spec(proto) for proto in protos)
        if found != tensors:
            raise ExportError(f"{spec.name}: the graph's {role} are {found}; expected {tensors}")


def _tensor_spec(proto: onnx.ValueInfoProto) -> TensorSpec:
    kind = proto.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    shape = tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim)
    return TensorSpec(proto.name, dtype, shape)


def inlined(model: onnx.ModelProto, weights: Mapping[str, bytes]) -> onnx.ModelProto:
    """A copy of a model with its weights inside; `weights` are the files, by the name that the model refers to."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            start = int(place["offset"])
            tensor.raw_data = weights[place["location"]][start : start + int(place["length"])]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return result


def externalize(model: onnx.ModelProto, location: str, known: dict[bytes, tuple[str, int]] | None = None) -> bytes:
    """Move large initializers into one block and leave their place, offset and length in the graph.

    Args:
        model: with its weights; changed in place.
        location: file name that the graph will refer to.
        known: file and offset of what lies in other blocks, by its SHA-256: the graph refers to it there; what this
            block holds is added. None: the block holds every tensor.

    Returns:
        The block, each tensor at a multiple of `ALIGNMENT`.
    """
    block = bytearray()
    for tensor in model.graph.initializer:
        data = onnx.numpy_helper.to_array(tensor).tobytes()
        if len(data) < INLINE_LIMIT:
            continue
        digest = b"" if known is None else hashlib.sha256(data).digest()
        place = (known or {}).get(digest)
        if place is None:
            block.extend(bytes(-len(block) % ALIGNMENT))
            place = location, len(block)
            block.extend(data)
            if known is not None:
                known[digest] = place
        # set_external_data asks for raw data to be present, as a mark of what it moves.
        moved = onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=b"")
        set_external_data(moved, place[0], offset=place[1], length=len(data))
        moved.ClearField("raw_data")
        tensor.CopyFrom(moved)
    return bytes(block)
