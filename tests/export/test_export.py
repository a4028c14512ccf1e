"""What lies in a bundle: graphs that compute as the model, their precision, the chain in one graph, the manifest."""

import itertools
import json
from importlib.metadata import version

import numpy as np
import onnx
import pytest
import torch
from packaging.version import Version

from mge_export.chain import write_chain
from mge_export.graph import ALIGNMENT
from mge_export.images import find_verify_images, generated_images
from mge_export.precision import Precision, check_precision, infer_types
from mge_export.runners import reference_tensors
from mge_runtime import Pipeline
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bench_subject import Images, open_subject
from mge_runtime.bundle import Bundle
from mge_runtime.compare import box_area
from mge_runtime.errors import ExportError, InputError
from mge_runtime.prediction import softmax
from mge_runtime.sources import find_images
from tests.helpers.engines import BACKENDS, CHECKS, open_on_gpu, selfcheck

onnxruntime = load_onnxruntime()


def test_a_bundle_predicts_as_its_model(exported):
    """In a batch and one by one; boxes move with the image, as those of a map frozen to the trace's example do not."""
    half, wanted = exported.precision is Precision.FP16, reference_tensors(exported.model, exported.frames)
    with Pipeline.open(exported.path, device="cpu", threads=1) as pipeline:
        found = pipeline.run(exported.frames)
        for number, frame in enumerate(exported.frames):
            alone = pipeline.run(frame[None])
            np.testing.assert_allclose(alone["logits"][0], found["logits"][number], rtol=1e-3, atol=1e-4)
            np.testing.assert_array_equal(alone["box_1"][0], found["box_1"][number])
    largest = np.abs(wanted["logits"]).max()
    second, best = np.sort(wanted["logits"], 1)[:, -2:].T
    # A near tie may fall either way, and another box is another image for the next expert.
    clear = (best - second > (0.05 if half else 1e-4) * largest) & (found["box_1"] == wanted["box_1"]).all(1)
    assert clear.sum() >= 5
    np.testing.assert_array_equal(found["logits"].argmax(1)[clear], wanted["logits"].argmax(1)[clear])
    np.testing.assert_allclose(found["box_1"], wanted["box_1"], atol=2 if half else 0)
    np.testing.assert_allclose(found["gate"], wanted["gate"], atol=5e-3 if half else 1e-5)
    for name in ("logits_1", "heatmap_1"):
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=(2e-2 if half else 1e-5) * scale)
    assert len(set(wanted["logits"].argmax(1))) > 1
    assert len({tuple(box) for box in wanted["box_1"]}) > 3
    assert np.median(box_area(wanted["box_1"])) < 0.9 * exported.model.config.image_size**2


def test_graphs_have_dynamic_batches_exact_names_and_no_operator_that_tensorrt_refuses(exported):
    refused = {"NonZero", "ScatterElements", "ScatterND", "RoiAlign", "AffineGrid", "Loop", "If", "OneHot"}
    for spec in (expert.spec for expert in exported.experts):
        graph = exported.graphs[spec.name].graph
        assert [tensor.name for tensor in graph.input] == [tensor.name for tensor in spec.inputs]
        assert [tensor.name for tensor in graph.output] == [tensor.name for tensor in spec.outputs]
        for tensor in (*graph.input, *graph.output):
            first, *others = tensor.type.tensor_type.shape.dim
            assert first.dim_param == "batch"
            assert all(axis.dim_value > 0 for axis in others)
        assert not refused & {node.op_type for node in graph.node}
        readers = [node.op_type for node in graph.node if "frame" in node.input]
        assert readers == ["Cast"], "uint8 must be cast before anything else"


