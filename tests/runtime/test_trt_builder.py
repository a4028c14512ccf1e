"""Engines of hand-made graphs with the vendor's real parser and builder. No GPU needed."""

import json

import onnx
import pytest
from onnx import TensorProto, helper

from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError, BuildError
from mge_runtime.manifest import GraphSpec, TensorSpec
from mge_runtime.trt.attest import attest_engine
from mge_runtime.trt.build import ahead_of_time, build_engines
from mge_runtime.trt.builder import BuildOptions, _configure, _profile, build_engine, parse_graph
from mge_runtime.trt.target import BatchRange
from mge_runtime.trt.vendor import load_vendor

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")


@pytest.fixture(scope="module")
def rtx():
    return load_vendor("tensorrt-rtx")


def spec(name, *shape, dtype="float32"):
    return TensorSpec(name, dtype, ("batch", *shape))


def graph(nodes, constants=(), *, x=(3, 8, 8), y=(3, 8, 8), kind=TensorProto.FLOAT):
    """A graph `s` from `x` to `y`, with its specification."""
    inputs = [helper.make_tensor_value_info("x", kind, ["batch", *x])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *y])]
    proto = helper.make_graph(nodes, "s", inputs, outputs, list(constants))
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind).name
    return GraphSpec("s", (spec("x", *x, dtype=dtype),), (spec("y", *y),), "y"), model.SerializeToString()


def build(vendor, graph_spec, data, path, *, plan=None, **others):
    options = BuildOptions()
    return build_engine(
        vendor, graph_spec, data, path, plan=plan or {}, capabilities=["sm86"], options=options, **others
    )


RELU = [helper.make_node("Relu", ["x"], ["y"], name="relu")]


def test_an_unsupported_or_damaged_graph_fails_in_one_line_and_names_the_node(rtx, tmp_path):
    scales = helper.make_tensor("s", TensorProto.FLOAT, [4], [1, 1, 0.5, 0.5])
    shrink = helper.make_node("Resize", ["x", "", "s"], ["y"], name="shrink", mode="linear", antialias=1)
    with pytest.raises(BuildError, match=r"^tensorrt-rtx [\d.]+ cannot parse graph s: node 'shrink' \(Resize\): .+$"):
        build(rtx, *graph([shrink], [scales]), tmp_path / "s.onnx")
    relu, data = graph(RELU)
    with pytest.raises(BuildError, match=r"^tensorrt-rtx [\d.]+ cannot parse graph s: .+$"):
        build(rtx, relu, data[:-10], tmp_path)
    # A failure leaves nothing behind that the next build would report.
    assert build(rtx, relu, data, tmp_path / "s.onnx").data.nbytes > 1000
    assert rtx.messages.take() == ""


def test_inputs_and_outputs_are_checked_against_the_specification(rtx, tmp_path):
    _, data = graph(RELU)
    wrong = GraphSpec("s", (spec("x", 3, 8, 9),), (spec("y", 3, 8, 8),), "y")
    with pytest.raises(BuildError, match=r"graph s was parsed with the inputs \[\('x', 'float32', \(-1, 3, 8, 8\)\)\]"):
        build(rtx, wrong, data, tmp_path)
    wrong = GraphSpec("s", (spec("x", 3, 8, 8),), (spec("z", 3, 8, 8),), "z")
    with pytest.raises(BuildError, match="graph s was parsed with the outputs"):
        build(rtx, wrong, data, tmp_path)


def test_progress_never_falls_and_ends_at_the_end(rtx, tmp_path):
    seen = []
    build(rtx, *graph(RELU), tmp_path, progress=lambda share, phase: seen.append((share, phase)) or True)
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert len({phase for _, phase in seen}) > 3


def test_a_build_can_be_stopped_and_its_callback_may_fail(rtx, tmp_path):
    with pytest.raises(BuildError, match="cannot build graph s"):
        build(rtx, *graph(RELU), tmp_path, progress=lambda share, _: share < 0.1)

    def fail(share, _):
        raise ZeroDivisionError(share)

    with pytest.raises(ZeroDivisionError):
        build(rtx, *graph(RELU), tmp_path, progress=fail)


