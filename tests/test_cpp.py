"""examples/cpp sees and says what the runtime does; `make check-cpp`, since it needs a compiler and three libraries."""

import functools
import importlib.util
import json
import os
import shutil
import statistics
import struct
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image

from mge_runtime import Bundle, Pipeline
from mge_runtime.decode import decode_image
from mge_runtime.manifest import Crops, Preprocess
from mge_runtime.preprocess import compose_boxes, to_frame
from tests.helpers.images import NOISE, saved

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/cpp"
PHOTOGRAPHS = Path(os.environ.get("MGE_PHOTOGRAPHS") or ROOT / "models/photographs")
INCLUDE = os.environ.get("ORT_INCLUDE", "")
SPEC = Preprocess(72, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NEEDED = {  # by Debian's package
    "cmake": shutil.which("cmake"),
    "g++": shutil.which("g++"),
    "libturbojpeg0-dev": Path("/usr/include/turbojpeg.h").exists(),
    "nlohmann-json3-dev": Path("/usr/include/nlohmann/json.hpp").exists(),
    f"ONNX Runtime's headers in ORT_INCLUDE={INCLUDE}": Path(INCLUDE, "onnxruntime_cxx_api.h").exists(),
}
MISSING = [name for name, found in NEEDED.items() if not found]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"make check-cpp runs it; missing: {', '.join(MISSING)}")

# Writes what is shown and the pixels of each image's frame; its error instead.
FRAMES = """
#include "frame.h"
#include <exception>
#include <iostream>
int main(int argc, char** argv) {
  for (int k = 3; k < argc; ++k) {
    try {
      const auto frame = mge::to_frame(mge::read_jpeg(argv[k]), std::stoi(argv[1]), std::stoi(argv[2]));
      std::cout.write(reinterpret_cast<const char*>(frame.shown.data()), sizeof frame.shown);
      std::cout.write(reinterpret_cast<const char*>(frame.image.pixels.data()), frame.image.pixels.size());
    } catch (const std::exception& error) {
      std::cerr << error.what() << std::endl;
    }
  }
}
"""


def run(*words):
    return subprocess.run([str(word) for word in words], capture_output=True, timeout=120)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with `classify`, linked against the library that Python's runtime has loaded too, and `frames`."""
    folder = tmp_path_factory.mktemp("cpp")
    (library,) = Path(importlib.util.find_spec("onnxruntime").origin).parent.glob("capi/libonnxruntime.so.*")
    (folder / "libonnxruntime.so.1").symlink_to(library)  # the name that it was linked under
    libraries = [f"-DORT_INCLUDE={INCLUDE}", f"-DORT_LIBRARY={folder / 'libonnxruntime.so.1'}"]
    (folder / "frames.cpp").write_text(FRAMES)
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror"]
    for command in (
        ["cmake", "-S", EXAMPLE, "-B", folder, "-DCMAKE_CXX_FLAGS=-Werror", *libraries],
        ["cmake", "--build", folder],
        ["g++", "-std=c++17", "-O1", *checks, f"-I{EXAMPLE}", folder / "frames.cpp", EXAMPLE / "frame.cpp",
         "-lturbojpeg", "-o", folder / "frames"],
    ):  # fmt: skip
        done = run(*command)
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return folder


@pytest.fixture
def frames(built):
    return functools.partial(run, built / "frames", SPEC.resize, SPEC.size)


@pytest.fixture
def classify(built):
    return functools.partial(run, built / "classify")


