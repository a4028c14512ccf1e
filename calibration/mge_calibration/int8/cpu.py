"""A half-precision or INT8 graph encoded for a CPU, over the same weights.

One graph serves all targets: FP16 tensors, and symmetric INT8 between QuantizeLinear and DequantizeLinear, which is all
that TensorRT takes. ONNX Runtime's CPU provider wants neither. Measured with 1.31: it has no integer convolution
between FP16 scales (a graph of 48 took 17 times as long as FP32, and its optimizer changed every output), and it drops
a ReLU before a quantization only where zero is the lowest code.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mge_calibration.int8.insert import positive_bound

_CODES = 127 / 255  # of a positive activation: steps of uint8 in those of symmetric int8
_ZEROS = {"positive_zero_point": 0, "signed_zero_point": 128}  # uint8


def cpu_graph(model: onnx.ModelProto, *, fast: bool) -> onnx.ModelProto:
    """Encode a graph of `insert_quantization` for ONNX Runtime on a CPU.

    Every FP16 constant is widened, and what was cast to FP16 is cast to FP32. The weights keep their rounded values.

    Args:
        model: with its weights inside or in another file; left as it is.
        fast: for integer kernels: activations are coded as uint8, those after a ReLU or a clip with all 256 codes from
            zero on (INT8 has 128 for them), the others with their zero at 128 and the same steps. False: INT8 as
            TensorRT computes it.

    Returns:
        Another model with the same inputs and outputs.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    graph.ClearField("value_info")  # inferred types, which may be FP16
    if fast:
        _code_as_uint8(graph)
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Cast" else ():
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    casts = [cast for tensor in graph.initializer if (cast := _widen(tensor)) is not None]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _code_as_uint8(graph: onnx.GraphProto) -> None:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    zeros: dict[str, str] = {}  # by the tensor that a QuantizeLinear makes: the name of its zero point
    scaled: set[str] = set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            positive = positive_bound(node.input[0], producers, constants) is not None
            zeros[node.output[0]] = "positive_zero_point" if positive else "signed_zero_point"
            if positive and node.input[1] not in scaled:
                scaled.add(node.input[1])
                scale = constants[node.input[1]]
                wide = numpy_helper.to_array(scale).astype(np.float64) * _CODES
                scale.CopyFrom(numpy_helper.from_array(wide.astype(np.float32), scale.name))
    if not zeros:
        return
    for node in graph.node:
        coded = {"QuantizeLinear": node.output, "DequantizeLinear": node.input}.get(node.op_type, [""])[0]
        if coded in zeros:
            node.input[2] = zeros[coded]
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read and tensor.name not in _ZEROS]
    added = [numpy_helper.from_array(np.array(value, np.uint8), name) for name, value in _ZEROS.items() if name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *added])


def _widen(tensor: onnx.TensorProto) -> onnx.NodeProto | None:
    """Widen an FP16 constant in place, or where its bytes are elsewhere rename it and return a Cast that widens it."""
    if tensor.data_type != TensorProto.FLOAT16:
        return None
    if tensor.data_location != TensorProto.EXTERNAL:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
        return None
    name = tensor.name
    tensor.name = f"{name}__half"
    # ONNX Runtime folds the cast while it opens the graph.
    return helper.make_node("Cast", [tensor.name], [name], name=f"{name}_widened", to=TensorProto.FLOAT)