def test_onnx_runtime_normalizes_channels_first(exported, tmp_path):
    """It would move a transposition behind broadcasts along channels, which take ten times as long channels last."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(exported.folder / "expert_1.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    (cast,) = (node for node in nodes if "frame" in node.input)
    readers = {node.op_type for node in nodes if cast.output[0] in node.input}
    assert readers - {"Shape", "Size"} == {"Transpose"}


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"),
    reason="older exporters read the batch's size in more places: on CUDA such graphs run in NCHW",
)
def test_nothing_lies_between_a_shape_and_what_reads_it_on_the_host(exported):
    """ONNX Runtime puts such a node on the GPU when it turns the layout to NHWC, between copies, and captures nothing.

    Which inputs CUDA's kernels read on the host: ONNX Runtime's `InputMemoryType(OrtMemTypeCPUInput, ...)`.
    """
    on_host = {"Range": (0, 1, 2), "Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Slice": (1, 2, 3, 4)}
    counted = 0
    for name, model in exported.graphs.items():
        shapes = {node.output[0] for node in model.graph.node if node.op_type in ("Shape", "Size")}
        for node in model.graph.node:
            read = [position for position, tensor in enumerate(node.input) if tensor in shapes]
            assert set(read) <= set(on_host.get(node.op_type, ())), f"{name}: {node.op_type} reads a shape on the GPU"
            counted += len(read)
    assert counted, "the crop numbers the images of a batch"


def test_weights_lie_aligned_outside_the_graph_and_no_path_of_this_machine_inside(exported):
    for name, model in exported.graphs.items():
        data = model.SerializeToString()
        assert len(data) < 60_000
        assert b"site-packages" not in data
        assert b".py" not in data
        places = [
            {entry.key: entry.value for entry in tensor.external_data}
            for tensor in model.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        ]
        assert all(place["location"] == f"{name}.weights" for place in places)
        assert all(int(place["offset"]) % ALIGNMENT == 0 for place in places)
        spans = sorted((int(place["offset"]), int(place["offset"]) + int(place["length"])) for place in places)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_the_precision_plan_is_read_from_the_graphs(exported):
    wanted = exported.precision.onnx_name
    plans = exported.result.manifest.precision
    for name in ("expert_1", "expert_2"):
        plan = plans[name]["operators"]
        convolutions = sum(node.op_type == "Conv" for node in exported.graphs[name].graph.node)
        assert plan["Conv"] == {wanted: convolutions}
        assert plan["Gemm"] == {"float32": 2 if name == "expert_1" else 4}
    gathers = plans["expert_1"]["operators"]["Gather"]  # four make the crop, the others upsample the map
    assert set(gathers) == {"float32"}
    assert gathers["float32"] > 4
    assert plans["expert_2"]["operators"]["Softmax"] == {"float32": 1}
    assert plans["expert_1"]["type"] == exported.precision.value


def test_a_graph_of_another_precision_than_asked_for_is_refused(exported):
    other = Precision.FP16 if exported.precision is Precision.FP32 else Precision.FP32
    for name in ("expert_1", "expert_2"):
        with pytest.raises(ExportError, match=f"{name}: .* convolutions are {exported.precision.onnx_name}; expected"):
            check_precision(name, infer_types(exported.graphs[name]), other)
    model = onnx.ModelProto.FromString(exported.graphs["expert_1"].SerializeToString())
    del model.graph.node[:], model.graph.output[:]
    with pytest.raises(ExportError, match="no convolution"):  # which would prove nothing
        check_precision("expert_1", infer_types(model), exported.precision)


def test_one_convolution_of_another_precision_is_enough(exported):
    model = onnx.ModelProto.FromString(exported.graphs["expert_2"].SerializeToString())
    odd = np.float16 if exported.precision is Precision.FP32 else np.float32
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 3, 1, 1), odd), "odd_weight"))
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(odd))
    model.graph.node.extend([
        onnx.helper.make_node("Cast", [model.graph.input[0].name], ["odd_image"], to=kind),
        onnx.helper.make_node("Conv", ["odd_image", "odd_weight"], ["odd"]),
    ])  # fmt: skip
    with pytest.raises(ExportError, match="1 convolutions are"):
        check_precision("expert_2", infer_types(model), exported.precision)


def test_the_manifest_carries_model_tools_and_parity(exported):
    with Bundle.open(exported.path) as bundle:
        manifest = bundle.manifest
    assert manifest.class_names == exported.model.config.classes
    assert manifest.model["arch"] == "resnet10t"
    assert manifest.model["box_thresholds"] == [0.5]
    assert manifest.tools["torch"] == torch.__version__.split("+")[0] or manifest.tools["torch"] == torch.__version__
    assert manifest.tools["onnxruntime"] == onnxruntime.__version__
    parity = manifest.parity
    assert parity["images"] == 10
    assert parity["photographs"] is True
    assert parity["failures"] == []
    assert 0 < parity["crop_area_median"]["box_1"] < 1
    assert 0 < parity["largest_activation"]["expert_1"]["value"] < 65504
    assert ("weights rounded only" in parity["checks"]["onnx"]["label"]) == (exported.precision is Precision.FP16)


def test_the_report_is_shown_before_the_bundle_is_written(exported):
    shown = "\n".join(exported.lines)
    for found in ("on 10 of 10 images", " images change their class; 1st percentile of box IoU "):
        assert found in shown


def test_generated_images_are_deterministic_and_say_what_they_are(exported):
    first, again = (generated_images(exported.model.config.preprocess, 3) for _ in range(2))
    assert not first.photographs
    assert "generated" in first.source
    assert first.load(0).shape == (64, 64, 3)
    assert np.array_equal(first.load(2), again.load(2))
    assert not np.array_equal(first.load(1), first.load(2))


def test_verification_images_are_spread_over_the_folder(centered, photographs):
    (model, frames), files = centered, sorted(photographs.iterdir())
    images = find_verify_images(photographs, model.config.preprocess, 3)
    assert images.count == 3
    np.testing.assert_array_equal(images.load(1), frames[3])
    np.testing.assert_array_equal(images.load(2), frames[6])
    with pytest.raises(InputError, match="no folder"):
        find_verify_images(photographs / "missing", model.config.preprocess, 3)
    with pytest.raises(InputError, match="is a file; expected a folder"):
        find_verify_images(files[0], model.config.preprocess, 3)


def test_a_damaged_verification_image_is_named_and_left_out(centered, photographs, tmp_path):
    model, frames = centered
    good = (photographs / "0.png").read_bytes()
    (tmp_path / "a.png").write_bytes(good[:2000])
    (tmp_path / "b.png").write_bytes(good)
    lines = []
    images = find_verify_images(tmp_path, model.config.preprocess, 0, lines.append)
    assert images.source.startswith("1 of 2 images")
    (line,) = lines
    assert "a.png" in line
    np.testing.assert_array_equal(images.load(0), frames[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_the_chain_in_one_graph_computes_bit_for_bit_as_its_graphs(exported, batch):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if exported.precision is Precision.FP16:
        # Where an expert's image is no output, ONNX Runtime's CPU provider, which computes in FP32, does not round it
        # to FP16 in between: the chain is then more exact by 1e-5.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    chain = onnxruntime.InferenceSession(exported.folder / "chain.onnx", options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in chain.get_outputs()]
    assert names == ["probabilities", "logits", "gate", "box_1", "heatmap_1", "heatmap_2"]
    computed = dict(zip(names, chain.run(names, {"frame": exported.frames[:batch]}), strict=True))
    tensors = {"frame": exported.frames[:batch]}
    for spec in (expert.spec for expert in exported.experts):
        session = onnxruntime.InferenceSession(exported.folder / f"{spec.name}.onnx", options)
        outputs = [tensor.name for tensor in spec.outputs]
        tensors |= zip(outputs, session.run(outputs, {t.name: tensors[t.name] for t in spec.inputs}), strict=True)
    for name in names[1:]:
        np.testing.assert_array_equal(computed[name], tensors[name], err_msg=name)
    np.testing.assert_allclose(computed["probabilities"], softmax(tensors["logits"]), rtol=1e-5)


def test_the_chain_says_how_an_image_becomes_its_input_and_what_the_classes_are(exported):
    model = onnx.load(exported.folder / "chain.onnx", load_external_data=False)
    onnx.checker.check_model(exported.folder / "chain.onnx")
    props = {entry.key: entry.value for entry in model.metadata_props}
    config = exported.model.config
    assert json.loads(props["class_names"]) == list(config.classes)
    assert (int(props["size"]), int(props["resize"])) == (config.image_size, config.resize)
    assert (json.loads(props["mean"]), json.loads(props["std"])) == (list(config.mean), list(config.std))
    assert json.loads(props["crops"]) == {"sizes": list(config.sizes), "frame": 0}
    assert (props["temperature"], props["mge"]) == ("1.0", version("mge"))
    assert [entry.version for entry in model.opset_import] == [18]


def test_the_chain_can_be_written_as_one_file(exported, tmp_path, monkeypatch):
    with Bundle.open(exported.path) as bundle:
        assert [path.name for path in write_chain(bundle, tmp_path / "one.onnx")] == ["one.onnx", "labels.txt"]
        assert (tmp_path / "labels.txt").read_text().splitlines() == list(bundle.manifest.class_names)
        monkeypatch.setattr("mge_export.chain._MOST_INLINE", 1000)
        written = write_chain(bundle, tmp_path / "two.onnx")
        assert [path.name for path in written] == ["two.onnx", "two.onnx.data", "labels.txt"]
    expected, *others = (
        onnxruntime.InferenceSession(path).run(None, {"frame": exported.frames[:1]})
        for path in (exported.folder / "chain.onnx", tmp_path / "one.onnx", tmp_path / "two.onnx")
    )
    for found in others:
        assert all(map(np.array_equal, found, expected))


def read(folder, subject):
    images = Images.read(find_images([str(folder)]).images, subject, problem=pytest.fail)
    assert images.source == "10 named images"
    return images.frames


@pytest.mark.parametrize("name", ["the same outputs in batches", "the same outputs from two pipelines at once"])
def test_an_export_passes_on_the_cpu(exported, photographs, name):
    subject = open_subject(exported.path, "cpu", threads=1)
    selfcheck(subject, read(photographs, subject), name)
    assert subject.tolerances.relative == exported.result.report.tolerances.relative


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKS)
def test_selfcheck(exported, photographs, backend, name, tmp_path):
    subject = open_on_gpu(exported.path, backend, tmp_path)
    selfcheck(subject, read(photographs, subject), name)
