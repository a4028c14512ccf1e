from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mge_export.experts import build_graphs
from mge_export.parity import Check, Differences, ParityReport, measure_parity
from mge_export.precision import Precision
from mge_export.runners import Peak, TypedRun


def measure(exported, graphs):
    return measure_parity(exported.model, graphs, exported.folder, exported.precision, exported.images, lambda _: None)


class FrozenHead(nn.Module):
    """What a naive trace leaves: the gradient of the example's class, whatever the image shows."""

    def __init__(self, dual_head, example):
        super().__init__()
        self.dual_head = dual_head
        self.gradient = dual_head(example)[1][:1]

    def forward(self, features):
        return self.dual_head(features)[0], self.gradient.expand_as(features)


# In FP32 the modules run on one image alone, and one may have another map; its graphs are checked on all.
@pytest.mark.parametrize("exported", [Precision.FP16], indirect=True, ids=["fp16"])
@torch.no_grad()
def test_a_map_frozen_to_the_examples_class_is_caught(exported):
    graphs = build_graphs(exported.model, exported.precision)
    graphs[0].dual_head = FrozenHead(graphs[0].dual_head, torch.rand(1, 512, 2, 2))
    failures = measure(exported, graphs).failures
    assert any(line.startswith("torch expert_1: heatmap_1 differs") for line in failures)
    assert not any(line.startswith("onnx") for line in failures)


@torch.no_grad()
def test_another_threshold_and_a_wrong_weight_are_caught_and_reported(exported):
    graphs = build_graphs(exported.model, exported.precision)
    graphs[0].threshold = 0.7
    graphs[1].expert.concat_head.weight.data[:, 0] += 1
    report = measure(exported, graphs)
    assert any(line.startswith("torch expert_1 box_1: median box IoU") for line in report.failures)
    in_chain = any(line.startswith("torch chain box_1: median box IoU") for line in report.failures)
    assert in_chain == (exported.precision is Precision.FP32)
    assert any(line.startswith("torch expert_2: logits_2 differs") for line in report.failures)
    assert report.to_dict()["failures"] == report.failures


def empty_report(precision, peaks, count=100):
    images = SimpleNamespace(count=count, photographs=True, source="one")
    return ParityReport(precision, images, [], peaks)


def test_an_activation_beyond_half_fails_an_fp16_export_alone_and_above_a_tenth_of_it_is_called_out():
    for value in (70000.0, float("inf"), float("nan")):
        peaks = {"gate": Peak(value, "aten.convolution.default")}
        assert "overflows FP16" in empty_report(Precision.FP16, peaks).failures[0]
        assert empty_report(Precision.FP32, peaks).failures == []
    report = empty_report(Precision.FP16, {"gate": Peak(7000.0, "aten.convolution.default")})
    assert report.failures == []
    assert "gate: the largest activation is 7000" in report.warnings[0]
    assert empty_report(Precision.FP16, {"gate": Peak(6000.0, "x")}).warnings == []


def typed_run(function):
    """A graph of one expert's type that computes a function of its image."""
    spec = SimpleNamespace(inputs=[SimpleNamespace(name="x")], outputs=[SimpleNamespace(name="y")])
    graph = type("Graph", (), {"__call__": lambda _, x: [function(x)]})()
    graph.spec, graph.normalize, graph.precision = spec, None, Precision.FP16
    return TypedRun(graph)


def test_the_watch_sees_functional_calls_infinities_and_its_own_type_alone():
    def convolve(x):
        wide = nn.functional.conv2d(x, torch.full((1, 3, 1, 1), 1e9))
        half = nn.functional.conv2d(x.half(), torch.full((1, 3, 1, 1), -20.0).half())
        assert wide.max() > 1e9
        return half

    image = {"x": np.ones((1, 3, 4, 4), np.float32)}
    run = typed_run(convolve)
    run(image)
    assert run.peak == Peak(60.0, "aten.convolution.default")
    run = typed_run(lambda x: x.half() * 60000 * 2)
    run(image)
    assert run.peak.value == float("inf")


def test_sums_of_halves_are_rounded_once():
    torch.manual_seed(0)
    layer, image = nn.Conv2d(16, 8, 3).half().requires_grad_(False), torch.randn(2, 16, 8, 8).half()
    found = typed_run(lambda x: layer(x.half()))({"x": image.float().numpy()})["y"]
    assert found.dtype == np.float16
    exact = nn.functional.conv2d(image.double(), layer.weight.double(), layer.bias.double())
    ulp = 2.0**-10 * exact.abs().clamp(min=2.0**-14)
    assert ((torch.from_numpy(found).double() - exact).abs() <= ulp).all()
    np.testing.assert_allclose(found, layer(image).numpy(), rtol=2e-3, atol=2e-3)


def test_boxes_and_classes_of_the_chain_are_checked():
    def failures(boxes, changes=0, margin=0.0):
        chain = Differences()
        chain.box_iou["box_1"] = boxes
        chain.class_changes["logits"] = [index < changes for index in range(len(boxes))]
        chain.class_margins["logits"] = [margin if index < changes else 0.0 for index in range(len(boxes))]
        report = empty_report(Precision.FP32, {}, len(boxes))
        report.checks.append(Check("onnx", "", {}, chain))
        return report.failures

    assert failures([1.0] * 99) == failures([1.0] * 99, 1, margin=1e-5) == []
    assert failures([0.5])[0].startswith("onnx chain box_1: median box IoU 0.500")
    assert "onnx chain logits: 1 of 99 images" in failures([1.0] * 99, 1, margin=1e-3)[0]
    assert "1 of 1 " in failures([1.0], 1, margin=float("nan"))[0]


def test_fp16_on_few_images_says_that_it_says_little():
    report = empty_report(Precision.FP16, {}, 99)
    assert "class agreement on 99 images says little" in report.warnings[0]
    assert empty_report(Precision.FP16, {}, 100).warnings == []
    assert empty_report(Precision.FP32, {}, 99).warnings == []
