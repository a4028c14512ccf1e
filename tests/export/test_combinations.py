"""Gate x sharing x image sizes x source size: each pair of choices here, all combinations with `make check-export`."""

import importlib.util
import os
from collections import Counter
from itertools import product

import numpy as np
import onnx
import pytest
from PIL import Image

from mge.checkpoint import save_checkpoint
from mge_calibration.cli import main as calibrate
from mge_export.chain import write_chain
from mge_export.cli import main as export
from mge_export.export import export_bundle
from mge_export.images import find_verify_images
from mge_export.precision import Precision
from mge_runtime import Pipeline
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bundle import Bundle
from tests.helpers.commands import succeeds
from tests.helpers.engines import build_all
from tests.helpers.tiny_models import center_heads, load_frames, make_model

onnxruntime = load_onnxruntime()
pytestmark = pytest.mark.slow
FP32, FP16 = Precision.FP32, Precision.FP16
SIZES = (64, 48, 48)
EVERYTHING = bool(os.environ.get("MGE_ALL_COMBINATIONS"))
RTX = importlib.util.find_spec("tensorrt_rtx") is not None
PAIRS = [
    ("network", "backbone", SIZES, 0, FP32),
    ("network", "none", (), 128, FP16),
    ("shared", "backbone", (), 0, FP16),
    ("shared", "none", SIZES, 128, FP32),
    ("none", "backbone", SIZES, 128, FP32),
    ("none", "backbone", SIZES, 128, FP16),
    ("none", "none", (), 0, FP32),
]
ALL = list(product(("network", "shared", "none"), ("none", "backbone"), ((), SIZES), (0, 128), (FP32, FP16)))


def make(photographs, gate, sharing, sizes, source, *, centered=True):
    """A model, of three experts where crops are composed, and frames; centered: it tells them apart."""
    experts = 3 if source else 2
    values = {"image_sizes": sizes[:experts], "source_size": source, "resize": max(source, 64) * 9 // 8}
    model = make_model(experts, arch="plainnet_w16", gate=gate, sharing=sharing, **values)
    frames = load_frames(photographs, model.config.preprocess)
    return center_heads(model, frames) if centered else model, frames


def weights_of(bundle):
    return [bundle.sizes.get(f"onnx/{graph.name}.weights", 0) for graph in bundle.manifest.graphs]


def count_gmacs(data):
    """Convolutions and matrix products of a serialized graph for one image, read off its shapes."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        shapes[value.name] = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    total = 0
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weights, (_, *made) = shapes[node.input[1]], shapes[node.output[0]]
            depth = weights[-2] if node.op_type == "MatMul" else np.prod(weights) // made[0]
            total += np.prod(made) * depth
    return total / 1e9


@pytest.mark.parametrize(
    ("gate", "sharing", "sizes", "source", "precision"),
    ALL if EVERYTHING else PAIRS,
    ids=lambda value: value.value if isinstance(value, Precision) else "x".join(map(str, np.atleast_1d(value))),
)
def test_a_combination_is_exported_within_tolerance(photographs, tmp_path, gate, sharing, sizes, source, precision):
    # Centered, an untrained head's logits may be all but zero for an image, of which half precision leaves little.
    model, frames = make(photographs, gate, sharing, sizes, source, centered=precision is FP32)
    images = find_verify_images(photographs, model.config.preprocess, 0)
    path = tmp_path / "mge.plan"
    assert not export_bundle(model, path, precision, images).report.failures  # it would have been refused
    with Bundle.open(path) as bundle:
        first, *others = weights_of(bundle)
        for name, gmacs in bundle.manifest.gmacs.items():
            assert gmacs == pytest.approx(count_gmacs(bundle.read(f"onnx/{name}.onnx")), abs=1e-9)
        write_chain(bundle, tmp_path / "chain.onnx")
        chain = onnx.load_from_string(bundle.read("onnx/chain.onnx")).graph
    readers = Counter(name for node in chain.node for name in node.input)
    halves = [t.name for t in chain.initializer if t.data_type == onnx.TensorProto.FLOAT16 and t.external_data]
    assert bool(halves) is (precision is FP16)
    assert all(readers[name] == 1 for name in halves)  # else a CPU takes twice the time
    backbones = (1 if sharing == "backbone" else len(model.experts)) + (gate == "network")
    assert sum([first, *others]) == pytest.approx(backbones * first, rel=0.1)
    assert (tmp_path / "chain.onnx").stat().st_size == pytest.approx(backbones * first, rel=0.25)  # nodes, too
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        found = pipeline.run(frames[:3])
        boxes = pipeline.predict(photographs / "0.png").boxes
    assert (boxes[1:, :2] >= boxes[0, :2] - 1e-3).all()
    assert (boxes[1:, 2:] <= boxes[0, 2:] + 1e-3).all()
    assert len({tuple(box) for box in boxes}) == len(model.experts)
    session = onnxruntime.InferenceSession(tmp_path / "chain.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"frame": frames[:3]})
    # Of an FP16 graph alone ONNX Runtime rounds the image that it makes for the next one.
    tolerance = (2e-2 if precision is FP16 else 1e-4) * np.abs(found["logits"]).max()
    np.testing.assert_allclose(logits, found["logits"], rtol=0, atol=tolerance)
    if RTX and (EVERYTHING or (gate, sharing, source) == ("none", "backbone", 128)):
        plans, recorded = build_all(path, "sm86", batch="1,2,4")
        assert {plan["attested"] for plan in recorded.values()} == {"network"}
        assert min(plans.values()) > 0.5 * first  # each engine holds the weights that it reads


def test_int8_and_early_exits_of_a_shared_backbone_and_crops_of_the_source(photographs, tmp_path):
    model, _ = make(photographs, "none", "backbone", SIZES, 128)
    save_checkpoint(tmp_path / "best.pt", model)
    path = tmp_path / "mge.plan"
    given = {"--calib-data": photographs, "--verify-data": photographs, "--max-drop": 30, "--min-box-iou": 0.25}
    options = [part for option in given.items() for part in option]
    flags = ["--int8", "--force-few-images", "--allow-mismatch"]
    target = ["--target", "rtx:sm86" if RTX else "onnx"]
    succeeds(export, "--ckpt", tmp_path / "best.pt", *options, *flags, *target, "-o", path)
    with Bundle.open(path) as bundle:
        kinds = [plan["type"] for plan in bundle.manifest.precision.values()]
        first, *others = weights_of(bundle)
    assert kinds == ["int8"] * 3
    assert max(others) < 0.2 * first  # ranges are each graph's own, codes of the weights are one
    for number, name in enumerate("abcde"):
        (tmp_path / "data" / name).mkdir(parents=True)
        with Image.open(photographs / f"{number}.png") as photograph:
            for copy in range(30):
                box = (copy, copy // 2, copy + 90, copy // 2 + 90)
                photograph.crop(box).save(tmp_path / f"data/{name}/{copy}.png")
    succeeds(calibrate, path, "--data", tmp_path / "data", "--epsilon", 0.45, "--threads", 1)
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        photos = sorted((tmp_path / "data").rglob("*.png"))[::10]
        found = pipeline.predict_batch(photos, exit="calibrated")
    assert min(one.experts_used for one in found) < 3
    for one in found:
        assert len(one.boxes) == one.experts_used
