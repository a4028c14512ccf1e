"""INT8 from a checkpoint to a bundle: what is quantized and what never is."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mge_calibration.int8.images import CalibrationImages, read_calibration_images
from mge_calibration.int8.insert import find_layers
from mge_calibration.int8.quantize import Agreement, Int8Options
from mge_export.experts import build_graphs
from mge_export.export import export_bundle
from mge_export.graph import export_graph
from mge_export.images import find_verify_images, generated_images
from mge_export.int8 import Int8Request, check_quantization, is_backbone_weight, quantize_graphs
from mge_export.precision import Precision
from mge_export.runners import reference_tensors
from mge_runtime.backends.onnxruntime import integer_entries, load_onnxruntime
from mge_runtime.errors import ExportError
from mge_runtime.pipeline import Pipeline

GRAPHS = ("expert_1", "expert_2")
CODING = {"QuantizeLinear", "DequantizeLinear"}


def producers(graph):
    return {output: node for node in graph.node for output in node.output}


def is_backbone_convolution(graph):
    """A convolution of the backbone: its weight is one, or is decoded from one."""
    made = producers(graph)

    def judge(node):
        if node.op_type != "Conv":
            return False
        weight = node.input[1]
        if weight in made:
            weight = made[weight].input[0].removesuffix("_quantized")
        return is_backbone_weight(weight)

    return judge


def quantized_convolutions(graph):
    made = producers(graph)
    return [
        node
        for node in graph.node
        if node.op_type == "Conv"
        and all(name in made and made[name].op_type == "DequantizeLinear" for name in node.input[:2])
    ]


def is_residual_sum(graph):
    """A sum of two terms that the backbone's convolutions make, with nothing but activations and pooling between."""
    made, backbone = producers(graph), is_backbone_convolution(graph)
    between = {"Add", "Cast", "Clip", "MaxPool", "Relu", "QuantizeLinear", "DequantizeLinear"}

    def from_backbone(tensor):
        node = made.get(tensor)
        if node is None or node.op_type == "Conv":
            return node is not None and backbone(node)
        terms = node.input if node.op_type == "Add" else node.input[:1]  # beside it are limits, scales, zero points
        return node.op_type in between and all(map(from_backbone, terms))

    return lambda node: node.op_type == "Add" and all(map(from_backbone, node.input))


def quantized_nodes(graph):
    return {node.name for node in quantized_convolutions(graph)} | {node.name for node in quantized_sums(graph)}


def quantized_sums(graph):
    made, residual = producers(graph), is_residual_sum(graph)
    return [node for node in graph.node if residual(node) and made[node.input[0]].op_type == "DequantizeLinear"]


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_but_the_backbone_reads_what_was_quantized(quantized, name):
    """Not the image nor what is cut from it, no head, no output."""
    graph = quantized.graphs[name]
    made, backbone, residual = producers(graph), is_backbone_convolution(graph), is_residual_sum(graph)
    coded = {name for name, node in made.items() if node.op_type in CODING}
    readers = [node for node in graph.node if coded & set(node.input) and node.op_type not in CODING]
    assert {node.op_type for node in readers} == {"Conv", "Add"}
    assert all(backbone(node) or residual(node) for node in readers)
    assert not coded & {tensor.name for tensor in graph.output}


