"""PyTorch's ways of computing a checkpoint (benchmarks/pytorch.py) predict as the model itself does."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.pytorch import AUTHORS, COMPILED, MODEL, AuthorsChain, Unavailable, pytorch_ways, split_backbone
from mge.data.folder import normalize
from mge.model import create_backbone

# Relative to the largest logit. The same products are summed in another order (autograd's gradient, the padded
# convolution, two-dimensional interpolation): a few float32 roundings (6e-8) through a dozen layers.
ROUNDING = 1e-5


def images_of(model, frames):
    return torch.stack([normalize(frame, model.config) for frame in frames])


@pytest.fixture(params=[(2, True, "own"), (3, False, "own"), (3, True, "first")], ids=["norms", "plain", "first head"])
def model(request, tiny, photographs):
    experts, normalized, attention = request.param
    model = tiny.make_model(experts, normalize=normalized, attention=attention)
    return tiny.center_heads(model, tiny.load_frames(photographs, model.config.preprocess))


@torch.no_grad()
def assert_same(found, expected):
    scale = float(expected.logits.abs().max())
    assert torch.equal(found.logits.argmax(1), expected.logits.argmax(1))
    assert torch.allclose(found.logits, expected.logits, rtol=0, atol=ROUNDING * scale)
    assert torch.allclose(found.gate, expected.gate, rtol=0, atol=ROUNDING)
    boxes = [[[int(side) for side in box] for box in crop] for crop in found.boxes]
    assert boxes == [expert.box.int().tolist() for expert in expected.experts if expert.box is not None]


@torch.no_grad()
def test_the_authors_way_predicts_as_the_model(model, tiny, photographs):
    images = images_of(model, tiny.load_frames(photographs, model.config.preprocess))
    expected = model(images)
    assert_same(AuthorsChain(model)(images), expected)
    # Crops and classes that differ from image to image, or agreement would prove little.
    assert len(expected.logits.argmax(1).unique()) > 1
    for expert in expected.experts[:-1]:
        assert len(expert.box.unique(dim=0)) > 1


@torch.no_grad()
def test_a_flat_map_is_not_cropped(tiny):
    model = tiny.make_model()
    images = torch.zeros(2, 3, 64, 64)
    images[1] = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0))
    model.experts[0].global_head.fc.weight.zero_()
    found = AuthorsChain(model)(images)
    assert [[int(side) for side in box] for box in found.boxes[0]] == [[0, 0, 64, 64]] * 2
    assert_same(found, model(images))


@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet10t", "plainnet_w16", "efficientnet_lite0"])
def test_backbones_are_cut_at_c4(arch):
    backbone = create_backbone(arch)[0].eval()
    lower, upper = split_backbone(backbone, 64)
    image = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    c4, c5 = backbone(image)
    assert torch.equal(lower(image), c4)
    assert torch.equal(upper(c4), c5)


class Crossed(nn.Sequential):
    def forward(self, image):
        c4 = self[0](image) + 1  # which no module gives
        return c4, self[1](c4)


def test_other_backbones_are_refused():
    with pytest.raises(Unavailable, match=r"^Crossed cannot be cut at c4.*a row of modules$"):
        split_backbone(Crossed(nn.Conv2d(3, 3, 16, 16), nn.Conv2d(3, 3, 2, 2)).eval(), 64)


def test_ways_predict_as_the_model_and_what_does_not_work_here_says_why(tiny, photographs, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler\nand many lines more")

    monkeypatch.setattr(torch, "compile", refuse)
    model = tiny.make_model()
    frames = tiny.load_frames(photographs, model.config.preprocess)
    with torch.no_grad():
        expected = model(images_of(model, frames)).logits.numpy()
    ways = dict(pytorch_ways(model, frames, torch.get_num_threads(), "cpu"))
    assert list(ways) == [AUTHORS, MODEL, COMPILED], "what takes long comes last"
    assert str(ways[COMPILED]) == "no C++ compiler"
    for name in (AUTHORS, MODEL):
        assert np.abs(ways[name]() - expected).max() <= ROUNDING * np.abs(expected).max()


def test_compiled_predicts_as_the_model(tiny, monkeypatch):
    """Traced as for the benchmark, backward included, but without generated code, which takes minutes to compile."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = tiny.make_model(size=32)
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    way = dict(pytorch_ways(model, frames, torch.get_num_threads(), "cpu"))[COMPILED]
    with torch.no_grad():
        expected = model(images_of(model, frames)).logits.numpy()
    assert np.abs(way() - expected).max() <= ROUNDING * np.abs(expected).max()
