"""Two small graphs: each a backbone of a stem, a residual block and a head; the first makes the image of the second.

The first one's box is no crop, but it depends on the backbone, and moves with it.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mge_calibration.int8.cpu import cpu_graph
from mge_calibration.int8.insert import find_layers, insert_quantization, quantize_weight
from mge_calibration.int8.quantize import Agreement, Int8Options, quantize_chain, quantize_graph, relative_error
from mge_calibration.int8.ranges import open_graph, run_all
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.compare import box_iou
from mge_runtime.manifest import Crops, GraphSpec, TensorSpec

SIZE, WIDTH, CLASSES = 16, 8, 4
HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT


def is_backbone(name):
    return name.startswith("backbone.")


def make_graph(k, *, last, loud=1.0):
    """Image [B, 3, S, S] to logits [B, C] and, unless it is the last, a dimmed middle of the image as the next one.

    One output channel's weight of the block is `loud` times larger than the others.
    """
    random = np.random.default_rng(k)
    half = lambda *shape: random.normal(0, 0.4, shape).astype(np.float16)  # noqa: E731
    block = half(WIDTH, WIDTH, 3, 3) * np.float16(0.5)
    block[0] *= np.float16(loud)
    constants = {
        "backbone.stem.weight": half(WIDTH, 3, 3, 3),
        "backbone.stem.bias": half(WIDTH),
        "backbone.block.weight": block,
        "part.weight": half(WIDTH, WIDTH, 1, 1),
        "head": random.normal(0, 1, (WIDTH, CLASSES)).astype(np.float32),
        "offset": np.zeros(CLASSES, np.float32),
        "zero": np.zeros((), np.float16),
        "six": np.full((), 6, np.float16),
        "low": np.array([4, 4], np.int64),
        "high": np.array([12, 12], np.int64),
        "axes": np.array([2, 3], np.int64),
        "sizes": np.array([1, 1, 2, 2], np.float32),
    }
    same = {"pads": [1, 1, 1, 1]}
    node = helper.make_node
    nodes = [
        node("Cast", [f"image_{k}"], ["half"], name="n_cast", to=HALF),
        node("Conv", ["half", "backbone.stem.weight", "backbone.stem.bias"], ["stem"], name="n_stem", **same),
        node("Clip", ["stem", "zero", "six"], ["clipped"], name="n_clip"),
        node("Conv", ["clipped", "backbone.block.weight"], ["block"], name="n_block", **same),
        node("Add", ["clipped", "block"], ["sum"], name="n_add"),
        node("Relu", ["sum"], ["features"], name="n_relu"),
        node("Conv", ["features", "part.weight"], ["parts"], name="n_part"),
        node("Cast", ["parts"], ["wide"], name="n_wide", to=FULL),
        node("ReduceMean", ["wide", "axes"], ["pooled"], name="n_pool", keepdims=0),
        node("MatMul", ["pooled", "head"], ["seen"], name="n_head"),
        node("Tanh", ["seen"], ["bent"], name="n_bend"),
        node("Add", ["seen", "bent"], ["sums"], name="n_sum_of_the_head"),  # no residual sum
        node("Add", ["sums", "offset"], [f"logits_{k}"], name="n_offset"),
    ]
    outputs = [helper.make_tensor_value_info(f"logits_{k}", FULL, ["batch", CLASSES])]
    specs = [TensorSpec(f"logits_{k}", "float32", ("batch", CLASSES))]
    if not last:
        nodes += [
            node("ReduceMax", ["wide", "axes"], ["peak"], name="n_peak"),
            node("Reshape", ["peak", "shape"], ["flat"], name="n_flat"),
            node("ReduceMax", ["flat", "one"], ["top"], name="n_top"),
            node("Slice", [f"image_{k}", "low", "high", "axes"], ["middle"], name="n_slice"),
            node("Resize", ["middle", "", "sizes"], ["large"], name="n_resize", mode="linear"),
            node("Mul", ["large", "top"], [f"image_{k + 1}"], name="n_mul"),  # so it depends on the backbone, as a crop
            node("Sigmoid", [f"logits_{k}"], ["positive"], name="n_positive"),
            node("MatMul", ["positive", "right"], ["moved"], name="n_moved"),
            node("Add", ["moved", "least"], [f"box_{k}"], name="n_box"),
        ]
        right = np.zeros((CLASSES, 4), np.float32)
        right[0, 2] = SIZE - 4
        constants |= {
            "shape": np.array([0, WIDTH, 1, 1], np.int64),
            "one": np.array([1], np.int64),
            "right": right,
            "least": np.array([0, 0, 2, SIZE], np.float32),
        }
        outputs.append(helper.make_tensor_value_info(f"box_{k}", FULL, ["batch", 4]))
        specs.append(TensorSpec(f"box_{k}", "float32", ("batch", 4)))
        outputs.append(helper.make_tensor_value_info(f"image_{k + 1}", FULL, ["batch", 3, SIZE, SIZE]))
        specs.append(TensorSpec(f"image_{k + 1}", "float32", ("batch", 3, SIZE, SIZE)))
    image = helper.make_tensor_value_info(f"image_{k}", FULL, ["batch", 3, SIZE, SIZE])
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, f"expert_{k}", [image], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return GraphSpec(
        f"expert_{k}", (TensorSpec(f"image_{k}", "float32", ("batch", 3, SIZE, SIZE)),), tuple(specs), f"logits_{k}"
    ), model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(9).normal(0, 1, (40, 3, SIZE, SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def graph():
    return make_graph(1, last=False)


def quantize(model, images, classes=lambda out: out["logits_1"].argmax(1), **options):
    """A graph alone, judged by the classes that follow from its outputs."""
    options = Int8Options(**options)
    wanted = run_all(open_graph(model), {"image_1": images})

    def judge(run):
        found = run_all(run, {"image_1": images})
        changed = int((classes(found) != classes(wanted)).sum())
        agreement = Agreement(len(images), changed, {}, relative_error(found, wanted, ["logits_1"]))
        return agreement, agreement.within(options.max_drop, {})

    return quantize_graph(model, is_backbone, {"image_1": images}, judge, options)


@pytest.fixture(scope="module")
def quantized(graph, images):
    return quantize(graph[1], images, max_drop=0.2)


def test_the_backbone_is_symmetric_int8_and_the_rest_reads_what_it_read(graph, quantized):
    model = quantized.model
    assert [layer.node for layer in quantized.layers] == ["n_stem", "n_block", "n_add"]
    onnx.checker.check_model(model, full_check=True)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) == 2 * 3 + 2  # of half, clipped (read by two layers) and block; and two weights
    for node in pairs:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
        assert values[node.input[1]].dtype == np.float16
    assert values["backbone.block.weight_scale"].shape == (WIDTH,)
    assert values["backbone.stem.weight_bias"].dtype == np.float16  # biases are not quantized
    assert "backbone.block.weight" not in values  # its codes alone are kept
    chosen = {layer.node for layer in quantized.layers}
    before = {node.name: list(node.input) for node in graph[1].graph.node if node.name not in chosen}
    assert {node.name: list(node.input) for node in model.graph.node if node.name in before} == before


def test_a_weight_is_coded_by_channel():
    weight = np.array([[1.0, -0.5], [0.001, 0.0005], [0, 0]], np.float32).reshape(3, 2, 1, 1)
    codes, scales = quantize_weight(weight)
    assert codes.reshape(3, 2).tolist() == [[127, -64], [127, 64], [0, 0]]
    assert scales.shape == (3,)
    assert (scales > 0).all()


def test_the_worst_layer_stays_float_and_is_named(images):
    # One channel of the block dwarfs the others, which lose their digits where its sum is quantized.
    _, model = make_graph(1, last=False, loud=300)

    def fine_classes(outputs):
        """Steps of a hundredth of the largest logit: they change where a class would not."""
        return np.rint(outputs["logits_1"][:, 0] * 100 / np.abs(outputs["logits_1"]).max())

    found = quantize(model, images, fine_classes, method="max", max_drop=0.1)
    assert found.all_layers.same_class < 0.9
    assert found.agreement.same_class >= 0.9
    assert [layer.name for layer in found.left] == list(found.sensitivity)[: len(found.left)]
    assert found.left[0].name == max(found.sensitivity, key=found.sensitivity.get)
    assert found.to_dict()["left_float"] == [layer.name for layer in found.left]
    assert {layer.node for layer in (*found.left, *found.layers)} == {"n_stem", "n_block", "n_add"}
    assert found.layers


def test_the_second_graph_is_calibrated_on_what_the_first_one_really_makes(images):
    (first, model_1), (second, model_2) = make_graph(1, last=False), make_graph(2, last=True)
    models = {"expert_1": model_1, "expert_2": model_2}
    options = Int8Options(method="max", max_drop=0.5, min_box_iou=0.5)
    done = quantize_chain([first, second], models, ["box_1"], Crops((SIZE, SIZE)), is_backbone, images, options)
    largest, floats = (
        np.abs(open_graph(model)({"image_1": images})["image_2"]).max() for model in (done["expert_1"].model, model_1)
    )
    scale = next(t for t in done["expert_2"].model.graph.initializer if t.name == "half_scale")
    # The range is that of the crop in half; a scale has eleven bits.
    assert float(numpy_helper.to_array(scale)) == np.float16(largest / 127) != np.float16(floats / 127)


@pytest.fixture(scope="module")
def chain(images):
    """A chain whose classes are close, so that some change, and whose box moves."""
    (first, model_1), (second, model_2) = make_graph(1, last=False, loud=30), make_graph(2, last=True, loud=100)
    made = {"image_1": images}
    for k, model in enumerate((model_1, model_2), 1):
        logits = run_all(open_graph(model), made)[f"logits_{k}"]
        offset = next(tensor for tensor in model.graph.initializer if tensor.name == "offset")
        offset.CopyFrom(numpy_helper.from_array(-logits.mean(0), "offset"))
        made = run_all(open_graph(model), made)
    return [first, second], {"expert_1": model_1, "expert_2": model_2}


@pytest.mark.parametrize("least", [0.5, 0.995])
def test_layers_stay_float_until_the_chains_box_stays(chain, images, least):
    options = Int8Options(method="max", max_drop=0.9, min_box_iou=least)
    found = quantize_chain(*chain, ["box_1"], Crops((SIZE, SIZE)), is_backbone, images, options)["expert_1"]
    assert 0.5 < found.all_layers.box_iou["box_1"] < 0.995, "with all layers in INT8 the box must move for this test"
    assert bool(found.left) is (least > 0.9)
    run = open_graph(found.model)
    wanted = run_all(open_graph(chain[1]["expert_1"]), {"image_1": images})["box_1"]
    ours = np.median(box_iou(run_all(run, {"image_1": images})["box_1"], wanted))
    assert ours >= least
    assert found.agreement.box_iou["box_1"] == pytest.approx(ours, abs=1e-6)


def test_a_graph_is_judged_by_the_class_at_the_end_of_the_chain(chain, images):
    options = Int8Options(method="max", max_drop=0.9, min_box_iou=0)
    found = quantize_chain(*chain, ["box_1"], Crops((SIZE, SIZE)), is_backbone, images, options)
    models = chain[1]

    def classes(first, second):
        made = run_all(open_graph(first), {"image_1": images})
        return run_all(open_graph(second), {"image_2": made["image_2"]})["logits_2"].argmax(1)

    wanted = classes(*models.values())
    changed = [found[graph].agreement.changed for graph in models]
    assert changed == [
        (classes(found["expert_1"].model, second) != wanted).sum()
        for second in (models["expert_2"], found["expert_2"].model)
    ]
    assert sum(changed) > 0, "or this test says nothing"


@pytest.mark.parametrize(
    ("images", "max_drop", "most"),
    [(122, 0.005, 1), (399, 0.005, 1), (400, 0.005, 2), (1000, 0.011, 11), (1000, 0.009, 9), (10, 0, 0)],
)
def test_limits_are_not_rounded(images, max_drop, most):
    assert Agreement(images, most, {"box_1": 0.95}, 0.0).within(max_drop, {"box_1": 0.95})
    assert not Agreement(images, most, {"box_1": 0.95}, 0.0).within(max_drop, {"box_1": 0.96})
    assert not Agreement(images, most + 1, {"box_1": 0.95}, 0.0).within(max_drop, {"box_1": 0.95})


def test_on_a_cpu_the_backbone_is_integer_and_predicts_alike(graph, images, quantized, tmp_path):
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    fast = cpu_graph(quantized.model, fast=True)
    session = onnxruntime.InferenceSession(fast.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("QLinearConv") == 2
    assert "Clip" not in operators  # its work is done by the codes' own end
    (found, *_) = session.run(["logits_1"], {"image_1": images})
    wanted = run_all(open_graph(graph[1]), {"image_1": images})["logits_1"]
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_a_graph_without_half_or_int8_stays_as_it_is():
    _, model = make_graph(1, last=True)
    wide = cpu_graph(model, fast=False)
    assert cpu_graph(wide, fast=True) == wide
    assert HALF not in {tensor.data_type for tensor in wide.graph.initializer}


def test_weights_in_another_file_stay_there_and_are_widened_by_a_node(images, quantized, tmp_path):
    inside = cpu_graph(quantized.model, fast=True).SerializeToString()
    onnx.save(
        quantized.model, tmp_path / "q.onnx", save_as_external_data=True, location="q.weights", size_threshold=200
    )
    referring = onnx.load(tmp_path / "q.onnx", load_external_data=False)
    (tmp_path / "q.cpu.onnx").write_bytes(cpu_graph(referring, fast=True).SerializeToString())
    onnxruntime = load_onnxruntime()
    found, wanted = (
        onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"image_1": images})
        for source in (tmp_path / "q.cpu.onnx", inside)
    )
    assert all(map(np.array_equal, found, wanted))


def test_only_layers_that_are_asked_for_are_quantized(graph):
    layers = find_layers(graph[1], is_backbone)
    assert insert_quantization(graph[1], [], {}, {}).SerializeToString() == graph[1].SerializeToString()
    alone = insert_quantization(graph[1], [layers[2]], {"clipped": 7, "block": 3}, {})
    assert sum(node.op_type == "DequantizeLinear" for node in alone.graph.node) == 2
    scales = {t.name: float(numpy_helper.to_array(t)) for t in alone.graph.initializer if t.name.endswith("_scale")}
    assert 5.98 < scales["clipped_scale"] * 127 < 6  # no code beyond the clip's end, so that a CPU may drop the clip
    assert scales["block_scale"] == pytest.approx(3 / 127, rel=1e-3)


def test_a_bias_takes_up_what_rounding_its_weight_adds():
    # Inputs of one sign and weights that all round down: the sum of nine products is off by as many halves of a step.
    weight = np.full((1, 1, 3, 3), 0.4 / 127, np.float32)
    weight[0, 0, 1, 1] = 1
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "backbone.weight"], ["y"], name="n_conv")],
        "one",
        [helper.make_tensor_value_info("x", FULL, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", FULL, ["batch", 1, 6, 6])],
        [numpy_helper.from_array(weight, "backbone.weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    x = np.random.default_rng(0).uniform(1, 2, (8, 1, 8, 8)).astype(np.float32)
    wanted = run_all(open_graph(model), {"x": x})["y"]
    (layer,) = find_layers(model, is_backbone)
    ranges, mean = {"x": 2.0}, x.mean((0, 2, 3))
    plain, corrected = (
        run_all(open_graph(insert_quantization(model, [layer], ranges, {"x": values})), {"x": x})["y"] - wanted
        for values in (np.zeros(1), mean)
    )
    assert abs(plain.mean()) > 0.03
    assert abs(corrected.mean()) < abs(plain.mean()) / 20


def test_a_graph_that_stays_mostly_float_stays_float_as_a_whole(graph, images):
    tried = []

    def judge(_):
        tried.append(None)
        return Agreement(len(images), 0, {}, 0.0), len(tried) > 2  # all, all but one: bad; all but two: good

    found = quantize_graph(graph[1], is_backbone, {"image_1": images}, judge, Int8Options())
    assert len(found.left) == 3
    assert found.layers == ()
    assert found.model.SerializeToString() == graph[1].SerializeToString()
