"""INT8 in TensorRT: the real builder takes the graphs, and what it makes of them is held to the manifest."""

import dataclasses
import json

import pytest

from mge_runtime.bundle import Bundle, GraphModel, write_bundle
from mge_runtime.errors import BuildError
from mge_runtime.files import temporary_folder
from mge_runtime.trt.attest import attest_engine

GRAPHS = ("expert_1", "expert_2")


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")
    from mge_runtime.trt.vendor import load_vendor

    return load_vendor("tensorrt-rtx")


def build_all(path, vendor, capabilities):
    from mge_runtime.trt.build import ahead_of_time, build_engines
    from mge_runtime.trt.builder import BuildOptions
    from mge_runtime.trt.target import BatchRange

    with Bundle.open(path) as bundle:
        (target,) = ahead_of_time(vendor, capabilities)
        options = BuildOptions(BatchRange.parse("1,2,8"))
        with temporary_folder("test") as folder:
            new = build_engines(bundle, vendor, target, folder, gpu=None, options=options)
            return {graph: plan.stat().st_size for graph, plan in new.plans.items()}, new.details


@pytest.mark.parametrize("capability", ["sm86", "sm120"])
def test_the_real_builder_takes_every_graph(quantised, rtx, capability):
    sizes, details = build_all(quantised.path, rtx, [capability])
    assert set(sizes) == set(GRAPHS)
    for graph in GRAPHS:
        assert details.precision[graph]["attested"] == "network"
        assert details.precision[graph]["type"] == "int8"
        assert details.precision[graph]["layers"]["CONVOLUTION"] == {"float16": 15 if graph == "expert_1" else 29}


@pytest.mark.parametrize("graph", GRAPHS)
def test_in_the_parsed_network_quantised_convolutions_read_two_dequantize_layers(quantised, rtx, graph):
    from mge_runtime.trt.builder import parse_graph

    path = quantised.folder / f"{graph}.onnx"
    parsed = parse_graph(rtx, quantised.manifest.graph(graph), path.read_bytes(), path)
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    made = {layer.get_output(0).name: layer.type.name for layer in layers}
    both = [
        layer
        for layer in layers
        if layer.type.name == "CONVOLUTION"
        and layer.num_inputs > 1
        and [made.get(layer.get_input(index).name) for index in (0, 1)] == ["DEQUANTIZE", "DEQUANTIZE"]
    ]
    assert len(both) == quantised.manifest.precision[graph]["quantized"]["convolutions"] > 0


def test_a_bundle_that_tells_of_more_than_it_has_is_not_built(quantised, rtx, tmp_path):
    manifest = quantised.manifest
    models = {}
    for graph in manifest.graphs:
        weights = quantised.folder / f"{graph.name}.weights"
        cpu = quantised.folder / f"{graph.name}.cpu.onnx"
        models[graph.name] = GraphModel(quantised.folder / f"{graph.name}.onnx", weights, cpu)
    plan = manifest.precision["expert_2"]
    told = {**plan, "quantized": {**plan["quantized"], "convolutions": 99}}
    write_bundle(
        tmp_path / "x.plan", dataclasses.replace(manifest, precision={**manifest.precision, "expert_2": told}), models
    )
    with pytest.raises(BuildError, match=r"graph expert_2: \d+ convolutions read two DequantizeLinear; expected 99"):
        build_all(tmp_path / "x.plan", rtx, ["sm86"])


def inspected(*kinds):
    """What an engine inspector says of convolutions, one for each (input, weights, output), in TensorRT 11's words."""
    layers = [
        {
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "DataType": read}],
            "Outputs": [{"Name": "y", "DataType": put}],
            "Weights": {"Type": weights, "Count": 9},
        }
        for read, weights, put in kinds
    ]
    return json.dumps({"Layers": layers})


def test_an_engines_convolutions_are_int8_or_half():
    plan = {"type": "int8", "operators": {"Conv": {"float16": 2}}}
    found = attest_engine("s", inspected(("Int8", "Int8", "Float"), ("Half", "Half", "Half")), plan)
    assert found is not None
    with pytest.raises(BuildError, match="1 convolutions compute in float32; expected float16"):
        attest_engine("s", inspected(("Int8", "Int8", "Int8"), ("Float", "Float", "Float")), plan)
    with pytest.raises(BuildError, match="1 convolutions compute in int8; expected float16"):
        attest_engine("s", inspected(("Int8", "Int8", "Half")), {"type": "fp16"})
