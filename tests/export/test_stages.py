import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from mge_export.graph import export_graph
from mge_export.precision import Precision
from mge_export.runners import reference_tensors, run_chain, torch_runner
from mge_export.stages import build_stages, segments, views
from mge_runtime.errors import ExportError
from mge_runtime.manifest import Manifest


@pytest.mark.parametrize(("normalize", "attention"), [(True, "own"), (False, "first")])
def test_the_stages_in_a_row_are_the_model(tiny, photographs, normalize, attention):
    model = tiny.make_model(3, normalize=normalize, attention=attention)
    frames = tiny.load_frames(photographs, model.config.preprocess)
    stages = build_stages(model, Precision.FP32)
    expected = reference_tensors(model, frames)
    found = run_chain([stage.spec for stage in stages], torch_runner(stages, {}), frames)
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


def test_attention_of_the_first_head_is_another_attention(tiny, photographs):
    own, first = tiny.make_model(3), tiny.make_model(3, attention="first")
    frames = tiny.load_frames(photographs, own.config.preprocess)
    for model in (own, first):
        stages = build_stages(model, Precision.FP32)
        model.found = run_chain([stage.spec for stage in stages], torch_runner(stages, {}), frames)["heatmap_2"]
    assert np.abs(own.found - first.found).max() > 0.1 * np.abs(own.found).max()


def test_exporting_leaves_the_model_as_it_was(tiny):
    model = tiny.make_model(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build_stages(model, Precision.FP16)
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
        stages=tuple(stage.spec for stage in build_stages(model, Precision.FP32)),
        segments=segments(config),
        views=views(config),
        gate="gate" if experts > 1 else None,
    )
    manifest.check()
    assert manifest.answer == ("logits" if experts > 1 else "answer_1")
    assert [segment.answer for segment in manifest.segments[:-1]] == [f"answer_{k}" for k in range(1, experts)]
    assert all("gate" not in segment.stages for segment in manifest.segments[:-1])


def test_a_weight_that_overflows_half_is_named(tiny):
    model = tiny.make_model(2)
    model.experts[1].part_conv.weight.data[0, 0] = 1e5
    build_stages(model, Precision.FP32)
    with pytest.raises(ExportError, match=r"part_conv\.weight is not finite in fp16.*65504"):
        build_stages(model, Precision.FP16)


def test_weights_that_become_zero_in_half_are_counted(tiny):
    model = tiny.make_model(2)
    model.experts[1].part_conv.weight.data[0, :7] = 1e-9
    assert sum(stage.underflowed for stage in build_stages(model, Precision.FP32)) == 0
    before = build_stages(tiny.make_model(2), Precision.FP16)
    after = build_stages(model, Precision.FP16)
    assert after[1].underflowed == before[1].underflowed
    assert after[2].underflowed == before[2].underflowed + 7


def test_a_large_variance_is_folded_before_it_could_overflow(tiny):
    model = tiny.make_model(2)
    norm = model.experts[0].trunk.bn1
    norm.running_var.fill_(1e6)
    norm.weight.data *= 1e3
    stage = build_stages(model, Precision.FP16)[1]
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = stage.module(image)[0]
        expected = model(image).experts[0].logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_thresholds_belong_to_their_crop(tiny):
    model = tiny.make_model(3)
    model.config = dataclasses.replace(model.config, box_thresholds=(0.3, 0.7))
    modules = [stage.module for stage in build_stages(model, Precision.FP32) if stage.spec.name.startswith("expert")]
    assert [module.threshold for module in modules] == [0.3, 0.7, None]


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_the_attention_costs_a_row_and_a_pooling(tiny, precision):
    graph = export_graph(build_stages(tiny.make_model(), precision)[1]).model.graph
    kinds = Counter(node.op_type for node in graph.node)
    # One map is averaged, c5; no map is expanded, and no class picked by a product over all of them.
    assert (kinds["ReduceMean"], kinds["Expand"], kinds["MatMul"], kinds["Equal"]) == (1, 0, 0, 0)
    (pool,) = (node for node in graph.node if node.op_type == "GlobalMaxPool")
    (conv,) = (node for node in graph.node if pool.input[0] in node.output)  # in half: no Cast of the whole map
    assert (conv.op_type, "part_conv" in conv.input[1]) == ("Conv", True)
