"""Boxes composed through earlier crops lie where the pixels really come from."""

import numpy as np
import pytest

from mge_runtime.errors import InputError
from mge_runtime.manifest import Preprocess
from mge_runtime.preprocess import Viewport, compose_boxes, to_frame

SIZE = 64


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
    _, viewport = to_frame(np.zeros((height, width, 3), np.uint8), Preprocess(80, SIZE, (0.5,) * 3, (0.5,) * 3))

    # The frame's pixel centres in source pixels; the frame itself is tested below with real pixels.
    centres = np.arange(SIZE) + 0.5
    x = viewport.left + centres * (viewport.right - viewport.left) / SIZE
    y = viewport.top + centres * (viewport.bottom - viewport.top) / SIZE
    view = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1)  # [S, S, 2]
    composed = compose_boxes(boxes, viewport, SIZE)
    assert composed.dtype == np.float32
    assert composed.shape == (4, 4)
    for k in range(3):
        pixel = view[1, 1] - view[0, 0]  # one pixel of the view that is cut, in source pixels
        view = resample(view, boxes[k], SIZE)
        # The outermost pixel centres of a view lie half a pixel of the *cut* view inside the box's edges.
        expected = np.concatenate([view[0, 0] - pixel / 2, view[-1, -1] + pixel / 2])
        got = composed[k + 1]
        # The border of an inner view may reach past the outer box by less than half a pixel; there it is clipped.
        outer = composed[k] if k else np.array([viewport.left, viewport.top, viewport.right, viewport.bottom])
        np.testing.assert_allclose(got, np.clip(expected, np.tile(outer[:2], 2), np.tile(outer[2:], 2)), atol=1e-3)


def test_golden_values():
    viewport = Viewport(0, 0, 640, 640, 640, 640)  # ten source pixels each
    boxes = np.array([[8, 16, 40, 48], [0, 0, 64, 32]], np.float32)
    composed = compose_boxes(boxes, viewport, SIZE)
    np.testing.assert_allclose(composed[0], [0, 0, 640, 640])
    np.testing.assert_allclose(composed[1], [80, 160, 400, 480])
    # Row 32's upper edge: 16 + 0.5 + 31.5 * 31 / 63 = 32; the left edge 8 + 0.5 - 0.5 * 31 / 63 = 8.254
    np.testing.assert_allclose(composed[2], [82.5397, 162.5397, 397.4603, 320.0], atol=1e-3)


def test_whole_boxes_change_nothing():
    viewport = Viewport(3, 4, 99, 77, 120, 80)
    whole = np.tile(np.array([0, 0, SIZE, SIZE], np.float32), (2, 1))
    np.testing.assert_allclose(compose_boxes(whole, viewport, SIZE), np.tile([3, 4, 99, 77], (3, 1)), rtol=1e-6)


def test_boxes_nest_and_one_pixel_stays_one_pixel():
    rng = np.random.default_rng(5)
    viewport = Viewport(0, 0, SIZE, SIZE, SIZE, SIZE)
    for _ in range(200):
        composed = compose_boxes(np.stack([random_box(rng, 1) for _ in range(3)]), viewport, SIZE)
        assert (composed[1:, :2] >= composed[:-1, :2] - 1e-4).all()
        assert (composed[1:, 2:] <= composed[:-1, 2:] + 1e-4).all()
        assert (composed[:, 2:] > composed[:, :2]).all()
    single = compose_boxes(np.array([[5, 6, 6, 7], [10, 20, 30, 40]], np.float32), viewport, SIZE)
    np.testing.assert_allclose(single[1:], [[5, 6, 6, 7]] * 2)  # one pixel fills the view: all of it shows that pixel


def test_no_boxes_is_the_frame():
    np.testing.assert_allclose(compose_boxes(np.empty((0, 4)), Viewport(1, 2, 3, 4, 9, 9), SIZE), [[1, 2, 3, 4]])


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (97, 211), (30, 20), (64, 64)])
def test_the_viewport_finds_a_marker(shape):
    """A white square in the source is found in the frame at the place the viewport says."""
    image = np.zeros((*shape, 3), np.uint8)
    middle_y, middle_x = shape[0] // 2, shape[1] // 2
    reach = min(shape) // 5
    top, left = middle_y - reach, middle_x - reach // 2
    image[top : top + reach, left : left + reach] = 255
    frame, view = to_frame(image, Preprocess(80, SIZE, (0.5,) * 3, (0.5,) * 3))
    assert (view.height, view.width) == shape
    mass = frame[..., 0].astype(float)
    centre_x = (mass.sum(0) * (np.arange(SIZE) + 0.5)).sum() / mass.sum()
    centre_y = (mass.sum(1) * (np.arange(SIZE) + 0.5)).sum() / mass.sum()
    x, y, *_ = view.to_source(np.array([centre_x, centre_y, 0, 0]), SIZE)
    scale = min(shape) / 80
    assert x == pytest.approx(left + reach / 2, abs=0.05 * scale + 0.02)
    assert y == pytest.approx(top + reach / 2, abs=0.05 * scale + 0.02)


def test_bad_arguments():
    view = Viewport(0, 0, 1, 1, 1, 1)
    with pytest.raises(InputError, match=r"shape \[4\]; expected \[K - 1, 4\]"):
        compose_boxes(np.zeros(4), view, SIZE)
    with pytest.raises(InputError, match="expected at least 2"):
        compose_boxes(np.zeros((1, 4)), view, 1)