def test_every_option_reaches_the_library_and_the_rest_is_left_to_it(rtx, tmp_path):
    trt, workspace = rtx.api, rtx.api.MemoryPoolType.WORKSPACE
    parsed = parse_graph(rtx, *graph(RELU), tmp_path)  # a configuration lives no longer than its builder
    untouched = parsed.builder.create_builder_config()
    config = _configure(rtx, parsed, BuildOptions(), ["sm86"])
    assert config.builder_optimization_level == untouched.builder_optimization_level
    assert config.get_memory_pool_limit(workspace) == untouched.get_memory_pool_limit(workspace)
    config = _configure(rtx, parsed, BuildOptions(optimization_level=1, workspace=1 << 24), ["sm86", "sm120"])
    assert config.builder_optimization_level == 1
    assert config.get_memory_pool_limit(workspace) == 1 << 24
    assert untouched.get_flag(trt.BuilderFlag.TF32)  # it is on unless it is cleared
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    capabilities = trt.ComputeCapability.SM86, trt.ComputeCapability.SM120
    assert tuple(config.get_compute_capability(n) for n in range(config.num_compute_capabilities)) == capabilities
    assert config.num_optimization_profiles == 1


def test_the_batch_range_becomes_the_profile(rtx, tmp_path):
    profile = _profile(parse_graph(rtx, *graph(RELU), tmp_path), BatchRange(2, 4, 6))
    assert [tuple(shape) for shape in profile.get_shape("x")] == [(size, 3, 8, 8) for size in (2, 4, 6)]


def test_what_the_library_says_can_be_shown(rtx, tmp_path):
    said = []
    rtx.messages.say = said.append
    try:
        built = build(rtx, *graph(RELU), tmp_path, plan={"type": "fp32"})
    finally:
        rtx.messages.say = None
    assert said
    assert (built.attested, built.timing) == ("network", b"")


def product(kind):
    """A graph of one matrix product, in `kind` between casts."""
    nodes = [
        helper.make_node("Cast", ["x"], ["x.cast"], name="in", to=kind),
        helper.make_node("MatMul", ["x.cast", "w"], ["y.cast"], name="product"),
        helper.make_node("Cast", ["y.cast"], ["y"], name="out", to=TensorProto.FLOAT),
    ]
    return graph(nodes, [helper.make_tensor("w", kind, [8, 8], [0.5] * 64)])


def test_products_in_another_type_than_the_plan_are_refused(rtx, tmp_path):
    half, single = product(TensorProto.FLOAT16), product(TensorProto.FLOAT)
    plan = {"type": "fp16", "operators": {"Cast": {"float32": 1, "float16": 1}, "MatMul": {"float16": 1}}}
    with pytest.raises(BuildError, match=r"node 'product' \(MatMul\) computes in float32; the precision plan has fl"):
        build(rtx, *single, tmp_path, plan=plan)
    with pytest.raises(BuildError, match=r"the matrix products {}; the precision plan has {'Conv': {'float16': 3}}"):
        build(rtx, *graph(RELU), tmp_path, plan={"operators": {"Relu": {"float32": 1}, "Conv": {"float16": 3}}})
    built = build(rtx, *half, tmp_path, plan=plan)
    assert built.layers["MATRIX_MULTIPLY"] == {"float16": 1}
    assert build(rtx, *half, tmp_path).attested == "no"  # the plan tells no type


def test_batch_ranges_as_people_type_them():
    assert BatchRange.parse("1, 4, 8").sizes == (1, 4, 8)
    assert BatchRange.parse("3").sizes == (3, 3, 3)
    for text in ("", "1,8", "1,8,1e9", "9" * 5000):
        with pytest.raises(BackendError, match=f"the batch range is '{text[:40]}'; expected MIN,OPT,MAX"):
            BatchRange.parse(text)
    for text in ("4,2,8", "0,1,1", "1,1,5000"):
        with pytest.raises(BackendError, match=f"the batch range is {text}; expected MIN <= OPT <= MAX between 1 and"):
            BatchRange.parse(text)


def test_a_whole_bundle_is_built(rtx, bundle_path, tmp_path):
    lines = []
    with Bundle.open(bundle_path) as bundle:
        (target,) = ahead_of_time(rtx, ["sm120", "sm86"])
        assert target.capabilities == ("sm86", "sm120")
        new = build_engines(bundle, rtx, target, tmp_path, gpu=None, options=BuildOptions(), say=lines.append)
        assert list(new.plans) == [graph.name for graph in bundle.manifest.graphs]
        assert {plan.parent for plan in new.plans.values()} == {tmp_path}
        assert new.details.version == rtx.version
    assert [line.split(",")[0] for line in lines[1:]] == [f"{graph.name}: fp32" for graph in bundle.manifest.graphs]


