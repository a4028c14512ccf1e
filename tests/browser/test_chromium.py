"""The browser example in headless Chromium against the runtime: classes, boxes, probabilities, frames, bad files.

`make check-browser` fetches onnxruntime-web and runs it; figures of docs/guide/browser.md are printed with -s.
"""

import io
import shutil
import statistics
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mge.checkpoint import save_checkpoint
from mge.data.field_guide import FieldGuide, write_field_guide
from mge_export.cli import main as export
from mge_export.export import export_bundle
from mge_export.images import find_verify_images
from mge_export.precision import Precision
from mge_runtime import Pipeline
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.decode import decode_image
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import to_frame
from tests.helpers import tiny_models
from tests.helpers.browser import browse, needs_browser
from tests.helpers.bundles import change_byte
from tests.helpers.commands import succeeds
from tests.runtime.tiny_chain import write_tiny_bundle

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
        ({"gate": "shared", "sharing": "backbone", "image_sizes": (64, 48), "source_size": 128}, Precision.FP16),
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


def test_a_frame_is_at_most_one_level_from_the_runtimes(tmp_path):
    """Whatever both decode: every orientation, transparency, palettes, gray, 16 bits, chroma at half the size."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 4), np.uint8)).resize((160, 130), Image.Resampling.BICUBIC)
    opaque = coarse.convert("RGB")
    files = {"alpha.png": (coarse, {}), "palette.png": (opaque.quantize(16), {}), "gray.png": (opaque.convert("L"), {})}
    files |= {f"lossless.{kind}": (opaque, {}) for kind in ("png", "bmp", "gif")}
    files["lossless.webp"] = opaque, {"lossless": True}
    files |= {f"{sampling}.jpg": (opaque, {"subsampling": sampling}) for sampling in range(3)}
    files["progressive.jpg"] = opaque, {"progressive": True}
    files["16.png"] = Image.fromarray(random.integers(0, 65536, (130, 160), np.uint16)), {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"orientation-{orientation}.jpg"] = opaque, {"exif": exif}
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
    sides = {"resize": 72, "size": 64}
    found = browse(tmp_path, [["frame", f"/files/{name}", sides] for name in files])
    spec = Preprocess(**sides, mean=(0.5,) * 3, std=(0.5,) * 3)
    apart = {}
    for name, frame in zip(files, found, strict=True):
        expected, _ = to_frame(decode_image(tmp_path / name), spec)
        apart[name] = int(np.abs(np.array(frame).reshape(expected.shape) - expected.astype(int)).max())
    print(f"\nlevels apart: {apart}")
    assert max(apart.values()) <= 1


def png(width, height):
    """A PNG of one bit a pixel, all black: small, however many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compressobj(1)
    rows = b"".join([*(pixels.compress(bytes((width + 7) // 8 + 1)) for _ in range(height)), pixels.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bad_files_get_one_line_and_the_page_goes_on(tmp_path):
    write_tiny_bundle(tmp_path / "mge.plan")
    data = (tmp_path / "mge.plan").read_bytes()
    photo = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)).save(photo, "JPEG")
    (tmp_path / "cut.plan").write_bytes(data[:9000])
    (tmp_path / "flipped.plan").write_bytes(data)
    change_byte(tmp_path / "flipped.plan", "onnx/expert_2.weights")
    with (tmp_path / "huge.plan").open("wb") as file:
        file.truncate(2**30 + 1)  # no disk is used
    (tmp_path / "photo.jpg").write_bytes(photo.getvalue())
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(photo.getvalue()[:900])
    (tmp_path / "large.png").write_bytes(png(10_000, 10_000))
    lines = {
        ("#file", "photo.jpg"): "there is no bundle: choose one first",
        ("#bundle", "cut.plan"): "cut short, damaged or no bundle",
        ("#bundle", "flipped.plan"): "its entry onnx/expert_2.weights is damaged",
        ("#bundle", "photo.jpg"): "cut short, damaged or no bundle",
        ("#bundle", "huge.plan"): "it has 1073741825 bytes; expected at most 1073741824",
        ("#bundle", "mge.plan"): "mge.plan: 5 classes, 3 graphs on wasm",
        ("#file", "text.jpg"): "damaged, or no image that this browser decodes",
        ("#file", "cut.jpg"): "",
        ("#file", "large.png"): "it is 10000 x 10000 pixels; expected at most 65 megapixels",
    }
    steps = [["choose", f"/files/{name}", where, "classes|graphs ran"] for where, name in lines]
    after = [["choose", "/files/photo.jpg", "#file", "graphs ran"], ["click", "#camera", "graphs ran"]]
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    *found, shown, watched = browse(tmp_path, [*steps, *after], *camera)
    print("\n" + "\n".join(found))
    for line, expected in zip(found, lines.values(), strict=True):
        assert expected in line
        assert "\n" not in line
    assert "3 graphs ran" in shown
    assert "3 graphs ran" in watched
