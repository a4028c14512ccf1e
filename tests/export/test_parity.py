import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mge_export.activations import ActivationWatch, Peak
from mge_export.differences import box_iou
from mge_export.half_kernels import HalfKernels
from mge_export.parity import ParityReport, measure_parity
from mge_export.precision import Precision
from mge_export.report import format_report
from mge_export.stages import build_stages
from mge_export.tolerances import TOLERANCES


def measure(exported, stages):
    return measure_parity(exported.model, stages, exported.folder, exported.precision, exported.images, lambda _: None)


class FrozenHead(nn.Module):
    """What a naive trace leaves: the gradient of the example's class, whatever the image shows."""

    def __init__(self, dual_head, example):
        super().__init__()
        self.dual_head = dual_head
        self.gradient = dual_head(example)[1][:1]

    def forward(self, features):
        return self.dual_head(features)[0], self.gradient.expand_as(features)


@torch.no_grad()
def test_a_map_frozen_to_the_examples_class_is_caught(exported):
    stages = build_stages(exported.model, exported.precision)
    module = stages[1].module
    module.dual_head = FrozenHead(module.dual_head, torch.rand(1, 512, *module.map_shape))
    failures = measure(exported, stages).failures
    assert any(line.startswith("torch expert_1: heatmap_1 differs") for line in failures)
    assert not any(line.startswith("onnx") for line in failures)


@torch.no_grad()
def test_another_threshold_is_caught_by_the_boxes(exported):
    stages = build_stages(exported.model, exported.precision)
    stages[1].module.threshold = 0.7
    failures = measure(exported, stages).failures
    assert any(line.startswith("torch expert_1: median box IoU") for line in failures)
    in_chain = any(line.startswith("torch chain box_1: median box IoU") for line in failures)
    assert in_chain == (exported.precision is Precision.FP32)


@torch.no_grad()
def test_a_wrong_weight_is_caught_and_reported(exported):
    stages = build_stages(exported.model, exported.precision)
    stages[2].module.expert.concat_head.weight.data[:, 0] += 1
    report = measure(exported, stages)
    assert any(line.startswith("torch expert_2: logits_2 differs") for line in report.failures)
    assert "out of tolerance: torch expert_2: logits_2" in format_report(report)
    assert report.to_dict()["failures"] == report.failures


def empty_report(precision, peaks):
    images = SimpleNamespace(count=1, photographs=True, source="one")
    return ParityReport(precision, TOLERANCES[precision], images, [], peaks)


@pytest.mark.parametrize("value", [70000.0, float("inf"), float("nan")])
def test_an_activation_beyond_half_fails_an_fp16_export_alone(value):
    peaks = {"gate": Peak(value, "aten.convolution.default")}
    assert "overflows FP16" in empty_report(Precision.FP16, peaks).failures[0]
    assert empty_report(Precision.FP32, peaks).failures == []


def test_an_activation_above_a_tenth_of_half_is_called_out():
    report = empty_report(Precision.FP16, {"gate": Peak(7000.0, "aten.convolution.default")})
    assert report.failures == []
    assert "gate: the largest activation is 7000" in report.warnings[0]
    assert empty_report(Precision.FP16, {"gate": Peak(6000.0, "x")}).warnings == []


@torch.no_grad()
def test_the_watch_sees_functional_calls_infinities_and_its_own_type_alone():
    images = torch.ones(1, 3, 4, 4)
    watch = ActivationWatch(torch.float16)
    with watch:
        wide = torch.nn.functional.conv2d(images, torch.full((1, 3, 1, 1), 1e9))
        half = torch.nn.functional.conv2d(images.half(), torch.full((1, 3, 1, 1), -20.0).half())
    assert wide.max() > 1e9
    assert watch.peak == Peak(60.0, "aten.convolution.default")
    with watch:
        torch.mul(half, half * 100)
    assert watch.peak.value == float("inf")


@torch.no_grad()
def test_half_kernels_round_as_pytorchs_own():
    torch.manual_seed(0)
    layer, image = nn.Conv2d(16, 8, 3).half(), torch.randn(2, 16, 8, 8).half()
    own = layer(image)
    with HalfKernels():
        found = layer(image)
    assert found.dtype is torch.float16
    exact = nn.functional.conv2d(image.double(), layer.weight.double(), layer.bias.double())
    ulp = 2.0**-10 * exact.abs().clamp(min=2.0**-14)
    assert ((found.double() - exact).abs() <= ulp).all()
    torch.testing.assert_close(found, own, rtol=2e-3, atol=2e-3)


def test_iou_of_boxes():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 4, 4]], float)
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [5, 5, 9, 9]], float)
    np.testing.assert_allclose(box_iou(boxes, others), [1, 1 / 3, 0])


def test_tolerances_allow_one_image_in_the_figures_they_promise():
    assert TOLERANCES[Precision.FP32].allowed_changes(538) == 1
    assert TOLERANCES[Precision.FP16].allowed_changes(100) == 1
    assert TOLERANCES[Precision.FP16].allowed_changes(101) == 2
    assert dataclasses.asdict(TOLERANCES[Precision.FP32])["box_iou_median"] == 1.0
