import collections

import numpy as np
import pytest
import torch
from torch import nn

from mge.model import GlobalHead
from mge_export.dual_head import DualHead
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.errors import ExportError

onnxruntime = load_onnxruntime()

CHANNELS, CLASSES, SIDE = 24, 5, 3


class DeepHead(nn.Module):
    """Normalized features, a hidden layer, two non-linearities: no closed form."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.hidden = nn.Linear(CHANNELS, 16)
        self.output = nn.Linear(16, CLASSES)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, features):
        pooled = nn.functional.normalize(self.norm(features).relu().mean((2, 3)))
        return self.output(self.hidden(pooled).relu())


class IndexHead(nn.Module):
    def forward(self, features):
        return features.mean((2, 3)).argsort(1)


def make_head(kind):
    torch.manual_seed(1)
    return (GlobalHead(CHANNELS, CLASSES) if kind == "linear" else DeepHead()).eval()


def by_autograd(head, features):
    features = features.clone().requires_grad_()
    scores = head(features)
    best = scores.max(1).values.sum()
    return scores.detach(), torch.autograd.grad(best, features)[0]


@pytest.mark.parametrize("kind", ["linear", "deep"])
def test_scores_and_gradient_are_those_of_autograd(kind):
    """In evaluation mode, whatever mode the head comes in."""
    head = make_head(kind)
    dual = DualHead(head.train(), torch.zeros(1, CHANNELS, SIDE, SIDE))
    assert (dual.graph is None) is (kind == "linear")
    for batch in (1, 2, CLASSES, 7):
        features = torch.randn(batch, CHANNELS, SIDE, SIDE)
        scores, gradient = by_autograd(head, features)
        assert gradient.abs().max() > 1e-3
        with torch.no_grad():
            found = dual(features)
        for ours, theirs in zip(found, (scores, gradient), strict=True):
            torch.testing.assert_close(ours.expand_as(theirs), theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


def test_as_many_classes_as_images_in_the_example_tie_nothing_together():
    head = nn.Sequential(GlobalHead(CHANNELS, 2), nn.Tanh())
    dual = DualHead(head, torch.zeros(2, CHANNELS, 2, 2))
    features = torch.randn(7, CHANNELS, 2, 2)
    expected = by_autograd(head, features)[1]
    with torch.no_grad():
        torch.testing.assert_close(dual(features)[1], expected)


@pytest.mark.parametrize("kind", ["linear", "deep"])
def test_the_onnx_graph_is_plain_and_its_batch_dynamic(kind):
    head = make_head(kind)
    features = torch.randn(2, CHANNELS, SIDE, SIDE)
    dual = DualHead(head, features).eval().requires_grad_(False)
    program = torch.onnx.export(
        dual, (features,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    operators = collections.Counter(node.op_type for node in program.model_proto.graph.node)
    assert not {name for name in operators if name.startswith(("Scatter", "NonZero", "Loop", "If", "OneHot"))}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (1, CLASSES):
        features = torch.randn(batch, CHANNELS, SIDE, SIDE)
        scores, gradient = by_autograd(head, features)
        found = session.run(None, {session.get_inputs()[0].name: features.numpy()})
        np.testing.assert_allclose(found[0], scores.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.broadcast_to(found[1], gradient.shape), gradient.numpy(), rtol=1e-5, atol=1e-7)


def test_a_head_without_a_derivative_is_refused():
    with pytest.raises(ExportError, match=r"IndexHead.*expected a differentiable head"):
        DualHead(IndexHead(), torch.zeros(1, CHANNELS, SIDE, SIDE))


class DetachedHead(nn.Module):
    def forward(self, features):
        return features.detach().mean((2, 3)) + 0 * features.mean((2, 3))


def test_a_head_whose_gradient_is_zero_is_refused():
    with pytest.raises(ExportError, match=r"cannot trace the gradient of DetachedHead: .* zero everywhere"):
        DualHead(DetachedHead(), torch.zeros(1, CHANNELS, SIDE, SIDE))
