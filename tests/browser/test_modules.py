"""The browser example's modules in Node.js: frames and boxes are the runtime's, damaged bundles are refused."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mge_runtime.bundle import Bundle
from mge_runtime.manifest import Crops, Preprocess
from mge_runtime.preprocess import Viewport, compose_boxes, to_frame
from tests.helpers.bundles import read_entries, write_entries
from tests.runtime.tiny_chain import write_tiny_bundle

PAGE = Path(__file__).parents[2] / "examples/browser"

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js: apt-get install nodejs")


def evaluate(module, expression, *given):
    """The value of a JavaScript expression over the names of a module and `given`, a list."""
    program = f"""
        import * as module from {json.dumps((PAGE / module).as_uri())};
        import fs from "node:fs";
        const given = JSON.parse(fs.readFileSync(0));
        const read = (path) => new Uint8Array(fs.readFileSync(path)).buffer;
        console.log(JSON.stringify((({{ {", ".join(NAMES[module])} }}) => {expression})(module)));
    """
    command = ["node", "--input-type=module", "--eval", program]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NAMES = {"image.js": ("toFrame", "composeBoxes"), "bundle.js": ("Bundle",)}
SIZES = [(320, 240), (97, 301), (24, 24), (33, 24), (5, 7), (1, 1), (1, 900), (2001, 30), (401, 400)]


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_a_frame_is_the_runtimes(size):
    """Byte for byte; one level apart where Pillow, from 13 on, resizes a tall image first down, then across."""
    width, height = size
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 4), np.uint8)
    pixels[: height // 3] = 255  # weights that add up to more than one would show in white
    expected, viewport = to_frame(Image.fromarray(pixels).convert("RGB"), Preprocess(24, 21, (0.5,) * 3, (0.5,) * 3))
    image = {"data": pixels.ravel().tolist(), "width": width, "height": height}
    found = evaluate("image.js", "toFrame(given[0], { resize: 24, size: 21 })", image)
    apart = 1 if height > width else 0
    np.testing.assert_allclose(list(found["frame"].values()), expected.ravel().astype(int), rtol=0, atol=apart)
    np.testing.assert_allclose(found["viewport"], [viewport.left, viewport.top, viewport.right, viewport.bottom])


@pytest.mark.parametrize(
    "crops", [Crops((64, 48, 32, 64)), Crops((64, 48, 32, 64), 96)], ids=["nested", "of the frame"]
)
def test_boxes_are_the_runtimes(crops):
    boxes = [[3.0, 5.0, 60.0, 41.0], [0.0, 8.0, 1.0, 48.0], [0.0, 2.0, 32.0, 30.0]]  # the second one pixel wide
    edges = (10.5, -0.25, 310.0, 200.0)
    expected = compose_boxes(np.array(boxes), Viewport(*edges, 400, 300), crops)
    given = {"sizes": crops.sizes, "frame": crops.frame}
    found = evaluate("image.js", "composeBoxes(...given)", boxes, edges, given)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


READ = "[...new Bundle(read(given[0])).entries].map(([name, { bytes }]) => [name, bytes.byteOffset, bytes.length])"
OPENED = """(() => {
    try { const bundle = new Bundle(read(given[0])); [...bundle.entries.keys()].forEach((name) => bundle.read(name)); }
    catch (error) { return error.message; }
})()"""


def test_a_bundles_entries_are_where_they_lie(tmp_path):
    write_tiny_bundle(path := tmp_path / "mge.plan")
    with Bundle.open(path) as bundle:
        expected = [[name, bundle.entry(name).offset, size] for name, size in bundle.sizes.items()]
    assert sorted(evaluate("bundle.js", READ, str(path))) == sorted(expected)


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    return data.replace(b"conv.weight", b"conv.weighu", 1)


def forged(data):
    """The last entry begins beyond the end of the file."""
    return data[:-22].rpartition(b"PK\1\2")[0] + b"PK\1\2" + b"\xff" * 60 + data[-22:]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "it is cut short, damaged or no bundle"),
        (flipped, "is damaged: copy or export it again"),
        (forged, "it is cut short, damaged or no bundle"),
        (lambda _: b"", "it is cut short, damaged or no bundle"),
        (lambda _: bytes(5000), "it is cut short, damaged or no bundle"),
    ],
    ids=["cut", "flipped", "forged", "empty", "zeros"],
)
def test_a_damaged_bundle_is_refused_in_one_line(tmp_path, damage, expected):
    write_tiny_bundle(path := tmp_path / "mge.plan")
    path.write_bytes(damage(path.read_bytes()))
    message = evaluate("bundle.js", OPENED, str(path))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (b"{", "its manifest.json is no JSON"),
        ({"schema_version": 3, "graphs": "abc", "preprocess": {"size": 64, "resize": 64}}, "has 3 graphs"),
        ({"schema_version": 99}, "schema version 99; expected 3: export again"),
        ({"schema_version": 3, "graphs": [1], "preprocess": {"size": 10**6, "resize": 10**6}}, "frames of 1000000 of"),
        ({"schema_version": 3, "graphs": [1], "preprocess": {"size": 64.5, "resize": 65}}, "frames of 64.5 of 65 px"),
        ({"schema_version": 3, "graphs": [], "preprocess": {"size": 64, "resize": 64}}, "has 0 graphs"),
        (None, "schema version undefined"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path, manifest, expected):
    write_tiny_bundle(path := tmp_path / "mge.plan")
    document = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    write_entries(path, read_entries(path) | {"manifest.json": document})
    assert expected in evaluate("bundle.js", OPENED, str(path))


def test_another_zip_is_refused(tmp_path):
    with zipfile.ZipFile(path := tmp_path / "mge.plan", "w") as archive:
        archive.writestr("a.txt", "a")
    assert "it has no entry manifest.json" in evaluate("bundle.js", OPENED, str(path))
