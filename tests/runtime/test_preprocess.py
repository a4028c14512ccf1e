"""The frame equals torchvision's Resize + CenterCrop byte for byte."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mge_runtime import preprocess
from mge_runtime.decode import decode_image
from mge_runtime.errors import InputError
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import to_frame

SHARED = Path(__file__).parents[3] / "shared"
SHIPPED = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")
SIZES = [(512, 448), (256, 224), (184, 160), (448, 448), (65, 64), (320, 288)]


def spec(resize: int, size: int) -> Preprocess:
    return Preprocess(resize, size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def shipped(name: str) -> Path:
    """Find a photograph in scikit-image's wheel, without importing it."""
    found = importlib.util.find_spec("skimage")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "data" / name


def by_torchvision(image: Image.Image, resize: int, size: int) -> np.ndarray:
    transforms = pytest.importorskip("torchvision.transforms")
    return np.asarray(transforms.CenterCrop(size)(transforms.Resize(resize)(image)))


@pytest.mark.parametrize(("resize", "size"), SIZES)
@pytest.mark.parametrize("name", SHIPPED)
def test_photographs_in_scikit_image(name, resize, size):
    image = decode_image(shipped(name))
    frame, _ = to_frame(image, spec(resize, size))
    np.testing.assert_array_equal(frame, by_torchvision(Image.fromarray(image), resize, size))
    assert frame.dtype == np.uint8
    assert frame.flags.c_contiguous
    assert frame.flags.writeable


def test_photographs_of_groceries():
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout: the photographs in scikit-image stand in")
    paths = sorted((SHARED / "data" / "groceries" / "test").rglob("*.jpg"))[::36]
    assert len(paths) >= 10, "../shared is there without data/groceries/test"
    for path, (resize, size) in zip(paths, SIZES * 3, strict=False):
        with Image.open(path) as image:  # the whole way: file -> frame, against torchvision on Pillow's own image
            expected = by_torchvision(image.convert("RGB"), resize, size)
        frame, _ = to_frame(decode_image(path), spec(resize, size))
        np.testing.assert_array_equal(frame, expected, err_msg=str(path))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (333, 500), (500, 333), (51, 50), (64, 65), (40, 900)])
def test_odd_shapes(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for resize, size in ((65, 64), (64, 64), (71, 32)):
        frame, _ = to_frame(image, spec(resize, size))
        np.testing.assert_array_equal(frame, by_torchvision(Image.fromarray(image), resize, size))


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_a_line_of_pixels_needs_no_gigabytes(shape):
    image = np.zeros((*shape, 3), np.uint8)
    image[0, 2500:] = 255 if shape[0] == 1 else 0
    image[2500:, 0] = 255 if shape[1] == 1 else image[2500:, 0]
    frame, view = to_frame(image, spec(512, 448))  # in full: 512 x 2,560,000
    assert frame.shape == (448, 448, 3)
    line = frame[224, :, 0] if shape[0] == 1 else frame[:, 224, 0]
    # The frame shows 2500 -+ 0.4375, the middle of the rise from pixel 2499's centre to 2500's: 1/16 to 15/16 of 255.
    assert line[0] == pytest.approx(16, abs=1)
    assert line[-1] == pytest.approx(239, abs=1)
    assert (np.diff(line.astype(int)) >= 0).all()
    start, end = (view.left, view.right) if shape[0] == 1 else (view.top, view.bottom)
    assert (start + end) / 2 == pytest.approx(2500)
    assert end - start == pytest.approx(448 / 512)


def test_strips_are_equal_to_the_full_way_within_one_level(monkeypatch):
    image = np.asarray(Image.open(shipped("coffee.png")).convert("RGB"))[:20]
    full, view = to_frame(image, spec(65, 64))
    monkeypatch.setattr(preprocess, "MAX_RESIZED_PIXELS", 0)
    short, same_view = to_frame(image, spec(65, 64))
    assert np.abs(full.astype(int) - short).max() <= 1
    assert view == same_view


def test_the_source_is_left_alone():
    image = np.random.default_rng(2).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    before = image.copy()
    image.flags.writeable = False
    to_frame(image, spec(33, 32))
    np.testing.assert_array_equal(image, before)


def test_bad_arguments():
    with pytest.raises(InputError, match=r"shape \[4, 4\]; expected uint8 RGB"):
        to_frame(np.zeros((4, 4), np.uint8), spec(33, 32))
    for resize, size in ((31, 32), (10, 0)):
        with pytest.raises(InputError, match="expected 1 <= size <= resize"):
            to_frame(np.zeros((4, 4, 3), np.uint8), spec(resize, size))