def oriented(value, order="<"):
    """EXIF with an orientation."""
    entry = struct.pack(f"{order}HHI", 0x0112, 3, 1) + struct.pack(f"{order}HH", value, 0)
    return b"Exif\0\0" + {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


def pattern(height, width):
    """Smooth colors with edges, of which a JPEG keeps more than of noise."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([255 * x / width, 255 * y / height, 128 + 127 * np.sin(x / 3 + y / 5)], -1)
    image[height // 3 :, width // 2 :] //= 2
    return image.astype(np.uint8)


JPEGS = {
    **{f"orientation {k}": saved(pattern(61, 97), "JPEG", exif=oriented(k)) for k in range(10)},
    "big-endian": saved(pattern(61, 97), "JPEG", exif=oriented(6, ">")),
    "EXIF cut short": saved(pattern(61, 97), "JPEG", exif=oriented(6)[:20]),
    "EXIF that points outside": saved(pattern(61, 97), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    **{
        f"{h} x {w}": saved(pattern(h, w), "JPEG") for h, w in [(1, 1), (1, 7), (3, 2), (72, 72), (500, 333), (40, 900)]
    },
    "strip": saved(pattern(1, 5000), "JPEG"),
    "large": saved(pattern(1300, 900), "JPEG"),
    "gray": saved(pattern(80, 90)[..., 0], "JPEG"),
    "progressive": saved(NOISE, "JPEG", progressive=True),
    "4:4:4": saved(NOISE, "JPEG", subsampling=0),
}


def test_frames_are_the_runtimes(frames, tmp_path):
    expected = []
    for number, data in enumerate(JPEGS.values()):
        (tmp_path / f"{number:02}.jpg").write_bytes(data)
        expected.append(to_frame(decode_image(data), SPEC))
    done = frames(*sorted(tmp_path.iterdir()))
    assert not done.stderr
    found = np.frombuffer(done.stdout, [("shown", "f8", 4), ("pixels", "u1", (64, 64, 3))])
    for name, (frame, view), (shown, pixels) in zip(JPEGS, expected, found, strict=True):
        np.testing.assert_allclose(shown, [view.left, view.top, view.right, view.bottom], err_msg=name)
        assert np.abs(frame.astype(int) - pixels).max() <= (name == "strip"), name  # not resized whole by the runtime


def test_what_is_no_jpeg_is_refused_in_one_line(frames, classify, tmp_path):
    good = JPEGS["gray"]
    size = good.index(b"\xff\xc0") + 5  # of the image, in its frame header
    cases = {
        "cut": (good[:-100], "Premature end"),
        "empty": (b"", "expected a whole JPEG"),
        "png": (saved(NOISE, "PNG"), "Not a JPEG file"),
        "bomb": (good[:size] + b"\xff\xdc" * 2 + good[size + 4 :], "it is 65500 x 65500 pixels"),
        "cmyk": (saved(Image.new("CMYK", (9, 9)), "JPEG"), "expected a whole JPEG of RGB or gray"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        lines = frames(tmp_path / name).stderr.decode().splitlines()
        assert len(lines) == 1, lines
        assert reason in lines[0]
    with (tmp_path / "large").open("wb") as file:
        file.truncate(100_000_001)
    assert b"more than 100 MB" in frames(tmp_path / "large").stderr
    assert b"missing or no regular file" in frames("/dev/zero").stderr
    for words, code in (([], 2), (["nothing.onnx", "a.jpg"], 1), ([tmp_path / "png", "a.jpg"], 1)):
        done = classify(*words)
        assert (done.returncode, done.stderr.count(b"\n"), done.stdout) == (code, 1, b"")
        assert done.stderr.startswith(b"error: ")


def test_damaged_files_are_decoded_or_refused(frames, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(400):
        data = bytearray(JPEGS["big-endian" if number % 2 else "progressive"])
        head = 60 if number % 4 == 1 else len(data)  # the EXIF lies there
        for at in rng.integers(2, head, rng.integers(1, 6)):
            data[at] = rng.integers(256)
        (tmp_path / f"{number:03}.jpg").write_bytes(data[: rng.integers(20, len(data))] if number % 3 == 0 else data)
    done = frames(*sorted(tmp_path.iterdir()))  # the sanitizers end the process at the first fault
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    read, refused = len(done.stdout) / (4 * 8 + 64 * 64 * 3), done.stderr.decode().splitlines()
    assert read + len(refused) == 400
    assert min(read, len(refused)) > 50


def test_a_million_exif_segments_take_no_time(frames, tmp_path):
    """Each claims 65,535 entries and has none; looked at one by one they took a minute for every 3 MB of file."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    segments = (b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif) * 1_000_000
    (tmp_path / "a.jpg").write_bytes(JPEGS["gray"][:2] + segments + JPEGS["gray"][2:])
    done = frames(tmp_path / "a.jpg")
    assert (len(done.stdout), done.stderr) == (4 * 8 + 64 * 64 * 3, b"")


def constant_chain(path, boxes, element=TensorProto.FLOAT, **metadata):
    """A chain that says the same of every image."""
    tensors = {"probabilities": [[0.2, 0.5, 0.3]], "gate": [[1 / (len(boxes) + 1)] * (len(boxes) + 1)]}
    tensors |= {f"box_{k}": [box] for k, box in enumerate(boxes, 1)}
    values = {name: np.array(value, np.float32) for name, value in tensors.items()}
    nodes = [
        helper.make_node("Constant", [], [name], value=helper.make_tensor(name, element, value.shape, value))
        for name, value in values.items()
    ]
    outputs = [helper.make_tensor_value_info(name, element, value.shape) for name, value in values.items()]
    frame = helper.make_tensor_value_info("frame", TensorProto.UINT8, ["batch", SPEC.size, SPEC.size, 3])
    model = helper.make_model(helper.make_graph(nodes, "chain", [frame], outputs), ir_version=10)
    props = {"class_names": ["\u00e9", "b\n", "c"], "size": SPEC.size, "resize": SPEC.resize, **metadata}
    helper.set_model_props(model, {key: json.dumps(value) for key, value in props.items() if value is not None})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("boxes", "crops"),
    [
        ([], Crops((64,))),
        ([[3, 5, 40, 60], [0, 7, 64, 30], [10, 10, 11, 50]], Crops((64, 64, 64, 64))),
        ([[3, 5, 40, 60], [2, 7, 31, 30]], Crops((64, 32, 48))),
        ([[30, 5, 31, 60], [2, 7, 31, 30]], Crops((64, 32, 48))),
        ([[3, 5, 40, 60], [10.5, 20, 30, 40]], Crops((32, 32, 32), 64)),
    ],
    ids=["one expert", "one size", "sizes", "one pixel", "from the frame"],
)
def test_boxes_are_the_runtimes(classify, tmp_path, boxes, crops):
    (tmp_path / "a.jpg").write_bytes(JPEGS["orientation 6"])
    done = classify(constant_chain(tmp_path / "chain.onnx", boxes, crops=asdict(crops)), tmp_path / "a.jpg")
    found = json.loads(done.stdout)
    _, view = to_frame(decode_image(tmp_path / "a.jpg"), SPEC)
    expected = compose_boxes(np.reshape(boxes, (-1, 4)), view, crops)
    np.testing.assert_allclose(found["boxes"], expected, atol=0.006)
    assert [top["class_name"] for top in found["top"]] == ["b\n", "c", "\u00e9"]
    assert ("gate" in found, found["width"], found["height"]) == (len(boxes) > 0, 61, 97)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"crops": None}, "it has no metadata crops"),
        ({"size": 100_000}, "impossible sizes"),
        ({"resize": 10}, "impossible sizes"),
        ({"crops": asdict(Crops((64, 1, 64)))}, "impossible sizes"),
        ({"class_names": "a"}, "type must be array"),
        ({"class_names": ["a"]}, "not one finite number for each class"),
        ({"class_names": []}, "no classes"),
        ({"element": TensorProto.DOUBLE}, "not of type float32"),
    ],
)
def test_foreign_metadata_is_refused(classify, tmp_path, changes, reason):
    (tmp_path / "a.jpg").write_bytes(JPEGS["gray"])
    chain = constant_chain(tmp_path / "chain.onnx", [], **({"crops": asdict(Crops((64,)))} | changes))
    done = classify(chain, tmp_path / "a.jpg")
    assert (done.returncode, done.stdout) == (1, b"")
    assert reason in done.stderr.decode()


