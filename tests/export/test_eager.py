"""PyTorch's ways of computing a checkpoint answer as the model itself does."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mge.backbones import create_trunk
from mge.checkpoint import save_checkpoint
from mge_export import eager
from mge_export.eager_chain import AuthorsChain
from mge_export.eager_trunk import EagerUnavailable, split_trunk
from mge_runtime.errors import InputError

# Relative to the largest logit. The same products are summed in another order (autograd's gradient, the padded
# convolution, two-dimensional interpolation): a few float32 roundings (6e-8) through a dozen layers.
ROUNDING = 1e-5


@pytest.fixture(params=[(2, True, "own"), (3, False, "own"), (3, True, "first")], ids=["norms", "plain", "first head"])
def model(request, tiny, photographs):
    experts, normalize, attention = request.param
    model = tiny.make_model(experts, normalize=normalize, attention=attention)
    return tiny.center_heads(model, tiny.load_frames(photographs, model.config.preprocess))


@pytest.fixture
def frames(model, tiny, photographs):
    return tiny.load_frames(photographs, model.config.preprocess)


@torch.no_grad()
def assert_same(answer, expected):
    scale = float(expected.logits.abs().max())
    assert torch.equal(answer.logits.argmax(1), expected.logits.argmax(1))
    assert torch.allclose(answer.logits, expected.logits, rtol=0, atol=ROUNDING * scale)
    assert torch.allclose(answer.gate, expected.gate, rtol=0, atol=ROUNDING)
    boxes = [[[int(side) for side in box] for box in crop] for crop in answer.boxes]
    assert boxes == [expert.box.int().tolist() for expert in expected.experts if expert.box is not None]


@torch.no_grad()
def test_the_authors_way_answers_as_the_model(model, frames):
    images = eager.to_images(frames, model.config)
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
    answer = AuthorsChain(model)(images)
    assert [[int(side) for side in box] for box in answer.boxes[0]] == [[0, 0, 64, 64]] * 2
    assert_same(answer, model(images))


@torch.no_grad()
def test_gradients_are_autograds_and_do_not_add_up(tiny):
    """Weights get gradients as in the authors' code; from run to run they are made anew."""
    model = tiny.make_model()
    images = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    chain = AuthorsChain(model)
    gradients = []
    for _ in range(2):
        chain(images)
        trunk = model.experts[0].trunk
        assert trunk["layer3"][0].conv1.weight.grad is None  # below c4 nothing is differentiated
        gradients.append(trunk["layer4"][0].conv1.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet10t", "plainnet_w16", "lcnet_050", "efficientnet_lite0"])
def test_trunks_are_cut_at_c4(arch):
    trunk = create_trunk(arch)[0].eval()
    lower, upper = split_trunk(trunk, 64)
    image = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    c4, c5 = trunk(image)
    assert torch.equal(lower(image), c4)
    assert torch.equal(upper(c4), c5)


class Crossed(nn.Module):
    """Features that a row of modules does not give."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 16, 16), nn.Conv2d(3, 3, 2, 2)

    def forward(self, image):
        c4 = self.first(image) + 1
        return c4, self.second(c4)


def test_other_trunks_are_refused():
    with pytest.raises(EagerUnavailable, match=r"^Crossed cannot be cut at c4.*a row of modules$"):
        split_trunk(Crossed().eval(), 64)


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    model = tiny.make_model()
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(path, model)
    return model, path


@pytest.fixture
def refused(monkeypatch):
    """torch.compile without a C++ compiler."""

    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler\nand many lines more")

    monkeypatch.setattr(torch, "compile", refuse)


@pytest.mark.usefixtures("refused")
def test_contenders_of_a_checkpoint(checkpoint, tiny, photographs):
    model, path = checkpoint
    frames = tiny.load_frames(photographs, model.config.preprocess)
    threads = torch.get_num_threads()
    found = list(eager.eager_contenders(path, frames, threads, "cpu"))
    assert [way.name for way in found] == [eager.AUTHORS, eager.MODEL, eager.COMPILED], "what takes long comes last"
    authors, plain, compiled = found
    assert isinstance(compiled, EagerUnavailable)
    assert str(compiled) == "torch.compile does not work here: no C++ compiler"
    with torch.no_grad():
        expected = model(eager.to_images(frames, model.config)).logits.numpy()
    for way in (authors, plain):
        assert way.unit == "ms"
        way.run()
        assert np.abs(way.logits - expected).max() <= ROUNDING * np.abs(expected).max()
        way.close()
        with pytest.raises(EagerUnavailable, match="is closed"):
            way.run()


@pytest.mark.usefixtures("refused")
def test_a_failure_is_one_line(checkpoint, monkeypatch):
    way = next(eager.eager_contenders(checkpoint[1], np.zeros((1, 64, 64, 3), np.uint8), None, "cpu"))

    def refuse(*_):
        raise torch.OutOfMemoryError("no memory left\nand many lines more")

    monkeypatch.setattr(AuthorsChain, "__call__", refuse)
    with pytest.raises(EagerUnavailable, match=r"^PyTorch eager, the authors' way failed: no memory left$"):
        way.run()


@pytest.mark.usefixtures("refused")
def test_threads_are_set_where_the_work_is_done(checkpoint):
    before = torch.get_num_threads()
    way = next(eager.eager_contenders(checkpoint[1], np.zeros((1, 64, 64, 3), np.uint8), before + 1, "cpu"))
    try:
        torch.set_num_threads(before)
        way.run()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_without_a_number_of_threads_pytorch_takes_what_the_chain_takes(checkpoint):
    """OMP_NUM_THREADS sets PyTorch's default and not ONNX Runtime's: one would compute with less than the other."""
    code = (
        "import sys, numpy, torch\n"
        "from pathlib import Path\n"
        "from mge_runtime.bench import toolchain\n"
        "assert torch.get_num_threads() == 1\n"
        "toolchain.cpu_count = lambda: 3\n"  # a test machine may have one processor
        "torch.compile = None\n"  # compiling takes long, and is not what this is about
        "frames = numpy.zeros((1, 64, 64, 3), numpy.uint8)\n"
        "way = toolchain.eager_contenders(Path(sys.argv[1]), frames, None, 'cpu')[0][-1]\n"
        "way.run()\n"
        "print(way.name, way.threads, torch.get_num_threads(), sep=',')"
    )
    command = [sys.executable, "-c", code, str(checkpoint[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert out.strip() == f"{eager.MODEL},3,3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_a_reason_for_each_way(checkpoint):
    found = list(eager.eager_contenders(checkpoint[1], np.zeros((1, 64, 64, 3), np.uint8), None, "cuda:0"))
    assert [isinstance(way, EagerUnavailable) for way in found] == [True] * 6
    assert len({way.name for way in found}) == 6
    for way in found:
        assert str(way).startswith("PyTorch cannot use cuda:0: ")
        assert "\n" not in str(way)


@pytest.mark.parametrize(
    "frames", [np.zeros((1, 32, 64, 3), np.uint8), np.zeros((0, 64, 64, 3), np.uint8), np.zeros((1, 64, 64, 3))]
)
def test_other_frames_are_refused(checkpoint, frames):
    with pytest.raises(InputError, match=r"takes uint8 \[B, 64, 64, 3\]"):
        eager.eager_contenders(checkpoint[1], frames, None, "cpu")


@pytest.mark.slow
def test_compiled_answers_as_the_model(tiny):
    """Two experts: a compiled backward lies between them."""
    model = tiny.make_model(size=32)
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    try:
        way = eager.CompiledContender(model, frames, None, "cpu")
    except EagerUnavailable as reason:
        pytest.skip(str(reason))
    way.run()
    with torch.no_grad():
        expected = model(eager.to_images(frames, model.config)).logits.numpy()
    assert np.array_equal(way.logits.argmax(1), expected.argmax(1))
    # Fused loops round otherwise than one kernel for each operation; boxes may differ, as between any two builds.
    assert np.abs(way.logits - expected).max() <= 1e-3 * np.abs(expected).max()
