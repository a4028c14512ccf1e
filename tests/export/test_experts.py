import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from mge_export.experts import build_graphs, views
from mge_export.graph import export_graph
from mge_export.precision import Precision
from mge_export.runners import TypedRun, reference_tensors, run_chain
from mge_runtime.errors import ExportError
from mge_runtime.manifest import Manifest


def run_typed(graphs, frames):
    runs = {graph.spec.name: TypedRun(graph) for graph in graphs}
    return run_chain([graph.spec for graph in graphs], lambda spec, tensors: runs[spec.name](tensors), frames)


@pytest.mark.parametrize(
    ("normalize", "attention", "gate"), [(True, "own", "network"), (False, "first", "shared"), (True, "own", "none")]
)
def test_the_graphs_in_a_row_are_the_model(tiny, photographs, normalize, attention, gate):
    model = tiny.make_model(3, normalize=normalize, attention=attention, gate=gate)
    frames = tiny.load_frames(photographs, model.config.preprocess)
    graphs = build_graphs(model, Precision.FP32)
    expected = reference_tensors(model, frames)
    found = run_typed(graphs, frames)
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


def test_attention_of_the_first_head_is_another_attention(tiny, photographs):
    own, first = tiny.make_model(3), tiny.make_model(3, attention="first")
    frames = tiny.load_frames(photographs, own.config.preprocess)
    for model in (own, first):
        graphs = build_graphs(model, Precision.FP32)
        model.found = run_typed(graphs, frames)["heatmap_2"]
    assert np.abs(own.found - first.found).max() > 0.1 * np.abs(own.found).max()


def test_exporting_leaves_the_model_as_it_was(tiny):
    model = tiny.make_model(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build_graphs(model, Precision.FP16)
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_specifications_wire_to_a_chain(tiny, experts):
    model = tiny.make_model(experts)
    config = model.config
    manifest = Manifest(
        model={},
        class_names=config.classes,
        preprocess=config.preprocess,
        graphs=tuple(graph.spec for graph in build_graphs(model, Precision.FP32)),
        views=views(config),
        gate="gate" if experts > 1 else None,
        gmacs={f"expert_{k}": 1.0 for k in range(1, experts + 1)},
    )
    manifest.check()
    assert manifest.answer == "logits"
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
        expected = model(graph.normalize(frame)).experts[0].logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_thresholds_belong_to_their_crop(tiny):
    model = tiny.make_model(3)
    model.config = dataclasses.replace(model.config, box_thresholds=(0.3, 0.7))
    graphs = build_graphs(model, Precision.FP32)
    assert [graph.threshold for graph in graphs] == [0.3, 0.7, None]


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_the_attention_costs_a_row_and_a_pooling(tiny, precision):
    graph = export_graph(build_graphs(tiny.make_model(), precision)[0]).model.graph
    kinds = Counter(node.op_type for node in graph.node)
    # One map is averaged, c5; no map is expanded, and no class picked by a product over all of them.
    assert (kinds["ReduceMean"], kinds["Expand"], kinds["MatMul"], kinds["Equal"]) == (1, 0, 0, 0)
    (pool,) = (node for node in graph.node if node.op_type == "GlobalMaxPool")
    (conv,) = (node for node in graph.node if pool.input[0] in node.output)  # in half: no Cast of the whole map
    assert (conv.op_type, "part_conv" in conv.input[1]) == ("Conv", True)
