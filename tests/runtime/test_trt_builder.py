"""The builder with the vendor's real parser and builder, on hand-made graphs. No GPU needed."""

import json

import onnx
import pytest
from onnx import TensorProto, helper

from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError, BuildError
from mge_runtime.manifest import GraphSpec, TensorSpec
from mge_runtime.trt.attest import attest_engine
from mge_runtime.trt.batch import BatchRange
from mge_runtime.trt.build import ahead_of_time, build_engines
from mge_runtime.trt.builder import BuildOptions, _configure, _profile, build_engine
from mge_runtime.trt.network import parse_graph
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


def build(vendor, border, data, path, *, plan=None, options=None, **arguments):
    return build_engine(
        vendor,
        border,
        data,
        path,
        plan=plan or {},
        capabilities=["sm86"],
        options=options or BuildOptions(),
        **arguments,
    )


RELU = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
UNSUPPORTED = {
    "antialias": (
        [helper.make_node("Resize", ["x", "", "s"], ["y"], name="shrink", mode="linear", antialias=1)],
        [helper.make_tensor("s", TensorProto.FLOAT, [4], [1, 1, 0.5, 0.5])],
        "shrink",
        "Resize",
    ),
    "bool maximum": (
        [
            helper.make_node("Greater", ["x", "zero"], ["mask"], name="mask"),
            helper.make_node("ReduceMax", ["mask", "axes"], ["any"], name="any_above", keepdims=1),
            helper.make_node("Cast", ["any"], ["y"], name="cast", to=TensorProto.FLOAT),
        ],
        [
            helper.make_tensor("zero", TensorProto.FLOAT, [1], [0]),
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
        ],
        "any_above",
        "ReduceMax",
    ),
}


@pytest.mark.parametrize(("nodes", "constants", "name", "operator"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_an_unsupported_graph_fails_and_names_the_node(rtx, tmp_path, nodes, constants, name, operator):
    unsupported, data = graph(nodes, constants)
    with pytest.raises(BuildError, match=rf"tensorrt-rtx [\d.]+ cannot parse graph s: node '{name}' \({operator}\): "):
        build(rtx, unsupported, data, tmp_path / "s.onnx")
    # One failure leaves nothing behind that the next build would report.
    built, _ = build(rtx, *graph(RELU), tmp_path / "s.onnx")
    assert built.data.nbytes > 1000
    assert rtx.messages.take() == ""


def test_what_the_border_promises_is_checked(rtx, tmp_path):
    _, data = graph(RELU)
    wrong = GraphSpec("s", (spec("x", 3, 8, 9),), (spec("y", 3, 8, 8),), "y")
    with pytest.raises(BuildError, match=r"graph s was parsed with the inputs \[\('x', 'float32', \(-1, 3, 8, 8\)\)\]"):
        build(rtx, wrong, data, tmp_path)
    wrong = GraphSpec("s", (spec("x", 3, 8, 8),), (spec("z", 3, 8, 8),), "z")
    with pytest.raises(BuildError, match="graph s was parsed with the outputs"):
        build(rtx, wrong, data, tmp_path)


def test_damaged_bytes_are_one_line(rtx, tmp_path):
    relu, data = graph(RELU)
    with pytest.raises(BuildError, match=r"cannot parse graph s: .+") as caught:
        build(rtx, relu, data[:-10], tmp_path)
    assert "\n" not in str(caught.value)


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


@pytest.fixture
def configured(rtx, tmp_path):
    """Configure a build of `relu`; the configuration is read back from the library."""

    def configure(options=None, capabilities=("sm86", "sm120")):
        parsed = parse_graph(rtx, *graph(RELU), tmp_path)
        config, _ = _configure(rtx, parsed, options or BuildOptions(), capabilities, b"")
        return parsed, config  # the configuration lives no longer than its builder

    return configure


def test_every_option_reaches_the_library(rtx, configured):
    trt = rtx.api
    options = BuildOptions(BatchRange(2, 4, 6), optimization_level=1, workspace=1 << 24)
    parsed, config = configured(options)
    assert config.builder_optimization_level == 1
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 24
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.num_compute_capabilities == 2
    assert [config.get_compute_capability(n) for n in range(2)] == [
        trt.ComputeCapability.SM86,
        trt.ComputeCapability.SM120,
    ]
    assert config.num_optimization_profiles == 1
    del parsed


def test_what_is_not_said_is_left_to_the_library(rtx, configured):
    parsed, config = configured()
    untouched = parsed.builder.create_builder_config()
    assert untouched.get_flag(rtx.api.BuilderFlag.TF32)  # it is on unless it is cleared
    assert config.builder_optimization_level == untouched.builder_optimization_level
    workspace = rtx.api.MemoryPoolType.WORKSPACE
    assert config.get_memory_pool_limit(workspace) == untouched.get_memory_pool_limit(workspace)


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 4, 6), (3, 3, 3)])
def test_the_batch_range_becomes_the_profile(configured, sizes):
    parsed, _ = configured()
    profile = _profile(parsed, BatchRange(*sizes))
    assert [tuple(shape) for shape in profile.get_shape("x")] == [(size, 3, 8, 8) for size in sizes]


