"""The browser example's page in headless Chromium: how it decodes, what it says of bad files, the camera."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from mge_runtime.decode import decode_image
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import to_frame
from tests.helpers.browser import browse, needs_browser
from tests.helpers.bundles import change_byte
from tests.runtime.tiny_chain import write_tiny_bundle

pytestmark = needs_browser


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
    files["cmyk.jpg"] = opaque.convert("CMYK"), {"quality": 95}
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
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(100_000_001)
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
        ("#file", "text.jpg"): "it is damaged, cut short, or no image that this browser decodes",
        ("#file", "cut.jpg"): "it is damaged, cut short, or no image that this browser decodes",
        ("#file", "huge.jpg"): "it has 100000001 bytes; expected at most 100000000",
        ("#file", "large.png"): "it is 10000 x 10000 pixels; expected at most 65 megapixels",
    }
    steps = [["choose", f"/files/{name}", where, "classes|graphs ran"] for where, name in lines]
    visible = ["evaluate", "document.querySelector('#prediction').checkVisibility()"]
    after = [visible, ["choose", "/files/photo.jpg", "#file", "graphs ran"], visible]
    *found, before, shown, now = browse(tmp_path, [*steps, *after])
    print("\n" + "\n".join(found))
    for line, expected in zip(found, lines.values(), strict=True):
        assert expected in line
        assert "\n" not in line
    assert "3 graphs ran" in shown
    assert (before, now) == (False, True)


def test_the_camera_is_asked_for_once_and_given_back(tmp_path):
    """Also where a second click, a bundle or an image comes between, or where it is taken away."""
    write_tiny_bundle(tmp_path / "mge.plan")
    Image.new("RGB", (90, 80)).save(tmp_path / "photo.jpg")
    count = """window.streams = [], window.ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices),
        navigator.mediaDevices.getUserMedia = async (wanted) => (streams.push(await ask(wanted)), streams.at(-1)), 0"""
    click, active = "document.querySelector('#camera').click()", ["evaluate", "streams.map(({ active }) => active)"]
    bundle = ["choose", "/files/mge.plan", "#bundle", "classes"]
    image = ["choose", "/files/photo.jpg", "#file", "graphs ran"]
    on, off = ["click", "#camera", "graphs ran"], ["evaluate", click]
    # What the last frame of one stream says may come after the click that asks for the next.
    lent = "(async (count) => { while (streams.length < count) await new Promise((done) => setTimeout(done, 20)) })"
    steps = {
        "open": (bundle, "3 graphs on wasm"),
        "count": (["evaluate", count], 0),
        "click": (["evaluate", click], None),
        "click again": (on, "3 graphs ran"),
        "one stream": (active, [True]),
        "a bundle meanwhile": (bundle, "3 graphs on wasm"),
        "goes on": (["said", "graphs ran"], "3 graphs ran"),
        "off": (off, None),
        "on": (on, "3 graphs ran"),
        "and lent": (["evaluate", f"{lent}(2)"], None),
        "another stream": (active, [False, True]),
        "an image": (image, "graphs ran"),
        "ends it": (active, [False, False]),
        "on once more": (on, "3 graphs ran"),
        "and lent anew": (["evaluate", f"{lent}(3)"], None),
        "taken away": (["evaluate", "streams.at(-1).getTracks().forEach((track) => track.stop())"], None),
        "says so": (["said", "taken away"], "cannot use the camera: it was unplugged or taken away"),
    }
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    found = browse(tmp_path, [step for step, _ in steps.values()], *camera, seconds=90)
    for (name, (_, expected)), one in zip(steps.items(), found, strict=True):
        assert expected in one if isinstance(expected, str) else one == expected, f"{name}: {one}"


def test_an_image_waits_for_the_bundle_chosen_before_it(tmp_path):
    write_tiny_bundle(tmp_path / "mge.plan")
    Image.new("RGB", (90, 80)).save(tmp_path / "photo.jpg")
    both = """(async () => {
        const [bundle, image] = await Promise.all(["/files/mge.plan", "/files/photo.jpg"].map(blob));
        open(bundle);
        return (await predict(image)).graphs;
    })()"""
    assert browse(tmp_path, [["evaluate", both]]) == [3]
