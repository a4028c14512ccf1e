"""The vendor's own parser and builder take every stage; they need no GPU."""

import collections

import pytest

from mge_export.precision import Precision

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")

LOGGER = trt.Logger(trt.Logger.ERROR)


def parse(path):
    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOGGER)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    return builder, network


def build(builder, network):
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        _, *shape = tensor.shape
        profile.set_shape(tensor.name, (1, *shape), (1, *shape), (4, *shape))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


@pytest.mark.parametrize("name", ["ingest", "expert_1", "expert_2", "gate", "mixture"])
def test_every_stage_parses_strongly_typed_and_builds(exported, name):
    builder, network = parse(exported.folder / f"{name}.onnx")
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = collections.Counter(
        layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.CONVOLUTION
    )
    convolutions = sum(node.op_type == "Conv" for node in exported.graphs[name].graph.node)
    wanted = trt.float16 if exported.precision is Precision.FP16 else trt.float32
    assert types == ({wanted: convolutions} if convolutions else {})
    assert build(builder, network) is not None
