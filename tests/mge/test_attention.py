"""Attention against the same arithmetic written out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mge.attention import (
    StatesGradient,
    attention_box,
    class_gradient,
    crop_resize,
    extent_box,
    grad_cam,
    normalized_maxima,
    propose_threshold,
)
from mge.model import GlobalHead, MGENet
from mge.training.recipe import loss_terms
from mge_runtime.errors import TrainingError
from tests.helpers import by_hand
from tests.helpers.tiny_models import tiny_config


def boxes_of(kept, size=10):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    for rows, columns in kept:
        mask[0, rows, columns] = True
    (box,) = extent_box(torch.stack((mask.any(1), mask.any(2)), 2)).tolist()
    return box


@pytest.mark.parametrize(
    ("kept", "box"),
    [
        ([(slice(2, 7), slice(3, 9))], [3, 2, 8, 6]),  # it ends before the last kept pixel: row 6, column 8
        ([(1, 8), (9, 0)], [0, 1, 8, 9]),  # around components that do not touch
        # Without area it becomes the whole image.
        ([], [0, 0, 10, 10]),
        ([(4, 4)], [0, 0, 10, 10]),
        ([(4, 1), (4, 8)], [0, 0, 10, 10]),
        ([(1, 4), (8, 4)], [0, 0, 10, 10]),
    ],
)
def test_a_box_spans_what_is_kept(kept, box):
    assert boxes_of(kept) == box


def test_a_flat_map_keeps_the_whole_image():
    assert attention_box(torch.full((1, 4, 4), 3.0), 32, 0.2).tolist() == [[0, 0, 32, 32]]
    assert torch.equal(normalized_maxima(torch.full((1, 3, 3), 7.0), 9), torch.zeros(1, 9, 2))


def test_a_map_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="4 x 5 cells; expected a square one"):
        attention_box(torch.zeros(1, 4, 5), 32, 0.2)


def upsampled(cam, size):
    """The whole map, scaled to [0, 1]."""
    full = F.interpolate(cam[:, None], (size, size), mode="bilinear", align_corners=True)[:, 0]
    low, high = full.amin((1, 2), keepdim=True), full.amax((1, 2), keepdim=True)
    return (full - low) / (high - low)


@pytest.mark.parametrize(("cells", "size"), [(14, 448), (7, 40), (4, 10), (7, 9), (2, 8), (9, 6)])
def test_maxima_are_those_of_the_whole_upsampled_map(cells, size):
    cam = torch.randn(50, cells, cells, generator=torch.Generator().manual_seed(0))
    full = upsampled(cam, size)
    found = normalized_maxima(cam, size)
    torch.testing.assert_close(found, torch.stack((full.amax(1), full.amax(2)), 2), atol=2e-6, rtol=0)
    assert (found.amax((1, 2)) == 1).all()


def test_crop_resize_equals_slicing_and_interpolating():
    random = np.random.default_rng(0)
    images = torch.randn(20, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    corners = [
        sorted(random.choice(34, 2, replace=False)) + sorted(random.choice(34, 2, replace=False)) for _ in images
    ]
    boxes = torch.tensor([[x0, y0, x1, y1] for x0, x1, y0, y1 in corners], dtype=torch.float32)
    boxes[0] = torch.tensor([5, 7, 6, 8])  # a single pixel
    boxes[1] = torch.tensor([0, 0, 33, 33])
    crops = crop_resize(images, boxes, 33)
    for image, box, crop in zip(images, boxes.int().tolist(), crops, strict=True):
        torch.testing.assert_close(crop, by_hand.crop_of(image, box, 33), atol=1e-5, rtol=0)
    torch.testing.assert_close(crops[1], images[1], atol=1e-5, rtol=0)


class DetachedHead(torch.nn.Module):
    """Its scores depend on the features; autograd does not know."""

    def forward(self, features):
        return features.detach().mean((2, 3)) + 0 * features.mean((2, 3))


def make_head(route):
    torch.manual_seed(0)
    head = GlobalHead(8, 5)
    return head if route == "stated" else torch.nn.Sequential(head, torch.nn.Tanh(), torch.nn.Linear(5, 5))


@pytest.mark.parametrize("labels", [torch.tensor([4, 0, 2, 2]), None], ids=["labels", "first guess"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("route", ["stated", "differentiated"])
def test_class_gradient_is_autograd_of_the_chosen_score(route, mode, labels):
    head = make_head(route)
    features = torch.randn(4, 8, 3, 3, requires_grad=True)
    wanted_scores = head(features)
    classes = wanted_scores.argmax(1) if labels is None else labels
    (wanted,) = torch.autograd.grad(wanted_scores.gather(1, classes[:, None]).sum(), features)
    with mode():
        scores, gradient = class_gradient(head, features.detach().clone(), labels)
    torch.testing.assert_close(scores, wanted_scores, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.expand_as(wanted), wanted, rtol=1e-6, atol=1e-9)
    assert isinstance(head, StatesGradient) is (route == "stated")
    assert all(parameter.grad is None for parameter in head.parameters())


def test_attention_in_inference_mode_is_attention():
    model = MGENet(tiny_config(experts=2)).eval()
    head = torch.nn.Sequential(model.experts[0].global_head, torch.nn.Sigmoid())  # states nothing
    model.attention_head = lambda _: head
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(images)
    with torch.inference_mode():
        found = model(images)
    assert wanted.experts[0].heatmap.abs().max() > 0
    assert torch.equal(found.experts[0].heatmap, wanted.experts[0].heatmap)
    assert torch.equal(found.experts[1].image, wanted.experts[1].image)


def test_a_gradient_of_zeros_is_refused_where_the_scores_depend_on_the_features():
    with pytest.raises(TrainingError, match=r"DetachedHead is zero everywhere.*torch \d.*inference mode off.*no_grad"):
        class_gradient(DetachedHead(), torch.randn(2, 5, 3, 3))
    # It stands where the scores do not move.
    head = torch.nn.Sequential(GlobalHead(8, 5), torch.nn.Threshold(1e3, 7))
    assert not class_gradient(head, torch.randn(2, 8, 3, 3))[1].any()


@pytest.mark.parametrize("cells", [4, 1], ids=["cell by cell", "the same at every cell"])
def test_grad_cam_takes_the_relu_of_the_gradient_before_the_mean(cells):
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(2, 3, cells, cells, generator=torch.Generator().manual_seed(2))
    expected = np.zeros((2, 4, 4))
    for b in range(2):
        for k in range(3):
            expected[b] += np.maximum(gradient[b, k].numpy(), 0).mean() * features[b, k].numpy()
    np.testing.assert_allclose(grad_cam(features, gradient).numpy(), expected, rtol=1e-5, atol=1e-6)


class TensorsFromPython(TorchDispatchMode):
    """Counts tensors made of Python's numbers: on a GPU each is a copy that waits for all that was asked for before."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def make_step(device="cpu"):
    """Forward, losses and backward of a chain of two crops; returns what runs it."""
    torch.manual_seed(0)
    model = MGENet(tiny_config(box_thresholds=(0.3, 0.5))).to(device)
    images, labels = torch.rand(2, 3, 64, 64, device=device), torch.tensor([0, 2], device=device)

    def step():
        terms = loss_terms(model(images, labels), labels, label_smoothing=0.1, diversity_form="code")
        torch.stack(list(terms.values())).sum().backward()

    return step


