"""The frame equals torchvision's Resize + CenterCrop byte for byte, and boxes in it lie where the pixels come from."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mge_runtime import preprocess
from mge_runtime.decode import decode_image
from mge_runtime.manifest import Crops, Preprocess
from mge_runtime.preprocess import Viewport, compose_boxes, to_frame

SHIPPED = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")
SIZE = 64  # of the frames in which boxes lie
CROPS = Crops((SIZE,) * 4)
SIZES = [(512, 448), (256, 224), (184, 160), (448, 448), (65, 64), (320, 288)]


def spec(resize: int, size: int) -> Preprocess:
    return Preprocess(resize, size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def shipped(name: str) -> Path:
    """Find a photograph in scikit-image's wheel, without importing it."""
    found = importlib.util.find_spec("skimage")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "data" / name


def check(source, resize, size):
    """The frame of a decoded image is torchvision's of Pillow's own."""
    transforms = pytest.importorskip("torchvision.transforms")
    frame, _ = to_frame(decode_image(source), spec(resize, size))
    with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source) as image:
        expected = transforms.CenterCrop(size)(transforms.Resize(resize)(image.convert("RGB")))
    np.testing.assert_array_equal(frame, expected)
    assert frame.dtype == np.uint8
    assert frame.flags.c_contiguous
    assert frame.flags.writeable


@pytest.mark.parametrize("name", SHIPPED)
def test_photographs_in_scikit_image(name):
    for resize, size in SIZES:
        check(shipped(name), resize, size)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (333, 500), (500, 333), (51, 50), (64, 65), (40, 900)])
def test_odd_shapes(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image.flags.writeable = False
    for resize, size in ((65, 64), (64, 64), (71, 32)):
        check(image, resize, size)


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_a_line_of_pixels_needs_no_gigabytes(shape):
    frame, view = to_frame(np.zeros((*shape, 3), np.uint8), spec(512, 448))  # in full: 512 x 2,560,000
    assert frame.shape == (448, 448, 3)
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


# Boxes.


def resample(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Crop and resize [H, W, C] as the chain does: bilinear, align_corners=True, written out by hand."""
    x0, y0, x1, y1 = box.astype(int)
    crop = image[y0:y1, x0:x1]
    for axis, length in ((0, y1 - y0), (1, x1 - x0)):
        position = np.arange(size) * (length - 1) / (size - 1)
        low = np.minimum(position.astype(int), length - 1)
        high = np.minimum(low + 1, length - 1)
        weight = np.expand_dims(position - low, tuple(d for d in range(3) if d != axis))
        crop = np.take(crop, low, axis) * (1 - weight) + np.take(crop, high, axis) * weight
    return crop


def random_box(rng: np.random.Generator, least: int = 2) -> np.ndarray:
    low = rng.integers(0, SIZE - least, 2)
    high = rng.integers(low + least, SIZE + 1)
    return np.array([*low, *high], np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_markers_land_where_the_boxes_say(seed):
    """Each pixel of an image carries its own position: after real crops, what is seen names where it came from."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(50, 400, 2)
    boxes = np.stack([random_box(rng) for _ in range(3)])
    _, viewport = to_frame(np.zeros((height, width, 3), np.uint8), spec(80, SIZE))

    # The frame's pixel centers in source pixels; the frame itself is tested below with real pixels.
    centers = np.arange(SIZE) + 0.5
    x = viewport.left + centers * (viewport.right - viewport.left) / SIZE
    y = viewport.top + centers * (viewport.bottom - viewport.top) / SIZE
    view = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1)  # [S, S, 2]
    composed = compose_boxes(boxes, viewport, CROPS)
    assert composed.dtype == np.float32
    assert composed.shape == (4, 4)
    for k in range(3):
        pixel = view[1, 1] - view[0, 0]  # one pixel of the view that is cut, in source pixels
        view = resample(view, boxes[k], SIZE)
        # The outermost pixel centers of a view lie half a pixel of the *cut* view inside the box's edges.
        expected = np.concatenate([view[0, 0] - pixel / 2, view[-1, -1] + pixel / 2])
        got = composed[k + 1]
        # The border of an inner view may reach past the outer box by less than half a pixel; there it is clipped.
        outer = composed[k] if k else np.array([viewport.left, viewport.top, viewport.right, viewport.bottom])
        np.testing.assert_allclose(got, np.clip(expected, np.tile(outer[:2], 2), np.tile(outer[2:], 2)), atol=1e-3)


def test_golden_values():
    viewport = Viewport(0, 0, 640, 640, 640, 640)  # ten source pixels each
    boxes = np.array([[8, 16, 40, 48], [0, 0, 64, 32]], np.float32)
    composed = compose_boxes(boxes, viewport, CROPS)
    np.testing.assert_allclose(composed[0], [0, 0, 640, 640])
    np.testing.assert_allclose(compose_boxes(boxes[:0], viewport, CROPS), composed[:1])
    np.testing.assert_allclose(composed[1], [80, 160, 400, 480])
    # Row 32's upper edge: 16 + 0.5 + 31.5 * 31 / 63 = 32; the left edge 8 + 0.5 - 0.5 * 31 / 63 = 8.254
    np.testing.assert_allclose(composed[2], [82.5397, 162.5397, 397.4603, 320.0], atol=1e-3)


def test_boxes_nest_and_one_pixel_stays_one_pixel():
    rng = np.random.default_rng(5)
    viewport = Viewport(0, 0, SIZE, SIZE, SIZE, SIZE)
    for _ in range(200):
        composed = compose_boxes(np.stack([random_box(rng, 1) for _ in range(3)]), viewport, CROPS)
        assert (composed[1:, :2] >= composed[:-1, :2] - 1e-4).all()
        assert (composed[1:, 2:] <= composed[:-1, 2:] + 1e-4).all()
        assert (composed[:, 2:] > composed[:, :2]).all()
    single = compose_boxes(np.array([[5, 6, 6, 7], [10, 20, 30, 40]], np.float32), viewport, CROPS)
    np.testing.assert_allclose(single[1:], [[5, 6, 6, 7]] * 2)  # one pixel fills the view: all of it shows that pixel


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (97, 211), (30, 20), (64, 64)])
def test_the_viewport_finds_a_marker(shape):
    """A white square in the source is found in the frame at the place the viewport says."""
    image = np.zeros((*shape, 3), np.uint8)
    middle_y, middle_x = shape[0] // 2, shape[1] // 2
    reach = min(shape) // 5
    top, left = middle_y - reach, middle_x - reach // 2
    image[top : top + reach, left : left + reach] = 255
    frame, view = to_frame(image, spec(80, SIZE))
    assert (view.height, view.width) == shape
    mass = frame[..., 0].astype(float)
    center_x, center_y = ((mass.sum(axis) * (np.arange(SIZE) + 0.5)).sum() / mass.sum() for axis in (0, 1))
    x, y, *_ = view.to_source(np.array([center_x, center_y, 0, 0]), SIZE)
    scale = min(shape) / 80
    assert x == pytest.approx(left + reach / 2, abs=0.05 * scale + 0.02)
    assert y == pytest.approx(top + reach / 2, abs=0.05 * scale + 0.02)
