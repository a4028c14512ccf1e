"""The bare trunks that `mge-bench` cuts out are the model's own: every convolution, nothing behind, the same c5."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mge_runtime.backends.onnxruntime import OnnxRuntimeBackend
from mge_runtime.bench.cut import cut_graph, find_trunk
from mge_runtime.bench.parts import HeadBundle, TrunkBundle
from mge_runtime.bench.weights import fp32_bytes
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BundleError

NETWORKS = ("expert_1", "expert_2", "gate")


def run(bundle, image):
    """What each part puts out for one image."""
    runners = OnnxRuntimeBackend(1).open_stages(bundle)
    outputs = {}
    for stage in bundle.manifest.stages:
        outputs[stage.name] = runners[stage.name].run({stage.inputs[0].name: image})[stage.outputs[0].name]
        runners[stage.name].close()
    return outputs


def operators(bundle, stage):
    graph = onnx.load_model_from_string(bundle.read(f"onnx/{stage}.onnx")).graph
    return Counter(node.op_type for node in graph.node)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)


def test_all_convolutions_of_a_trunk_and_nothing_behind_it_remain(exported):
    with TrunkBundle.open(exported.path) as bundle:
        assert list(bundle.trunks) == list(NETWORKS)
        for stage in exported.stages:
            if stage.spec.name not in NETWORKS:
                continue
            network = stage.module.gate if stage.spec.name == "gate" else stage.module.expert
            convolutions = sum(isinstance(part, nn.Conv2d) for part in network.trunk.modules())
            left = operators(bundle, stage.spec.name)
            assert left["Conv"] == bundle.trunks[stage.spec.name].convolutions == convolutions
            behind = {
                "Gemm",
                "MatMul",
                "ArgMax",
                "ReduceMax",
                "ReduceMean",
                "Resize",
                "Gather",
                "GatherElements",
                "Softmax",
            }
            assert not behind & left.keys()
            names = {
                t.name
                for t in onnx.load_model_from_string(bundle.read(f"onnx/{stage.spec.name}.onnx")).graph.initializer
            }
            assert not [name for name in names if "part_conv" in name or "head" in name]


def test_a_bare_trunk_computes_c5(exported, image):
    with TrunkBundle.open(exported.path) as bundle:
        found = run(bundle, image)
    for stage in exported.stages:
        name = stage.spec.name
        if name not in NETWORKS:
            continue
        with torch.no_grad():
            if name == "gate":
                gate = stage.module.gate
                c5 = gate.norm5(gate.trunk(torch.from_numpy(image))[1]).numpy()
            else:
                c5 = stage.module.expert.features(torch.from_numpy(image))[1].numpy()
        tolerance = 1e-4 if exported.precision.value == "fp32" else 2e-2
        assert found[name].shape == c5.shape
        np.testing.assert_allclose(found[name], c5, rtol=0, atol=tolerance * np.abs(c5).max())


def test_the_shape_that_a_device_reserves_is_that_of_c5(exported, image):
    with TrunkBundle.open(exported.path) as bundle:
        for stage, found in run(bundle, image).items():
            assert found.shape[1:] == bundle.manifest.stage(stage).outputs[0].shape[1:]


def test_experts_cut_to_their_logits_answer_as_whole_ones(exported, image):
    with HeadBundle.open(exported.path) as bundle:
        assert [stage.name for stage in bundle.manifest.stages] == ["expert_1", "expert_2"]
        found = run(bundle, image)
        for stage in ("expert_1", "expert_2"):
            assert operators(bundle, stage)["Conv"] == bundle.trunks[stage].convolutions + 1  # the part convolution
            assert not {"ArgMax", "Resize", "GatherElements"} & operators(bundle, stage).keys()
    with Bundle.open(exported.path) as bundle:
        runners = OnnxRuntimeBackend(1).open_stages(bundle)
        whole = runners["expert_1"].run({"image_1": image})
    np.testing.assert_array_equal(found["expert_1"], whole["logits_1"])


def test_weights_count_four_bytes_each_whatever_they_are_stored_as(exported):
    with Bundle.open(exported.path) as bundle:
        found = fp32_bytes(bundle)
    parameters = sum(p.numel() for stage in exported.stages for p in stage.module.parameters())
    assert found == pytest.approx(4 * parameters, rel=0.01)


def test_what_cannot_be_cut_is_said(exported):
    with Bundle.open(exported.path) as bundle:
        graph = bundle.read("onnx/expert_1.onnx")
        assert find_trunk(bundle.read("onnx/mixture.onnx")) is None
    with pytest.raises(BundleError, match="no node of a stage puts out 'nothing'"):
        cut_graph(graph, ["nothing"])
    with pytest.raises(BundleError, match="no ONNX model"):
        find_trunk(graph[: len(graph) // 2])