def test_a_full_disk_is_said(built, tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEGS["gray"])
    chain = constant_chain(tmp_path / "chain.onnx", [], crops=asdict(Crops((64,))))
    with Path("/dev/full").open("wb") as full:
        words = [built / "classify", chain, tmp_path / "a.jpg"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 1
    assert b"cannot write the predictions" in done.stderr


def test_it_predicts_what_the_runtime_does(classify, tmp_path, capsys):
    photographs = sorted(PHOTOGRAPHS.rglob("*.jpg"))
    assert photographs, f"no photographs in {PHOTOGRAPHS}"
    photographs = photographs[:: max(1, len(photographs) // 100)][:100]
    with Bundle.open(ROOT / "models/groceries.plan") as bundle:
        bundle.extract(tmp_path)
    times, same = {"C++": [], "Python": []}, 0
    box_error = probability_error = 0.0
    with Pipeline.open(ROOT / "models/groceries.plan", device="cpu") as pipeline:
        pipeline.predict(photographs[0])
        for start in range(0, len(photographs), 20):  # by turns, since the machine may have other work
            some = photographs[start : start + 20]
            done = classify(tmp_path / "onnx/chain.onnx", *some)
            assert not done.stderr
            for line, path in zip(map(json.loads, done.stdout.splitlines()), some, strict=True):
                prediction = pipeline.predict(path)
                expected = prediction.to_dict()
                same += line["class_name"] == expected["class_name"]
                box_error = max(box_error, np.abs(np.subtract(line["boxes"], expected["boxes"])).max())
                likely = dict(prediction.top_k(len(prediction.class_names)))
                differences = [abs(top["probability"] - likely[top["class_name"]]) for top in line["top"]]
                probability_error = max(probability_error, *differences)
                times["C++"].append(line["ms"])
                times["Python"].append(expected["timings_ms"]["total"])
    medians = ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in times.items())
    with capsys.disabled():
        print(
            f"\n{same} of {len(photographs)} the same class; boxes within {box_error:.2f} px, probabilities within "
            f"{probability_error:.6f}; ms an image, median: {medians}"
        )
    assert same == len(photographs)
    assert box_error <= 1
    assert probability_error <= 1e-3
