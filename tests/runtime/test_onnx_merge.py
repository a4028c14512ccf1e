"""Stages joined into one graph: names that clash, graphs inside nodes, what cannot be joined."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mge_runtime.backends.ort import load_onnxruntime
from mge_runtime.bundle import Bundle
from mge_runtime.bundle.located import located_graph
from mge_runtime.bundle.onnx_merge import merge_stages
from mge_runtime.errors import BundleError
from mge_runtime.spec import StageSpec, TensorSpec

onnxruntime = load_onnxruntime()


def spec(name):
    return TensorSpec(name, "float32", ("batch", 2))


def info(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2])


def stage(name, source, target, nodes, weights=(), opset=18, **options):
    graph = helper.make_graph(nodes, name, [info(source)], [info(target)], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, **options)
    return StageSpec(name, (spec(source),), (spec(target),)), model.SerializeToString()


def add(name, source, target, value, **options):
    """target = source + value, through a tensor `sum` and a weight `w`, as every stage calls them."""
    nodes = [
        helper.make_node("Add", [source, "w"], ["sum"], name="node"), helper.make_node("Identity", ["sum"], [target])
    ]  # fmt: skip
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [value, value])
    return stage(name, source, target, nodes, [weight], **options)


def choose(name, source, target):
    """target = source + 5 where its sum is positive, else source - 5: graphs in a node that read an outer weight."""
    node, result = helper.make_node, helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)
    graphs = {
        branch: helper.make_graph([node(operator, [source, "w"], ["sum"])], "g", [], [result])
        for branch, operator in (("then_branch", "Add"), ("else_branch", "Sub"))
    }  # fmt: skip
    nodes = [
        node("ReduceSum", [source], ["total"], keepdims=0),
        node("Greater", ["total", "zero"], ["positive"]),
        node("If", ["positive"], [target], **graphs),
    ]
    weights = [helper.make_tensor("w", TensorProto.FLOAT, [1], [5.0]), helper.make_tensor("zero", 1, [], [0.0])]
    return stage(name, source, target, nodes, weights)


def merged(*stages):
    return merge_stages([s for s, _ in stages], {s.name: graph for s, graph in stages}, "joined")


def run(graph, **feeds):
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


X = np.array([[1, 2], [3, 4]], np.float32)


def test_names_inside_stages_do_not_clash():
    found = run(merged(add("one", "x", "y", 1), add("two", "y", "z", 10)), x=X)
    np.testing.assert_array_equal(found["y"], X + 1)
    np.testing.assert_array_equal(found["z"], X + 11)
    model = onnx.load_from_string(merged(add("one", "x", "y", 1), add("two", "y", "z", 10)))
    assert [i.name for i in model.graph.input] == ["x"]
    assert [i.name for i in model.graph.output] == ["y", "z"]
    assert {i.name for i in model.graph.initializer} == {"one/w", "two/w"}


def test_a_tensor_inside_one_stage_may_be_called_like_the_border_of_another():
    found = run(merged(add("one", "x", "y", 1), stage("two", "x", "z", [
        helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])
    ])), x=X)  # fmt: skip
    np.testing.assert_array_equal(found["y"], X + 1)
    np.testing.assert_array_equal(found["z"], X)


def test_graphs_inside_nodes_are_renamed_with_what_they_read():
    graph = merged(add("one", "x", "y", 1), choose("two", "y", "z"))
    np.testing.assert_array_equal(run(graph, x=X)["z"], X + 6)
    np.testing.assert_array_equal(run(graph, x=-10 * X)["z"], -10 * X - 4)


def test_inputs_that_no_stage_makes_stay_inputs():
    one, two = add("one", "x", "y", 1), add("two", "v", "z", 10)
    found = run(merged(one, two), x=X, v=2 * X)
    np.testing.assert_array_equal(found["z"], 2 * X + 10)


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(BundleError, match=r"stage two uses version 17 of the operators 'ai.onnx', .* version 18"):
        merged(add("one", "x", "y", 1), add("two", "y", "z", 1, opset=17))
    function = helper.make_function("own", "F", ["a"], ["b"], [], [helper.make_opsetid("", 18)])
    with pytest.raises(BundleError, match=r"stage one cannot be joined .it defines functions"):
        merged(add("one", "x", "y", 1, functions=[function]))
    spec_of_one, graph = add("one", "x", "y", 1)
    with pytest.raises(BundleError, match=r"stage one cannot be joined .it is cut short"):
        merge_stages([spec_of_one], {"one": graph[:-3]}, "joined")


def test_a_whole_chain_is_a_valid_graph_with_its_weights_in_the_bundle(bundle_path):
    with Bundle.open(bundle_path) as bundle:
        stages = bundle.manifest.stages
        model = onnx.load_from_string(
            merge_stages(stages, {s.name: located_graph(bundle, s.name) for s in stages}, "x")
        )
    assert [node.name for node in model.graph.input] == ["frame"]
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert len(outside) == 7
    assert {pair.value for t in outside for pair in t.external_data if pair.key == "location"} == {bundle_path.name}
