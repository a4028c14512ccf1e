import onnx
import pytest

from mge_runtime.bundle.onnx_graph import _TENSORS_IN, external_tensors, node_operators, relocate
from mge_runtime.errors import BundleError


def weight(location, offset=0, length=8, name="w"):
    tensor = onnx.TensorProto(name=name, data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(*nodes, **parts):
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], **parts))


def move(proto):
    data = proto if isinstance(proto, bytes) else proto.SerializeToString()
    return relocate(data, {"a.weights": (4096, 8)}, location="mge.plan")


@pytest.mark.parametrize(
    ("initializer", "message"),
    [
        (weight("/etc/passwd"), "/etc/passwd"),
        (weight("a.weights", offset=4), "bytes 4 to 12 of"),
        (weight("a.weights", offset=-4), "weight 'w'"),
        (weight("a.weights", length=-4), "weight 'w'"),
        (weight("a.weights", length="many"), "no ONNX model"),
    ],
)
def test_weights_elsewhere_are_refused(initializer, message):
    with pytest.raises(BundleError, match=message):
        move(model(initializer=[initializer]))


HIDDEN = weight("/etc/passwd")
CONSTANT = onnx.helper.make_node("Constant", [], ["c"], value=HIDDEN)
BRANCH = onnx.helper.make_graph([CONSTANT], "branch", [], [onnx.helper.make_tensor_value_info("c", 1, [2])])


@pytest.mark.parametrize(
    "proto",
    [
        model(CONSTANT),
        model(onnx.helper.make_node("If", ["x"], ["y"], then_branch=BRANCH, else_branch=BRANCH)),
        model(sparse_initializer=[onnx.SparseTensorProto(values=HIDDEN, dims=[2])]),
        onnx.ModelProto(graph=BRANCH, functions=[onnx.FunctionProto(name="f", node=[CONSTANT])]),
    ],
    ids=["constant", "branch", "sparse", "function"],
)
def test_data_in_a_file_is_refused_where_it_is_no_initializers(proto):
    proto.graph.initializer.append(weight("a.weights"))
    with pytest.raises(BundleError, match="something but a graph's initializers keeps its data in another file"):
        move(proto)


def test_every_message_that_leads_to_a_tensor_is_looked_into():
    def leads_to(descriptor, seen=()):
        return descriptor.name == "TensorProto" or any(
            leads_to(field.message_type, (*seen, descriptor.name))
            for field in descriptor.fields
            if field.message_type is not None and field.message_type.name not in (*seen, descriptor.name)
        )

    for name, inner in _TENSORS_IN.items():
        fields = getattr(onnx, f"{name}Proto").DESCRIPTOR.fields
        wanted = {f.number: f.message_type.name for f in fields if f.message_type and leads_to(f.message_type)}
        assert {number: f"{message}Proto" for number, message in inner.items()} == wanted, name


def test_names_may_spell_anything():
    nodes = [onnx.helper.make_node("Identity", ["location"], ["relocation"], name="location", doc_string="location")]
    proto = model(*nodes, initializer=[weight("a.weights", name="location"), onnx.TensorProto(name="location.2")])
    proto.metadata_props.add(key="location", value="external_data")
    moved = onnx.load_from_string(move(proto))
    assert moved.graph.node == proto.graph.node
    assert moved.metadata_props == proto.metadata_props


@pytest.mark.parametrize("data", [b"\xff" * 40, model(initializer=[weight("a.weights")]).SerializeToString()[:-3]])
def test_what_is_no_model_is_refused(data):
    for read in (move, external_tensors, node_operators):
        with pytest.raises(BundleError, match="no ONNX model"):
            read(data)


def test_graphs_nested_without_end_are_refused():
    def field(number, data):
        size, length = len(data), b""
        while size >= 0x80:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    graph = b"location"
    for _ in range(1000):
        graph = field(1, field(5, field(6, graph)))  # a node whose attribute is the graph
    with pytest.raises(BundleError, match="no ONNX model"):
        move(field(7, graph))


def test_moving_weights_changes_nothing_else(tiny):
    source = tiny.make_graphs()[0].model()
    moved = onnx.load_from_string(
        relocate(source.graph, {"expert_1.weights": (8192, len(source.weights))}, location="x.plan")
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
    bare = model().SerializeToString()
    assert move(bare) == bare


def test_weights_may_lie_in_the_files_of_several_graphs():
    data = model(initializer=[weight("a.weights", name="a"), weight("b.weights", offset=8, name="b")])
    data = data.SerializeToString()
    moved = relocate(data, {"a.weights": (4096, 8), "b.weights": (8192, 16)}, location="mge.plan")
    assert [(t.name, t.location, t.offset) for t in external_tensors(moved)] == [
        ("a", "mge.plan", 4096),
        ("b", "mge.plan", 8200),
    ]
    with pytest.raises(BundleError, match=r"bytes 8 to 16 of 'b.weights'; expected them in the 8 bytes of 'a.weights'"):
        relocate(data, {"a.weights": (4096, 8)}, location="mge.plan")


def test_the_operators_of_nodes_are_read_by_name(tiny):
    proto = onnx.load_from_string(tiny.make_graphs()[1].model().graph)
    for number, node in enumerate(proto.graph.node):
        node.name = f"node {number}" if number % 2 else ""
    expected = {node.name: node.op_type for node in proto.graph.node if node.name}
    assert node_operators(proto.SerializeToString()) == expected
    assert "Conv" in expected.values()
