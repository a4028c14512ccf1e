"""The browser example in headless Chromium against the runtime: classes, boxes, probabilities, exits.

`make check-browser` fetches onnxruntime-web and runs it; figures of docs/guide/browser.md are printed with -s.
"""

import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest

from mge.checkpoint import save_checkpoint
from mge.data.field_guide import FieldGuide, write_field_guide
from mge_export.cli import main as export
from mge_export.export import export_bundle
from mge_export.images import find_verify_images
from mge_export.precision import Precision
from mge_runtime import Pipeline
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.decode import decode_image
from mge_runtime.preprocess import to_frame
from tests.helpers import tiny_models
from tests.helpers.browser import browse, needs_browser
from tests.helpers.commands import succeeds

pytestmark = [needs_browser, pytest.mark.slow]

PLAN = Path(__file__).parents[2] / "models/groceries.plan"
GROCERIES = tiny_models.SHARED / "data/groceries/test"
# Kernels of another build add up in another order: 1e-7 of a probability was seen, and 3e-5 px of a box.
PROBABILITY, PIXEL = 1e-3, 1.0


def compare(folder, plan, photographs, exit="never"):
    """Predict copies of the photographs in both; returns what the browser and the runtime found."""
    shutil.copy(plan, folder / "browser.plan")
    names = [f"{number}{path.suffix}" for number, path in enumerate(photographs)]
    for name, path in zip(names, photographs, strict=True):
        shutil.copy(path, folder / name)
    opened, *found = browse(
        folder, [["open", "/files/browser.plan"], *(["predict", f"/files/{name}"] for name in names)]
    )
    assert opened == "wasm"
    with Pipeline.open(plan, device="cpu", threads=1, exit=exit) as pipeline:
        expected = [pipeline.predict(path) for path in photographs]
    for one, other in zip(found, expected, strict=True):
        assert "error" not in one, one
        assert one["classes"][0]["name"] == other.class_name
        assert one["classes"][0]["probability"] == pytest.approx(other.probability, abs=PROBABILITY)
        assert one["graphs"] == len(other.boxes)
        np.testing.assert_allclose(one["boxes"], other.boxes, rtol=0, atol=PIXEL)
        for heat, other_heat in zip(one["heatmaps"], other.heatmaps, strict=True):
            np.testing.assert_allclose(heat, other_heat.ravel(), rtol=0, atol=1e-2)
    return found, expected


@pytest.mark.skipif(not GROCERIES.is_dir(), reason="needs ../shared/data/groceries")
def test_a_hundred_groceries_are_named_as_by_the_runtime(tmp_path):
    photographs = sorted(GROCERIES.rglob("*.jpg"))
    photographs = [photographs[number * len(photographs) // 100] for number in range(100)]
    found, expected = compare(tmp_path, PLAN, photographs)
    boxes = max(np.abs(one["boxes"] - other.boxes).max() for one, other in zip(found, expected, strict=True))
    print(f"\ngroceries, 100 of 100 the same class, boxes within {boxes:.1g} px; median milliseconds:")
    for step in ("decode", "resize", "chain", "total"):
        print(f"  {step} in the browser: {statistics.median(one['milliseconds'][step] for one in found):.0f}")
    print(f"  total in Python, one thread: {statistics.median(one.timings_ms['total'] for one in expected):.0f}")


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """24 drawn birds."""
    folder = tmp_path_factory.mktemp("birds")
    write_field_guide(folder / "guide", FieldGuide(species=6, size=96, train=6, val=6, test=24), workers=1)
    return sorted((folder / "guide/test").rglob("*.png"))


@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, Precision.FP32),
        (
            {"gate": "shared", "sharing": "backbone", "image_sizes": (64, 48), "source_size": 128, "resize": 144},
            Precision.FP16,
        ),
    ],
    ids=["own backbones", "one backbone, crops of the source"],
)
def test_24_drawn_birds_are_named_as_by_the_runtime(birds, tmp_path, changes, precision):
    model = tiny_models.make_model(**changes)
    preprocess = model.config.preprocess
    frames = np.stack([to_frame(decode_image(path), preprocess)[0] for path in birds])
    model = tiny_models.center_heads(model, frames) if not changes else model
    (tmp_path / "verify").mkdir()
    for number, path in enumerate(birds[::3]):
        shutil.copy(path, tmp_path / f"verify/{number}.png")
    images = find_verify_images(tmp_path / "verify", preprocess, 0)
    export_bundle(model, tmp_path / "mge.plan", precision, images, allow_mismatch=True)
    _, expected = compare(tmp_path, tmp_path / "mge.plan", birds)
    assert changes or len({one.class_name for one in expected}) > 1


def test_a_bundle_in_int8_and_its_exits(birds, tmp_path):
    save_checkpoint(tmp_path / "best.pt", tiny_models.make_model())
    folder = birds[0].parents[2] / "train"
    options = ["--int8", "--force-few-images", "--allow-mismatch", "--max-drop", 30, "--min-box-iou", 0]
    data = ["--calib-data", folder, "--verify-data", folder, "--target", "onnx"]
    succeeds(export, "--ckpt", tmp_path / "best.pt", *options, *data, "-o", tmp_path / "mge.plan")
    with Bundle.open(tmp_path / "mge.plan") as bundle:
        first, last = (graph.logits for graph in bundle.manifest.graphs)
        assert "onnx/expert_1.cpu.onnx" in bundle.sizes
    with Pipeline.open(tmp_path / "mge.plan", device="cpu", threads=1) as pipeline:
        confident = sorted(pipeline.predict(path, exit=1).probability for path in birds)
    exits = {"epsilon": 0.01, "delta": 0.05, "thresholds": {first: sum(confident[11:13]) / 2}}
    add_calibration(tmp_path / "mge.plan", {"temperatures": {first: 1.0, last: 0.7}, "exits": exits})
    found, _ = compare(tmp_path, tmp_path / "mge.plan", birds, exit="calibrated")
    assert sorted(one["graphs"] for one in found) == [1] * 12 + [2] * 12
