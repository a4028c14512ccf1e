import onnx
import pytest

from mge_runtime.bundle.onnx_graph import external_tensors, node_operators, relocate
from mge_runtime.errors import BundleError


def _graph_with(location, offset, length):
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_weights_elsewhere_are_refused():
    def model(**parts):
        nodes = parts.pop("nodes", [])
        return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], **parts)).SerializeToString()

    def move(graph):
        return relocate(graph, expected="a.weights", size=8, location="mge.plan", start=4096)

    with pytest.raises(BundleError, match="/etc/passwd"):
        move(model(initializer=[_graph_with("/etc/passwd", 0, 8)]))
    with pytest.raises(BundleError, match="bytes 4 to 12 of"):
        move(model(initializer=[_graph_with("a.weights", 4, 8)]))
    with pytest.raises(BundleError, match="weight 'w'"):
        move(model(initializer=[_graph_with("a.weights", -4, 8)]))
    hidden = onnx.helper.make_node("Constant", [], ["c"], value=_graph_with("/etc/passwd", 0, 8))
    with pytest.raises(BundleError, match="outside the graph's initializers"):
        move(model(nodes=[hidden]))
    branch = onnx.helper.make_graph([hidden], "branch", [], [onnx.helper.make_tensor_value_info("c", 1, [2])])
    nested = onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(BundleError, match="outside the graph's initializers"):
        move(model(nodes=[nested]))
    for data in (b"\xff" * 40, model(initializer=[_graph_with("a.weights", 0, 8)])[:-3]):
        with pytest.raises(BundleError, match="no ONNX model"):
            move(data)


def test_moving_weights_changes_nothing_else(tiny):
    graphs = {g.spec.name: g.model() for g in tiny.make_graphs()}
    source = graphs["expert_1"]
    moved = onnx.load_from_string(
        relocate(source.graph, expected="expert_1.weights", size=len(source.weights), location="x.plan", start=8192)
    )
    before = onnx.load_from_string(source.graph)
    for proto, start, location in ((before, 0, "expert_1.weights"), (moved, 8192, "x.plan")):
        for tensor in proto.graph.initializer:
            pairs = {pair.key: pair.value for pair in tensor.external_data}
            if pairs:
                assert pairs["location"] == location
                pairs["offset"] = str(int(pairs["offset"]) - start)
                del tensor.external_data[:]
                tensor.doc_string = f"{pairs['offset']} {pairs['length']}"
    assert before == moved
    tensors = external_tensors(source.graph)
    assert [(t.name, t.length) for t in tensors] == [("conv.weight", 384), ("fc.weight", 80)]
    bare = onnx.helper.make_model(onnx.helper.make_graph([], "bare", [], [])).SerializeToString()
    assert relocate(bare, expected="", size=0, location="", start=0) == bare


def test_the_operators_of_nodes_are_read_by_name(tiny):
    graph = tiny.make_graphs()[1].model().graph
    for number, node in enumerate((model := onnx.load_from_string(graph)).graph.node):
        node.name = f"node {number}" if number % 2 else ""
    expected = {node.name: node.op_type for node in model.graph.node if node.name}
    assert node_operators(model.SerializeToString()) == expected
    assert "Conv" in expected.values()
    with pytest.raises(BundleError, match="no ONNX model"):
        node_operators(graph[:-3])
