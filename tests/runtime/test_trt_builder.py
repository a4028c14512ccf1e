"""Engines of hand-made graphs with the vendor's real parser and builder. No GPU needed."""

import json

import pytest
from onnx import TensorProto, helper

from mge_runtime.errors import BackendError, BuildError, BundleError
from mge_runtime.manifest import GraphSpec, TensorSpec
from mge_runtime.trt.attest import attest_engine
from mge_runtime.trt.build import ahead_of_time
from mge_runtime.trt.builder import BuildOptions, build_engine, configure, parse_graph, profile
from mge_runtime.trt.target import BatchRange
from mge_runtime.trt.vendor import load_vendor

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")


@pytest.fixture(scope="module")
def rtx():
    return load_vendor("tensorrt-rtx")


def spec(name, *shape):
    return TensorSpec(name, "float32", ("batch", *shape))


def graph(nodes, constants=()):
    """A graph `s` from `x` to `y`, with its specification."""
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3, 8, 8])] for n in "xy")
    proto = helper.make_graph(nodes, "s", inputs, outputs, list(constants))
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return GraphSpec("s", (spec("x", 3, 8, 8),), (spec("y", 3, 8, 8),), "y"), model.SerializeToString()


def build(vendor, graph_spec, data, path, *, plan=None, **others):
    given = {"plan": plan or {}, "capabilities": ["sm86"], "options": BuildOptions()}
    return build_engine(vendor, graph_spec, data, path, **given, **others)


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
    with pytest.raises(BundleError, match=r"graph s has the input 'x' as float32 \[None, 3, 8, 8\]; the manifest says"):
        build(rtx, wrong, data, tmp_path)
    wrong = GraphSpec("s", (spec("x", 3, 8, 8),), (spec("z", 3, 8, 8),), "z")
    with pytest.raises(BundleError, match="graph s has the output 'y' as float32"):
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
    config = configure(rtx, parsed, BuildOptions(), ["sm86"])
    assert config.builder_optimization_level == untouched.builder_optimization_level
    assert config.get_memory_pool_limit(workspace) == untouched.get_memory_pool_limit(workspace)
    config = configure(rtx, parsed, BuildOptions(optimization_level=1, workspace=1 << 24), ["sm86", "sm120"])
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
    made = profile(parse_graph(rtx, *graph(RELU), tmp_path), BatchRange(2, 4, 6))
    assert [tuple(shape) for shape in made.get_shape("x")] == [(size, 3, 8, 8) for size in (2, 4, 6)]


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


def test_turing_has_an_engine_of_its_own(rtx):
    turing, others = ahead_of_time(rtx, ["sm120", "sm75", "sm86"])
    assert turing.capabilities == ("sm75",)
    assert others.capabilities == ("sm86", "sm120")


# Words of the inspector of TensorRT 10 ("Format/Datatype") and 11 ("DataType").
WORDS = {
    "10": (
        "Format/Datatype",
        {"float": "Row major linear FP32", "half": "Channel major FP16 format where channel % 8"},
    ),
    "11": ("DataType", {"float": "Float", "half": "Half"}),
}


def inspected(key, words, *layers):
    """What the inspector says of layers, each given as (type, type that it reads, type that it writes, weights)."""
    found = []
    for kind, source, result, *weights in layers:
        tensors = {"Inputs": [{key: words.get(source, source)}], "Outputs": [{key: words.get(result, result)}]}
        held = {"Weights": {"Type": weights[0], "Count": 9}} if weights else {}
        found.append({"Name": kind, "LayerType": kind, **tensors, **held})
    return json.dumps({"Layers": found, "Bindings": ["x", "y"]})


def plan(kind, **operators):
    return {"type": kind, "operators": {name: {"float16": count} for name, count in operators.items()}}


CONV = "CaskConvolution"
HALF, SINGLE = (CONV, "half", "half"), (CONV, "float", "float")
INT8 = (CONV, "int8", "float", "Int8")  # its scales are floats


@pytest.mark.parametrize("version", WORDS)
@pytest.mark.parametrize(
    ("layers", "wanted", "told"),
    [
        (
            [("Reformat", "float", "half"), HALF],
            plan("fp16"),
            {CONV: {"float16": 1}, "Reformat": {"float16": 1, "float32": 1}},
        ),
        ([SINGLE], plan("fp32"), {CONV: {"float32": 1}}),
        ([SINGLE], plan("fp16"), "graph s: 1 convolutions compute in float32; expected float16"),
        ([HALF], plan("fp32"), "graph s: 1 convolutions compute in float16; expected float32"),
        # A kernel that casts what it writes computes in half all the same; one that reads or holds FP32 does not.
        ([(CONV, "half", "float")], plan("fp16"), {CONV: {"float16": 1, "float32": 1}}),
        ([(*HALF, "Float")], plan("fp16"), "1 convolutions compute in float32; expected float16"),
        # What cannot be told is not attested: the network's attestation stands.
        ([("Myelin", "float", "float")], plan("fp16", Conv=1), None),
        ([("Myelin", "float", "float")], plan("fp32", Mul=1), {"Myelin": {"float32": 1}}),
        ([HALF], plan("fp16", Conv=2), None),  # one of two tells too little
        ([], plan("fp32"), None),
        # In INT8 convolutions are integer ones or in half.
        ([INT8, (*HALF, "Half")], plan("int8", Conv=2), {CONV: {"float16": 1, "float32": 1, "int8": 1}}),
        ([INT8, (*SINGLE, "Float")], plan("int8", Conv=2), "1 convolutions compute in float32; expected float16"),
        ([INT8], plan("fp16", Conv=2), "1 convolutions compute in int8; expected float16"),
    ],
)
def test_a_built_engine_is_read_back(version, layers, wanted, told):
    information = inspected(*WORDS[version], *layers)
    if isinstance(told, str):
        with pytest.raises(BuildError, match=told):
            attest_engine("s", information, wanted)
    else:
        assert attest_engine("s", information, wanted) == told


def test_an_engine_that_gives_names_alone_is_not_attested():
    assert attest_engine("s", json.dumps({"Layers": ["conv1", "conv2"]}), plan("fp32")) is None


@pytest.mark.parametrize("information", ["", "[", "null", "[]", '{"Layers": null}', '{"Bindings": []}'])
def test_what_the_inspector_says_and_cannot_be_read_is_one_line(information):
    with pytest.raises(BuildError, match=r"graph s: the engine inspector gave no list of layers"):
        attest_engine("s", information, plan("fp32"))
