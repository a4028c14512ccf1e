"""A model split into typed modules, one for each expert, with its BatchNorms folded."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from torch import nn

from mge_export.experts import build_graphs, views
from mge_export.precision import Precision
from mge_export.runners import TypedRun, reference_tensors
from mge_export.typed import fold_batch_norms
from mge_runtime.errors import ExportError
from mge_runtime.manifest import Manifest
from tests.helpers.tiny_models import run_chain

IMAGE = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))


def run_typed(graphs, frames):
    runs = {graph.spec.name: TypedRun(graph) for graph in graphs}
    return run_chain([graph.spec for graph in graphs], lambda spec, tensors: runs[spec.name](tensors), frames)


@pytest.mark.parametrize(
    ("normalize", "attention", "gate"), [(True, "own", "network"), (False, "first", "shared"), (True, "own", "none")]
)
def test_the_graphs_in_a_row_are_the_model(tiny, photographs, normalize, attention, gate):
    model = tiny.make_model(3, normalize=normalize, attention=attention, gate=gate)
    frames = tiny.load_frames(photographs, model.config.preprocess)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build_graphs(model, Precision.FP16)
    graphs = build_graphs(model, Precision.FP32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # left as it was
    expected = reference_tensors(model, frames)
    found = run_typed(graphs, frames)
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_specifications_wire_to_a_chain(tiny, experts):
    model = tiny.make_model(experts)
    thresholds = (0.3, 0.7)[: experts - 1]
    model.config = config = dataclasses.replace(model.config, box_thresholds=thresholds)
    graphs = build_graphs(model, Precision.FP32)
    assert [graph.threshold for graph in graphs] == [*thresholds, None]
    manifest = Manifest(
        model={},
        class_names=config.classes,
        preprocess=config.preprocess,
        graphs=tuple(graph.spec for graph in graphs),
        views=views(config),
        crops=config.crops,
        gate="gate" if experts > 1 else None,
        gmacs={f"expert_{k}": 1.0 for k in range(1, experts + 1)},
    )
    manifest.check()
    assert manifest.logits == "logits"
    assert [graph.logits for graph in manifest.graphs[:-1]] == [f"mean_logits_{k}" for k in range(1, experts)]
    names = [{tensor.name for tensor in graph.outputs} for graph in manifest.graphs]
    assert ["gate" in outputs for outputs in names] == [False] * (experts - 1) + [experts > 1]


def test_a_weight_that_overflows_half_is_named(tiny):
    model = tiny.make_model(2)
    model.experts[1].part_conv.weight.data[0, 0] = 1e5
    build_graphs(model, Precision.FP32)
    with pytest.raises(ExportError, match=r"part_conv\.weight is not finite in fp16.*65504"):
        build_graphs(model, Precision.FP16)


def test_weights_that_become_zero_in_half_are_counted(tiny):
    model = tiny.make_model(2)
    model.experts[1].part_conv.weight.data[0, :7] = 1e-9
    assert sum(graph.underflowed for graph in build_graphs(model, Precision.FP32)) == 0
    before = build_graphs(tiny.make_model(2), Precision.FP16)
    after = build_graphs(model, Precision.FP16)
    assert after[0].underflowed == before[0].underflowed
    assert after[1].underflowed == before[1].underflowed + 7


def test_a_large_variance_is_folded_before_it_could_overflow(tiny):
    model = tiny.make_model(2)
    norm = model.experts[0].backbone.bn1
    norm.running_var.fill_(1e6)
    norm.weight.data *= 1e3
    graph = build_graphs(model, Precision.FP16)[0]
    frame = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        found = graph(frame)[0]
        expected = model(graph.normalize(frame.permute(0, 3, 1, 2).float())).experts[0].logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_the_attention_costs_a_row_and_a_pooling(exported):
    graph = exported.graphs["expert_1"].graph
    kinds = Counter(node.op_type for node in graph.node)
    # One map is averaged, c5; no map is expanded, and no class picked by a product over all of them.
    assert (kinds["ReduceMean"], kinds["Expand"], kinds["MatMul"], kinds["Equal"]) == (1, 0, 0, 0)
    (pool,) = (node for node in graph.node if node.op_type == "GlobalMaxPool")
    (conv,) = (node for node in graph.node if pool.input[0] in node.output)  # in half: no Cast of the whole map
    assert (conv.op_type, "part_conv" in conv.input[1]) == ("Conv", True)


class TwoReaders(nn.Module):
    """A convolution that feeds a BatchNorm and something else: folding would change the latter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_var.fill_(9)

    def forward(self, image):
        features = self.conv(image)
        return [self.norm(features), features]


def randomized(backbone):
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
    return backbone.eval()


@pytest.mark.parametrize("arch", ["resnet10t", "tf_efficientnet_lite0"])  # plain BatchNorms; with an activation inside
@torch.no_grad()
def test_a_folded_backbone_computes_as_before_without_batch_norms(arch):
    torch.manual_seed(0)
    backbone = randomized(timm.create_model(arch, features_only=True, out_indices=(-2, -1)))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    before = backbone(IMAGE)
    assert fold_batch_norms(backbone, IMAGE) == norms > 0
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    for found, expected in zip(backbone(IMAGE), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_a_convolution_with_a_second_reader_is_left_alone():
    torch.manual_seed(0)
    backbone = TwoReaders().eval()
    before = backbone(IMAGE)
    assert fold_batch_norms(backbone, IMAGE) == 0
    for found, expected in zip(backbone(IMAGE), before, strict=True):
        assert torch.equal(found, expected)
