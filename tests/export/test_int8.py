"""INT8 from a checkpoint to a bundle: what is quantised, what never is, and that TensorRT-RTX takes it."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

from mge.checkpoint import save_checkpoint
from mge_calibration.int8.images import MIN_IMAGES, read_calibration_images
from mge_calibration.int8.stage import Int8Options
from mge_export.cli import main
from mge_export.export import export_bundle
from mge_export.graph import export_graph
from mge_export.images import find_verify_images
from mge_export.int8 import Int8Request, check_quantization, is_trunk_weight, quantize_graphs
from mge_export.precision import Precision
from mge_export.stages import build_stages
from mge_runtime.bundle import Bundle, StageModel, write_bundle
from mge_runtime.errors import BuildError, ExportError, InputError
from mge_runtime.pipeline import Pipeline
from mge_runtime.trt.attest import attest_engine

TRUNKS = ("expert_1", "expert_2", "gate")


@pytest.fixture(scope="module")
def quantised(tiny, photographs, tmp_path_factory):
    """A model of two experts in INT8: bundle, graphs and what was said."""
    folder = tmp_path_factory.mktemp("int8")
    model = tiny.make_model()
    frames = tiny.load_frames(photographs, model.config.preprocess)
    tiny.center_heads(model, frames)
    images = find_verify_images(photographs, model.config.preprocess, 0)
    calibration = read_calibration_images(photographs, model.config.preprocess, limit=0, seed=0, few=True)
    request = Int8Request(calibration, Int8Options("max", max_drop=0.2))
    lines = []
    # Ten photographs and untrained heads decide closely: what is held here is the graph, not the agreement.
    result = export_bundle(
        model, folder / "mge.plan", Precision.INT8, images, int8=request, allow_mismatch=True, say=lines.append
    )
    with Bundle.open(result.path) as bundle:
        bundle.extract(folder)
    names = [stage.name for stage in result.manifest.stages]
    graphs = {name: onnx.load(folder / "onnx" / f"{name}.onnx").graph for name in names}
    return SimpleNamespace(
        model=model, result=result, path=result.path, folder=folder / "onnx", graphs=graphs, lines=lines,
        images=images, request=request, frames=frames,
    )  # fmt: skip


def producers(graph):
    return {output: node for node in graph.node for output in node.output}


def walk(graph, start, stop):
    """All nodes behind a tensor, not beyond those that `stop` says."""
    made, seen, todo = producers(graph), {}, [start]
    while todo:
        node = made.get(todo.pop())
        if node is None or node.name in seen:
            continue
        seen[node.name] = node
        if not stop(node):
            todo += node.input
    return list(seen.values())


def is_trunk_convolution(graph):
    """A convolution of the trunk: its weight is one, or is decoded from one."""
    made = producers(graph)

    def judge(node):
        if node.op_type != "Conv":
            return False
        weight = node.input[1]
        if weight in made:
            weight = made[weight].input[0].removesuffix("_quantized")
        return is_trunk_weight(weight)

    return judge


def quantised_convolutions(graph):
    made = producers(graph)
    return [
        node
        for node in graph.node
        if node.op_type == "Conv"
        and all(name in made and made[name].op_type == "DequantizeLinear" for name in node.input[:2])
    ]


def test_the_picture_and_what_is_cut_from_it_pass_no_quantisation(quantised):
    graph = quantised.graphs["expert_1"]
    trunk = is_trunk_convolution(graph)
    assert [t.name for t in graph.output] == ["logits_1", "answer_1", "heatmap_1", "box_1", "image_2"]
    residual = {"DequantizeLinear", "QuantizeLinear"}
    for output in ("box_1", "heatmap_1", "image_2"):
        # Back to the trunk's last layers, a residual sum among them, which read what was quantised before them.
        behind = walk(graph, output, lambda node: trunk(node) or node.op_type == "DequantizeLinear")
        assert any(trunk(node) or node.op_type == "DequantizeLinear" for node in behind)
        readers = {
            name for node in behind if node.op_type not in ("Conv", "Add", "DequantizeLinear") for name in node.input
        }
        assert not any(n.op_type in residual and set(n.output) & readers for n in graph.node), output
    # The pixels themselves: from the crop to the image without the trunk's answer, there is no Q/DQ on any way.
    pixels, todo = set(), ["image_1"]
    while todo:  # forward from the image, past all but the trunk
        tensor = todo.pop()
        for node in graph.node:
            if tensor in node.input and node.op_type not in ("Cast", "QuantizeLinear", "Shape"):
                pixels |= {node.op_type}
                todo += [name for name in node.output if name not in pixels]
                pixels |= set(node.output)
    assert "image_2" in pixels
    assert "GatherElements" in pixels
    assert not pixels & {"QuantizeLinear", "DequantizeLinear", "Conv"}
    gathers = [node for node in graph.node if node.op_type == "GatherElements"]
    assert "image_1" in {node.input[0] for node in gathers}


@pytest.mark.parametrize("stage", TRUNKS)
def test_trunks_alone_are_quantised(quantised, stage):
    graph = quantised.graphs[stage]
    plan = quantised.result.manifest.precision[stage]
    trunk = is_trunk_convolution(graph)
    found = quantised_convolutions(graph)
    assert len(found) == plan["quantized"]["convolutions"] > 0
    assert all(trunk(node) for node in found)
    left = [node for node in graph.node if trunk(node) and node not in found]
    sums = sum(name.startswith("add ") for name in plan["quantized"]["left_float"])
    assert len(left) == len(plan["quantized"]["left_float"]) - sums
    assert len(found) + len(left) == 14  # of resnet10t: three of the stem, two of each block, the shortcuts'
    made = producers(graph)
    adds = [
        n for n in graph.node if n.op_type == "Add" and made.get(n.input[0]) and "Dequant" in made[n.input[0]].op_type
    ]
    assert len(adds) == plan["quantized"]["adds"]
    others = [node for node in graph.node if node.op_type == "Conv" and not trunk(node)]
    assert len(others) == (stage != "gate")  # the part convolution
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = next(t for t in graph.initializer if t.name == node.input[2])
            assert zero.data_type == onnx.TensorProto.INT8
            assert not numpy_helper.to_array(zero).any()


def test_the_manifest_tells_how_it_was_learned(quantised):
    manifest = quantised.result.manifest
    for stage in TRUNKS:
        plan = manifest.precision[stage]
        assert plan["type"] == "int8"
        assert plan["operators"]["Conv"].keys() == {"float16"}
        learned = plan["calibration"]
        assert learned["method"] == "max"
        assert learned["images"] == 10
        assert learned["seed"] == 0
        assert learned["sha256"] == quantised.request.images.sha256
        assert len(learned["sha256"]) == 64
    assert manifest.precision["ingest"]["type"] == manifest.precision["mixture"]["type"] == "fp32"
    assert any("expert_2: " in line and " layers in INT8" in line for line in quantised.lines)


def test_the_bundle_answers_on_a_cpu_nearly_as_the_model(quantised):
    import torch

    from mge.data.folder import normalize

    images = torch.stack([normalize(frame, quantised.model.config) for frame in quantised.frames])
    with torch.no_grad():
        wanted = quantised.model(images).experts[0].logits.numpy()
    with Pipeline.open(quantised.path, device="cpu", backend="onnxruntime") as pipeline:
        found = pipeline.run(quantised.frames)["logits_1"]
    assert 1e-4 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.15


def test_twice_the_same_folder_gives_the_same_bytes(tiny, photographs):
    model = tiny.make_model(experts=1)
    stages = build_stages(model, Precision.INT8)
    graphs = {stage.spec.name: export_graph(stage) for stage in stages}

    def quantise(seed):
        images = read_calibration_images(photographs, model.config.preprocess, limit=6, seed=seed, few=True)
        request = Int8Request(images, Int8Options(max_drop=0.2, seed=seed))
        ((name, (graph, learned)),) = quantize_graphs(stages, graphs, request, lambda _: None).items()
        assert name == "expert_1"
        return graph.model.SerializeToString(deterministic=True), graph.weights, learned

    once = quantise(0)
    assert quantise(0) == once
    assert quantise(1)[0] != once[0]


def test_a_graph_with_another_number_of_quantised_convolutions_is_refused(quantised):
    model = onnx.load(quantised.folder / "gate.onnx")
    count = len(quantised_convolutions(model.graph))
    check_quantization("gate", model, count)
    with pytest.raises(
        ExportError, match=rf"gate: {count} convolutions read two DequantizeLinear; expected {count + 1}"
    ):
        check_quantization("gate", model, count + 1)
    reader = next(node for node in model.graph.node if node.op_type == "Gemm")
    reader.input[0] = next(node for node in model.graph.node if node.op_type == "DequantizeLinear").output[0]
    with pytest.raises(ExportError, match=r"gate: .*Gemm.* read .*; expected Conv and Add"):
        check_quantization("gate", model, count)


def test_int8_without_images_is_a_defect_of_the_caller(quantised, tmp_path):
    with pytest.raises(ValueError, match="int8 needs them"):
        export_bundle(quantised.model, tmp_path / "x.plan", Precision.INT8, quantised.images)
    with pytest.raises(ValueError, match="belong to int8"):
        export_bundle(quantised.model, tmp_path / "x.plan", Precision.FP16, quantised.images, int8=quantised.request)


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")
    from mge_runtime.trt.vendor import load_vendor

    return load_vendor("tensorrt-rtx")


def build_all(path, vendor, capabilities):
    from mge_runtime.trt.batch import BatchRange
    from mge_runtime.trt.build import ahead_of_time, build_engines
    from mge_runtime.trt.builder import BuildOptions

    with Bundle.open(path) as bundle:
        (target,) = ahead_of_time(vendor, capabilities)
        options = BuildOptions(BatchRange.parse("1,2,8"))
        with build_engines(bundle, vendor, target, gpu=None, options=options) as new:
            return {stage: plan.stat().st_size for stage, plan in new.plans.items()}, new.details


@pytest.mark.parametrize("capability", ["sm86", "sm120"])
def test_the_real_builder_takes_every_stage(quantised, rtx, capability):
    sizes, details = build_all(quantised.path, rtx, [capability])
    assert set(sizes) == {"ingest", *TRUNKS, "mixture"}
    for stage in TRUNKS:
        assert details.precision[stage]["attested"] == "network"
        assert details.precision[stage]["type"] == "int8"
        assert details.precision[stage]["layers"]["CONVOLUTION"] == {"float16": 14 + (stage != "gate")}


@pytest.mark.parametrize("stage", TRUNKS)
def test_in_the_parsed_network_quantised_convolutions_read_two_dequantize_layers(quantised, rtx, stage):
    from mge_runtime.trt.network import parse_stage

    path = quantised.folder / f"{stage}.onnx"
    parsed = parse_stage(rtx, quantised.result.manifest.stage(stage), path.read_bytes(), path)
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    made = {layer.get_output(0).name: layer.type.name for layer in layers}
    both = [
        layer
        for layer in layers
        if layer.type.name == "CONVOLUTION"
        and layer.num_inputs > 1
        and [made.get(layer.get_input(index).name) for index in (0, 1)] == ["DEQUANTIZE", "DEQUANTIZE"]
    ]
    assert len(both) == len(quantised_convolutions(quantised.graphs[stage]))


def test_a_bundle_that_tells_of_more_than_it_has_is_not_built(quantised, rtx, tmp_path):
    manifest = quantised.result.manifest
    models = {}
    for stage in manifest.stages:
        weights = quantised.folder / f"{stage.name}.weights"
        models[stage.name] = StageModel(quantised.folder / f"{stage.name}.onnx", weights if weights.exists() else None)
    plan = manifest.precision["gate"]
    told = {**plan, "quantized": {**plan["quantized"], "convolutions": 99}}
    write_bundle(
        tmp_path / "x.plan", dataclasses.replace(manifest, precision={**manifest.precision, "gate": told}), models
    )
    with pytest.raises(BuildError, match=r"stage gate: \d+ convolutions read two DequantizeLinear; expected 99"):
        build_all(tmp_path / "x.plan", rtx, ["sm86"])


def inspected(*kinds):
    """What an engine inspector says of convolutions, one for each (input, weights, output), in TensorRT 11's words."""
    layers = [
        {
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "DataType": read}],
            "Outputs": [{"Name": "y", "DataType": put}],
            "Weights": {"Type": weights, "Count": 9},
        }
        for read, weights, put in kinds
    ]
    return json.dumps({"Layers": layers})


