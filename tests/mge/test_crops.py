"""Crops from a frame that is larger than what the first expert sees, and experts whose images differ in size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mge.attention import compose_view, crop_frame, shrink, whole_view
from mge.config import MGEConfig
from mge.model import MGENet
from mge_runtime.errors import CheckpointError
from mge_runtime.manifest import Crops
from mge_runtime.preprocess import Viewport, compose_boxes


def sample(frame, x, y):
    """Bilinear, by hand: a frame [N, N, 3] at pixel centers x and y, clamped to the frame."""
    top = len(frame) - 1
    x, y = min(max(x, 0), top), min(max(y, 0), top)
    left, upper = min(int(x), top - 1), min(int(y), top - 1)
    right, lower = x - left, y - upper
    above = (1 - right) * frame[upper, left] + right * frame[upper, left + 1]
    below = (1 - right) * frame[upper + 1, left] + right * frame[upper + 1, left + 1]
    return (1 - lower) * above + lower * below


@pytest.mark.parametrize("view", [(0, 0, 24, 24), (3.5, 2, 9.25, 20), (20, 21.5, 24, 24)])
def test_a_crop_is_the_mean_of_four_samples_in_each_pixel(view):
    frame = torch.rand(24, 24, 3, dtype=torch.float64)
    found = crop_frame(frame[None], torch.tensor([view], dtype=torch.float64), 6)[0]
    x0, y0, x1, y1 = view
    for row in range(6):
        for column in range(6):
            samples = [
                sample(frame.numpy(), x0 + (i + 0.5) * (x1 - x0) / 12 - 0.5, y0 + (j + 0.5) * (y1 - y0) / 12 - 0.5)
                for i in (2 * column, 2 * column + 1)
                for j in (2 * row, 2 * row + 1)
            ]
            np.testing.assert_allclose(found[:, row, column], np.mean(samples, 0), atol=1e-6)


def test_every_image_of_a_batch_is_cut_by_its_own_view():
    frames, views = torch.rand(3, 16, 16, 3), torch.tensor([[0.0, 0, 16, 16], [2, 3, 9, 12], [8, 8, 16, 10]])
    together = crop_frame(frames, views, 8)
    for number in range(3):
        torch.testing.assert_close(together[number], crop_frame(frames[number, None], views[number, None], 8)[0])


def test_the_first_image_is_the_mean_of_blocks():
    frame = torch.rand(2, 12, 12, 3)
    torch.testing.assert_close(shrink(frame, 4), F.avg_pool2d(frame.permute(0, 3, 1, 2), 3))


def test_views_compose_as_the_runtime_s_boxes():
    whole = whole_view(torch.zeros(1, 3, 60, 60))
    second = compose_view(whole, torch.tensor([[2.0, 4, 8, 10]]), 12)
    third = compose_view(second, torch.tensor([[0.0, 1, 4, 3]]), 6)
    np.testing.assert_allclose(second[0], (10, 20, 40, 50))
    np.testing.assert_allclose(third[0], (10, 25, 30, 35))
    found = compose_boxes(torch.cat((second, third)).numpy(), Viewport(5, 0, 125, 120, 130, 120), Crops((12, 6, 6), 60))
    np.testing.assert_allclose(found, [(5, 0, 125, 120), (25, 40, 85, 100), (25, 50, 65, 70)])


@pytest.mark.parametrize(("sizes", "source"), [((), 192), ((64, 96, 64), 0), ((64, 96, 32), 128)])
@torch.no_grad()
def test_experts_see_what_their_views_say(sizes, source):
    config = MGEConfig("plainnet_w16", ("a", "b"), image_size=64, image_sizes=sizes, source_size=source, resize=192)
    images = torch.randn(2, 3, config.frame_size, config.frame_size)
    output = MGENet(config).eval()(images)
    assert [expert.image.shape[2] for expert in output.experts] == list(config.sizes)
    if source:
        frame = images.permute(0, 2, 3, 1)
        torch.testing.assert_close(output.experts[0].image, shrink(frame, 64))
        for before, expert, size in zip(output.experts, output.experts[1:], config.sizes[1:], strict=False):
            torch.testing.assert_close(expert.image, crop_frame(frame, before.box, size))
            assert (before.box >= 0).all()
            assert (before.box <= source).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_sizes": (64, 64)}, "image_sizes is .* 3, one for each expert"),
        ({"image_sizes": (96, 64, 64)}, "image_sizes is .* the first 64"),
        ({"image_sizes": (64, 50, 64)}, "image_sizes is .* multiples of 16"),
        ({"source_size": 100}, r"source_size is 100; expected 0, or a multiple of image_size \(64\)"),
        ({"source_size": 256}, r"resize is 64; expected at least source_size \(256\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, named):
    with pytest.raises(CheckpointError, match=named):
        MGEConfig("plainnet_w16", ("a", "b"), image_size=64, resize=64, **changes)


def test_later_sizes_follow_the_first_the_source_stays():
    config = MGEConfig("plainnet_w16", ("a", "b"), image_size=448, image_sizes=(448, 320, 320))
    assert config.changed(image_size=224).sizes == config.changed(image_sizes=(224, 160, 160)).sizes == (224, 160, 160)
    config = MGEConfig("plainnet_w16", ("a", "b"), image_size=64, source_size=192, resize=192)
    assert config.changed(image_size=96).source_size == 192
    with pytest.raises(CheckpointError, match=r"source_size is 192; expected 0, or a multiple of image_size \(128\)"):
        config.changed(image_size=128)