def with_pair(model, name, index):
    """The graph with a Q/DQ pair before one input of a node."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = list(changed.graph.node)
    reader = next(node for node in nodes if node.name == name)
    changed.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(0.1), "some_scale"), numpy_helper.from_array(np.int8(0), "some_zero")]
    )
    pair = [
        helper.make_node("QuantizeLinear", [reader.input[index], "some_scale", "some_zero"], ["coded"], name="some_q"),
        helper.make_node("DequantizeLinear", ["coded", "some_scale", "some_zero"], ["decoded"], name="some_dq"),
    ]
    reader.input[index] = "decoded"
    place = nodes.index(reader)
    del changed.graph.node[:]
    changed.graph.node.extend([*nodes[:place], *pair, *nodes[place:]])
    return changed


@pytest.mark.parametrize("name", GRAPHS)
def test_backbones_alone_are_quantized(quantized, name):
    graph, plan = quantized.graphs[name], quantized.manifest.precision[name]
    outputs = {tensor.name for tensor in graph.output}
    backbone = is_backbone_convolution(graph)
    found = quantized_convolutions(graph)
    assert len(found) == plan["quantized"]["convolutions"] > 0
    assert all(backbone(node) for node in found)
    left = [node for node in graph.node if backbone(node) and node not in found]
    sums = sum(name.startswith("add ") for name in plan["quantized"]["left_float"])
    assert len(left) == len(plan["quantized"]["left_float"]) - sums
    # Of resnet10t: three of the stem, two of each block, the shortcuts'; the last graph has the gate's, too.
    assert len(found) + len(left) == (14 if "gate" not in outputs else 28)
    assert len(quantized_sums(graph)) == plan["quantized"]["adds"]
    others = [node for node in graph.node if node.op_type == "Conv" and not backbone(node)]
    assert len(others) == 1  # the part convolution
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = next(t for t in graph.initializer if t.name == node.input[2])
            assert zero.data_type == onnx.TensorProto.INT8
            assert not numpy_helper.to_array(zero).any()


def test_the_manifest_tells_how_it_was_learned(quantized, photographs):
    manifest = quantized.manifest
    for graph in GRAPHS:
        plan = manifest.precision[graph]
        assert plan["type"] == "int8"
        assert plan["operators"]["Conv"].keys() == {"float16"}
        sha256 = plan["calibration"]["sha256"]
        assert len(sha256) == 64
        # Each is what was given, and none is the default.
        expected = {
            "method": "percentile", "max_drop": 0.3, "min_box_iou": 0.25, "seed": 3, "images": 9,
        }  # fmt: skip
        assert {key: plan["calibration"].get(key) for key in expected} == expected
        assert photographs.name not in json.dumps(plan["calibration"])
    assert any("expert_2: " in line and " layers in INT8" in line for line in quantized.lines)


def test_the_bundle_predicts_on_a_cpu_nearly_as_the_model(quantized):
    wanted = reference_tensors(quantized.model, quantized.frames)["logits_1"]
    with Pipeline.open(quantized.path, device="cpu", backend="onnxruntime") as pipeline:
        found = pipeline.run(quantized.frames)["logits_1"]
    # A code's step is 1/127 of the range, which is some eight deviations of an activation: 6 % of one, and its rounding
    # error 2 %. Weights add 1 %. Over 14 layers that is 8 %; the largest of 50 differences may be twice that.
    assert 1e-4 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.15


@pytest.mark.usefixtures("traced_once")
def test_twice_the_same_folder_gives_the_same_bytes(quantized, export_int8, photographs, tmp_path):
    # Its name and the dates of its files are no part of what is learned.
    renamed = tmp_path / "renamed"
    shutil.copytree(photographs, renamed, copy_function=shutil.copyfile)
    export_int8(renamed, tmp_path / "again.plan")
    assert (tmp_path / "again.plan").read_bytes() == quantized.path.read_bytes()


def test_a_graph_that_is_not_what_was_quantized_is_refused(quantized):
    model = onnx.load(quantized.folder / "expert_2.onnx")
    nodes = quantized_nodes(model.graph)

    def refused(message, nodes=nodes, model=model):
        with pytest.raises(ExportError, match=rf"expert_2: {message}"):
            check_quantization("expert_2", model, nodes)

    check_quantization("expert_2", model, nodes)
    refused("no node 'other' in the graph; expected it", {*nodes, "other"})
    for node in nodes:
        refused(rf"(Conv|Add) '{node}' reads a DequantizeLinear at inputs \[0, 1\]; expected \[\]", nodes - {node})
    relu = next(node for node in model.graph.node if node.op_type == "Relu").name
    refused(rf"Relu '{relu}' reads a DequantizeLinear at inputs \[\]; expected \[0, 1\]", {*nodes, relu})
    residual = is_residual_sum(model.graph)
    for node in model.graph.node:  # sums of heads and crop
        if node.op_type == "Add" and not residual(node):
            refused(
                rf"Add '{node.name}' reads a DequantizeLinear at inputs \[0\]", model=with_pair(model, node.name, 0)
            )
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm").name
    refused(rf"Gemm '{gemm}' reads a DequantizeLinear", model=with_pair(model, gemm, 0))
    coded = with_pair(model, gemm, 0)
    next(node for node in coded.graph.node if node.name == gemm).input[0] = "coded"
    refused(rf"Gemm '{gemm}' reads a QuantizeLinear", model=coded)
    put_out = with_pair(model, gemm, 0)
    next(node for node in put_out.graph.node if node.name == gemm).input[0] = "gate"
    put_out.graph.output.append(onnx.ValueInfoProto(name="decoded"))
    refused("a DequantizeLinear makes the output 'decoded'; expected none", model=put_out)


def test_int8_without_images_is_a_defect_of_the_caller(tiny, tmp_path):
    model = tiny.make_model(experts=1)
    images = generated_images(model.config.preprocess, 1)
    with pytest.raises(ValueError, match="int8 needs them"):
        export_bundle(model, tmp_path / "x.plan", Precision.INT8, images)
    request = Int8Request(CalibrationImages(np.zeros((1, 64, 64, 3), np.uint8), "0" * 64, "a test"), Int8Options())
    with pytest.raises(ValueError, match="belong to int8"):
        export_bundle(model, tmp_path / "x.plan", Precision.FP16, images, int8=request)


@pytest.mark.usefixtures("traced_once")
def test_a_graph_whose_box_moves_too_far_stays_in_half_and_says_so(centered, photographs, tmp_path, monkeypatch):
    model, frames = centered
    calibration = read_calibration_images(photographs, model.config.preprocess, limit=0, seed=0, few=True)
    request = Int8Request(calibration, Int8Options("max"))
    monkeypatch.setattr(Agreement, "within", lambda agreement, *_: not agreement.box_iou)  # expert 1 alone moves a box
    images = find_verify_images(photographs, model.config.preprocess, 0)
    path = tmp_path / "mge.plan"
    result = export_bundle(model, path, Precision.INT8, images, int8=request, allow_mismatch=True, say=lambda _: None)
    kinds = {name: plan["type"] for name, plan in result.manifest.precision.items()}
    assert kinds["expert_1"] == "fp16"
    assert kinds["expert_2"] == "int8"
    assert result.manifest.precision["expert_1"]["quantized"]["convolutions"] == 0
    with Pipeline.open(path, device="cpu") as pipeline:
        found = pipeline.run(frames)
    assert np.isfinite(found["logits"]).all()


def test_an_export_in_which_nothing_can_be_quantized_says_so(tiny, photographs, monkeypatch):
    model = tiny.make_model(1, size=32)
    graphs = [export_graph(graph) for graph in build_graphs(model, Precision.INT8)]
    images = read_calibration_images(photographs, model.config.preprocess, limit=2, seed=0, few=True)
    monkeypatch.setattr(Agreement, "within", lambda *_: False)
    with pytest.raises(ExportError, match=r"no graph .* --max-drop 0.5 points and --min-box-iou 0.9; .*--fp16"):
        quantize_graphs(graphs, [], model.config.crops, Int8Request(images, Int8Options()), lambda _: None)


def test_layers_of_the_expert_and_of_the_gate_are_told_apart(centered, remembered):
    model = remembered(build_graphs(centered[0], Precision.INT8)[1]).model
    names = [layer.name for layer in find_layers(model, is_backbone_weight)]
    assert len(names) == len(set(names))
    assert {"conv1.0", "gate.conv1.0"} <= set(names)


def test_the_chain_in_one_graph_computes_bit_for_bit_as_the_runtime(quantized):
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in integer_entries().items():
        options.add_session_config_entry(key, value)
    chain = onnxruntime.InferenceSession(quantized.folder / "chain.onnx", options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in chain.get_outputs()]
    computed = dict(zip(names, chain.run(names, {"frame": quantized.frames}), strict=True))
    with Pipeline.open(quantized.path, device="cpu", threads=1) as pipeline:
        for name, tensor in pipeline.run(quantized.frames).items():
            if name in computed:
                np.testing.assert_array_equal(computed[name], tensor, err_msg=name)
    assert [entry.version for entry in onnx.load(quantized.folder / "chain.onnx").opset_import] == [19]
