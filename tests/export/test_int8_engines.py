"""INT8 in TensorRT: the real builder takes the graphs, and what it makes of them is held to the manifest."""

import dataclasses
import json

import pytest

from mge_runtime.bundle import Bundle, StageModel, write_bundle
from mge_runtime.errors import BuildError
from mge_runtime.trt.attest import attest_engine

TRUNKS = ("expert_1", "expert_2", "gate")


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")
    from mge_runtime.trt.vendor import load_vendor

    return load_vendor("tensorrt-rtx")


def build_all(path, vendor, capabilities):
    from mge_runtime.trt.batch import BatchRange
    from mge_runtime.trt.build import ahead_of_time, build_engines
    from mge_runtime.trt.builder import BuildOptions

    with Bundle.open(path) as bundle:
        (target,) = ahead_of_time(vendor, capabilities)
        options = BuildOptions(BatchRange.parse("1,2,8"))
        with build_engines(bundle, vendor, target, gpu=None, options=options) as new:
            return {stage: plan.stat().st_size for stage, plan in new.plans.items()}, new.details


@pytest.mark.parametrize("capability", ["sm86", "sm120"])
def test_the_real_builder_takes_every_stage(quantised, rtx, capability):
    sizes, details = build_all(quantised.path, rtx, [capability])
    assert set(sizes) == {"ingest", *TRUNKS, "mixture"}
    for stage in TRUNKS:
        assert details.precision[stage]["attested"] == "network"
        assert details.precision[stage]["type"] == "int8"
        assert details.precision[stage]["layers"]["CONVOLUTION"] == {"float16": 14 + (stage != "gate")}


@pytest.mark.parametrize("stage", TRUNKS)
def test_in_the_parsed_network_quantised_convolutions_read_two_dequantize_layers(quantised, rtx, stage):
    from mge_runtime.trt.network import parse_stage

    path = quantised.folder / f"{stage}.onnx"
    parsed = parse_stage(rtx, quantised.manifest.stage(stage), path.read_bytes(), path)
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    made = {layer.get_output(0).name: layer.type.name for layer in layers}
    both = [
        layer
        for layer in layers
        if layer.type.name == "CONVOLUTION"
        and layer.num_inputs > 1
        and [made.get(layer.get_input(index).name) for index in (0, 1)] == ["DEQUANTIZE", "DEQUANTIZE"]
    ]
    assert len(both) == quantised.manifest.precision[stage]["quantized"]["convolutions"] > 0


def test_a_bundle_that_tells_of_more_than_it_has_is_not_built(quantised, rtx, tmp_path):
    manifest = quantised.manifest
    models = {}
    for stage in manifest.stages:
        weights = quantised.folder / f"{stage.name}.weights"
        models[stage.name] = StageModel(quantised.folder / f"{stage.name}.onnx", weights if weights.exists() else None)
    plan = manifest.precision["gate"]
    told = {**plan, "quantized": {**plan["quantized"], "convolutions": 99}}
    write_bundle(
        tmp_path / "x.plan", dataclasses.replace(manifest, precision={**manifest.precision, "gate": told}), models
    )
    with pytest.raises(BuildError, match=r"stage gate: \d+ convolutions read two DequantizeLinear; expected 99"):
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