def test_what_the_library_says_can_be_shown(rtx, tmp_path):
    said = []
    rtx.messages.say = said.append
    try:
        built, cache = build(rtx, *graph(RELU), tmp_path, plan={"type": "fp32"})
    finally:
        rtx.messages.say = None
    assert said
    assert (built.attested, cache) == ("network", b"")


def test_without_a_type_nothing_is_attested(rtx, tmp_path):
    built, _ = build(rtx, *graph(RELU), tmp_path)
    assert built.attested == "no"


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
    with pytest.raises(BuildError, match="1 matrix products compute in float32; expected float16"):
        build(rtx, *single, tmp_path, plan={"type": "fp16"})
    with pytest.raises(BuildError, match="1 matrix products compute in float16; expected float32"):
        build(rtx, *half, tmp_path, plan={"type": "fp32"})
    plan = {"type": "fp16", "operators": {"Cast": {"float32": 2}, "MatMul": {"float16": 1}}}
    with pytest.raises(BuildError, match=r"node 'product' \(MatMul\) computes in float32; the precision plan has fl"):
        build(rtx, *single, tmp_path, plan=plan)
    built, _ = build(rtx, *half, tmp_path, plan={"type": "fp16"})
    assert built.layers["MATRIX_MULTIPLY"] == {"float16": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchRange(4, 2, 8), "the batch range is 4,2,8; expected MIN <= OPT <= MAX"),
        (lambda: BatchRange(0, 1, 1), "the batch range is 0,1,1"),
        (lambda: BatchRange.parse("1,x"), "the batch range is '1,x'; expected MIN,OPT,MAX, such as 1,1,8"),
        (lambda: BatchRange.parse(""), "the batch range is ''"),
        (lambda: BatchRange.parse("1,8,1e9"), "the batch range is '1,8,1e9'"),
        (lambda: BatchRange.parse("9" * 5000), "the batch range is '9{40}'; expected MIN,OPT,MAX"),
        (lambda: BuildOptions(optimization_level=6), "the optimisation level is 6; expected 0 to 5"),
        (lambda: BuildOptions(workspace=5), "the workspace is 5 bytes"),
        (lambda: BuildOptions(workspace=10**17), "the workspace is 1000000000000"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(BackendError, match=message):
        make()


def test_batch_ranges_as_people_type_them():
    assert BatchRange.parse("1,4,8").sizes == (1, 4, 8)
    assert BatchRange.parse("2, 8").sizes == (2, 2, 8)
    assert BatchRange.parse("3").sizes == (3, 3, 3)


def test_a_whole_bundle_is_built(rtx, bundle_path):
    lines = []
    with Bundle.open(bundle_path) as bundle:
        (target,) = ahead_of_time(rtx, ["sm120", "sm86"])
        assert target.capabilities == ("sm86", "sm120")
        with build_engines(bundle, rtx, target, gpu=None, options=BuildOptions(), say=lines.append) as new:
            assert list(new.plans) == [graph.name for graph in bundle.manifest.graphs]
            folder = new.plans["expert_3"].parent
            assert new.details.version == rtx.version
        assert not folder.exists()
    assert [line.split(",")[0] for line in lines] == [f"{graph.name}: fp32" for graph in bundle.manifest.graphs]


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


def test_an_engine_that_does_not_tell_is_not_attested():
    assert attest_engine("s", inspected(), {"type": "fp32"}) is None
    assert attest_engine("s", inspected("conv1", "conv2"), {"type": "fp32"}) is None


@pytest.mark.parametrize("information", ["", "[", "null", "[]", '{"Layers": null}', '{"Bindings": []}'])
def test_an_answer_of_the_inspector_that_cannot_be_read_is_one_line(information):
    with pytest.raises(BuildError, match=r"graph s: the engine inspector's answer (is no JSON|has no list of layers)"):
        attest_engine("s", information, {"type": "fp32"})