def test_turing_has_an_engine_of_its_own(rtx):
    turing, others = ahead_of_time(rtx, ["sm89", "sm75", "sm86"])
    assert turing.capabilities == ("sm75",)
    assert others.capabilities == ("sm86", "sm89")


def inspected(*layers):
    return json.dumps({"Layers": list(layers), "Bindings": ["x", "y"]})


def layer(kind, source, result, *, eleven=False):
    def tensor(text):
        return {"Name": "t", "DataType": text} if eleven else {"Name": "t", "Format/Datatype": text}

    return {"Name": kind, "LayerType": kind, "Inputs": [tensor(source)], "Outputs": [tensor(result)]}


# As the inspector words types in TensorRT 10 ("Format/Datatype") and 11 ("DataType").
TEN = ("Row major linear FP32", "Channel major FP16 format where channel % 8 == 0")
ELEVEN = ("Float", "Half")


@pytest.mark.parametrize(("single", "half", "eleven"), [(*TEN, False), (*ELEVEN, True)], ids=["10", "11"])
def test_a_built_engine_is_read_back(single, half, eleven):
    cast = layer("Reformat", single, half, eleven=eleven)
    mixed = inspected(cast, layer("CaskConvolution", half, half, eleven=eleven))
    counts = {"CaskConvolution": {"float16": 1}, "Reformat": {"float16": 1, "float32": 1}}
    assert attest_engine("s", mixed, {"type": "fp16"}) == counts
    full = inspected(layer("CaskConvolution", single, single, eleven=eleven))
    assert attest_engine("s", full, {"type": "fp32"}) == {"CaskConvolution": {"float32": 1}}
    with pytest.raises(BuildError, match=r"graph s: 1 convolutions compute in float32; expected float16"):
        attest_engine("s", full, {"type": "fp16"})
    with pytest.raises(BuildError, match=r"graph s: 1 convolutions compute in float16; expected float32"):
        attest_engine("s", mixed, {"type": "fp32"})
    # What cannot be told is not attested: the network's attestation stands.
    fused = inspected(layer("Myelin", single, single, eleven=eleven))
    assert attest_engine("s", fused, {"type": "fp16", "operators": {"Conv": {"float16": 1}}}) is None
    assert attest_engine("s", fused, {"type": "fp32", "operators": {"Mul": {"float32": 1}}}) is not None
    two = {"type": "fp16", "operators": {"Conv": {"float16": 2}}}
    assert attest_engine("s", mixed, two) is None  # one of two tells too little
    # A kernel that casts what it puts out computes in half all the same; one that reads or holds FP32 does not.
    casting = layer("CaskConvolution", half, single, eleven=eleven)
    assert attest_engine("s", inspected(casting), {"type": "fp16"}) is not None
    weighted = layer("Convolution", half, half, eleven=eleven) | {"Weights": {"Type": "Float", "Count": 9}}
    with pytest.raises(BuildError, match=r"1 convolutions compute in float32; expected float16"):
        attest_engine("s", inspected(weighted), {"type": "fp16"})


def test_in_an_int8_engine_convolutions_are_int8_or_half():
    def convolution(read, weights, result):
        return layer("CaskConvolution", read, result, eleven=True) | {"Weights": {"Type": weights, "Count": 9}}

    plan = {"type": "int8", "operators": {"Conv": {"float16": 2}}}
    int8, half = convolution("Int8", "Int8", "Float"), convolution("Half", "Half", "Half")
    assert attest_engine("s", inspected(int8, half), plan) is not None
    with pytest.raises(BuildError, match="1 convolutions compute in float32; expected float16"):
        attest_engine("s", inspected(int8, convolution("Float", "Float", "Float")), plan)
    with pytest.raises(BuildError, match="1 convolutions compute in int8; expected float16"):
        attest_engine("s", inspected(int8), {"type": "fp16"})


def test_an_engine_that_does_not_tell_is_not_attested():
    assert attest_engine("s", inspected(), {"type": "fp32"}) is None
    assert attest_engine("s", inspected("conv1", "conv2"), {"type": "fp32"}) is None


@pytest.mark.parametrize("information", ["", "[", "null", "[]", '{"Layers": null}', '{"Bindings": []}'])
def test_what_the_inspector_says_and_cannot_be_read_is_one_line(information):
    with pytest.raises(BuildError, match=r"graph s: the engine inspector gave no list of layers"):
        attest_engine("s", information, {"type": "fp32"})
