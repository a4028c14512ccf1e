"""Whole lines of a map, copied: a Gather of elements whose index is the same along a line is one of lines.

The crop takes lines of each image at places of its own. PyTorch says that by an index that is expanded to every value
of the line (`torch.gather`), which exports as Expand and GatherElements and reads an index for each value. GatherND
with a batch axis takes an index for each line.
"""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper, shape_inference

from mge_export.surgery import replace_nodes

__all__ = ["gather_lines"]


def gather_lines(model: onnx.ModelProto) -> int:
    """Replace GatherElements along the first axis behind the batch by GatherND where whole lines are taken, in place.

    Args:
        model: with its weights; every node has a name.

    Returns:
        How many were replaced.
    """
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *graph.input, *graph.output)
    }

    def lines_of(node: onnx.NodeProto) -> str | None:
        """The index [B, S, 1] of the lines [B, L, a, b] that a node takes; None: it takes something else."""
        axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
        expand = producers.get(node.input[1])
        unsqueeze = producers.get(expand.input[0]) if expand is not None and expand.op_type == "Expand" else None
        if axis != 1 or unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or unsqueeze.input[1] not in constants:
            return None
        axes = numpy_helper.to_array(constants[unsqueeze.input[1]]).reshape(-1).tolist()
        data, index = shapes.get(node.input[0], []), shapes.get(unsqueeze.input[0], [])
        taken = shapes.get(node.output[0], [])
        whole = (
            len(data) == len(taken) == 4 and data[2:] == taken[2:] and taken[:2] == index[:2] and taken[0] == data[0]
        )
        return unsqueeze.input[0] if axes in ([3], [-1]) and len(index) == 3 and index[2] == 1 and whole else None

    added: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        index = lines_of(node) if node.op_type == "GatherElements" else None
        if index is not None:
            inputs, outputs = [node.input[0], index], list(node.output)
            added[node.name] = [helper.make_node("GatherND", inputs, outputs, name=node.name, batch_dims=1)]
    if added:
        replace_nodes(graph, added)
    return len(added)