def test_an_engines_convolutions_are_int8_or_half():
    plan = {"type": "int8", "operators": {"Conv": {"float16": 2}}}
    found = attest_engine("s", inspected(("Int8", "Int8", "Float"), ("Half", "Half", "Half")), plan)
    assert found is not None
    with pytest.raises(BuildError, match="1 convolutions compute in float32; expected float16"):
        attest_engine("s", inspected(("Int8", "Int8", "Int8"), ("Float", "Float", "Float")), plan)
    with pytest.raises(BuildError, match="1 convolutions compute in int8; expected float16"):
        attest_engine("s", inspected(("Int8", "Int8", "Half")), {"type": "fp16"})


def save_pictures(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")


def test_calibration_images_are_sorted_drawn_by_seed_and_hashed(tiny, tmp_path):
    preprocess = tiny.make_model().config.preprocess
    save_pictures(tmp_path / "a", 12)
    read = lambda limit, seed: read_calibration_images(tmp_path, preprocess, limit=limit, seed=seed, few=True)  # noqa: E731
    assert np.array_equal(read(5, 0).frames, read(5, 0).frames)
    assert read(5, 0).sha256 == read(5, 0).sha256
    assert read(5, 0).sha256 != read(5, 1).sha256
    assert read(0, 0).sha256 == read(0, 1).sha256  # nothing to draw
    assert len(read(0, 0).frames) == 12
    before = read(0, 0).sha256
    (tmp_path / "a/3.png").write_bytes((tmp_path / "a/4.png").read_bytes())
    assert read(0, 0).sha256 != before


def test_a_damaged_image_is_left_out_and_said(tiny, tmp_path):
    save_pictures(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(b"no picture")
    lines = []
    preprocess = tiny.make_model().config.preprocess
    found = read_calibration_images(tmp_path, preprocess, limit=0, seed=0, few=True, say=lines.append)
    assert len(found.frames) == 2
    assert len(lines) == 1
    assert "1.png" in lines[0]


def test_too_few_images_are_refused(tiny, tmp_path):
    save_pictures(tmp_path / "few", MIN_IMAGES - 1)
    preprocess = tiny.make_model().config.preprocess
    with pytest.raises(InputError, match=r"few gave 99 images to calibrate on; expected at least 100"):
        read_calibration_images(tmp_path / "few", preprocess, limit=0, seed=0)
    save_pictures(tmp_path / "few", MIN_IMAGES)
    assert len(read_calibration_images(tmp_path / "few", preprocess, limit=0, seed=0).frames) == MIN_IMAGES


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "best.pt"
    save_checkpoint(path, tiny.make_model())
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8"], "--int8 learns ranges from photographs and none were named: add --calib-data DIR"),
        (["--calib-data", "{few}"], "--calib-data is for --int8, which was not asked for"),
        (["--int8", "--calib-data", "{nowhere}"], "nowhere is nothing; expected a folder of images to calibrate on"),
        (["--int8", "--calib-data", "{file}"], "1.png is a file; expected a folder of images to calibrate on"),
        (["--int8", "--calib-data", "{empty}"], "empty"),
        (["--int8", "--calib-data", "{few}"], "gave 3 images to calibrate on; expected at least 100"),
        (["--int8", "--calib-data", "{damaged}", "--force-few-images"], "gave 0 images to calibrate on"),
    ],
    ids=["no-data", "data-alone", "missing", "file", "empty", "few", "damaged"],
)
def test_bad_input_is_one_line_and_nothing_is_written(checkpoint, tmp_path, arguments, message):
    save_pictures(tmp_path / "few", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/1.png").write_bytes(b"no picture")
    places = {name: str(tmp_path / name) for name in ("few", "empty", "damaged", "nowhere")}
    places["file"] = str(tmp_path / "few/1.png")
    out = tmp_path / "out"
    out.mkdir()
    arguments = [argument.format(**places) for argument in arguments]
    found = CliRunner().invoke(main, ["--ckpt", str(checkpoint), "-o", str(out / "mge.plan"), *arguments])
    assert found.exit_code == (2 if message.startswith("--") else 1)
    last = found.output.strip().splitlines()[-1]
    assert message in last
    assert list(out.iterdir()) == []