def test_no_step_but_the_first_makes_tensors_of_python_s_numbers():
    step = make_step()
    step()
    with TensorsFromPython() as made:
        step()
        assert made.count == 0
        torch.tensor(1.0)
        assert made.count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_step_waits_for_the_gpu():
    step = make_step("cuda")
    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_constants_first_made_in_inference_mode_serve_training():
    cam = torch.randn(1, 3, 3, requires_grad=True)
    with torch.inference_mode():
        wanted = normalized_maxima(cam, 23)  # no other test has this size
    found = normalized_maxima(cam, 23)
    found.sum().backward()
    assert torch.equal(found, wanted)
    assert cam.grad.any()


def test_attention_compiles_to_one_graph():
    def crop(cam, image):
        return crop_resize(image, attention_box(cam, 32, 0.3), 32)

    random = torch.Generator().manual_seed(0)
    cam, image = torch.randn(2, 4, 4, generator=random), torch.randn(2, 3, 32, 32, generator=random)
    compiled = torch.compile(crop, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cam, image), crop(cam, image))


def test_the_lowest_threshold_that_meets_the_target_is_proposed():
    maps = torch.rand(70, 5, 5, generator=torch.Generator().manual_seed(0))  # more than one chunk

    def median_area(threshold):
        boxes = attention_box(maps, 64, threshold)
        return ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 64**2).median()

    threshold = propose_threshold(maps, 64, 0.5)
    assert median_area(threshold) <= 0.5 < median_area(threshold - 0.05)
    assert propose_threshold(maps, 64, 1e-9) == 0.95
