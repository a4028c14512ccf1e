"""What the chain gets from the device: counted arithmetic against a measured matrix rate."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from mge_runtime.backends import choose
from mge_runtime.backends.onnxruntime_cuda import import_cuda_onnxruntime, preload_libraries
from mge_runtime.backends.ort import load_onnxruntime
from mge_runtime.backends.ort_layers import Layer, stage_layers
from mge_runtime.bench.arithmetic import Work, Yardstick, measured_arithmetic, open_yardstick
from mge_runtime.bench.device_operator import ONCE, DeviceOperator, operator_model
from mge_runtime.bench.matrix_rate import compute_type, full_rate_size
from mge_runtime.bench.parts import TrunkBundle
from mge_runtime.bench.report_tables import _arithmetic
from mge_runtime.bench.rounds import Series
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError

onnxruntime = load_onnxruntime()

# By hand, from tiny_chain: 4 channels of 8 x 8, each a sum of 3 x 4 x 4 products; then 4 x 5 of the linear layer.
CONVOLUTION = Layer(4 * 8 * 8 * 3 * 4 * 4, 4 * 3 * 4 * 4, 3 * 32 * 32 + 4 * 8 * 8)
LINEAR = Layer(4 * 5, 4 * 5, 4 + 5)


def test_layers_are_those_of_the_graphs(tiny, tmp_path):
    path = tmp_path / "mge.plan"
    tiny.write_trunked_bundle(path)
    with Bundle.open(path) as bundle:
        layers = stage_layers(bundle)
    assert layers["expert_1"] == layers["expert_2"] == layers["expert_3"] == (CONVOLUTION, LINEAR)
    assert layers["ingest"] == layers["mixture"] == ()
    assert [layer.macs for layer in layers["gate"]] == [3 * 3]
    with TrunkBundle.open(path) as parts:
        assert stage_layers(parts) == {f"expert_{k}": (CONVOLUTION,) for k in (1, 2, 3)}


def test_a_model_of_one_operator_computes_it():
    model = operator_model("MatMul", 2, "float32", (3, 3))
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    half = onnx.load_from_string(operator_model("Relu", 1, "float16", (200,)))
    onnx.checker.check_model(half, full_check=True)
    assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    a, b = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    (found,) = session.run(["result"], {"operand_0": a, "operand_1": b})
    np.testing.assert_allclose(found, a @ b, rtol=1e-5)


def test_an_operator_runs_on_memory_of_the_device(device):
    ort, dtype = onnxruntime, "float32"
    if device.kind == "cuda":
        ort, dtype = import_cuda_onnxruntime(), "float16"
        preload_libraries(ort)
    operator = DeviceOperator(ort, device, "MatMul", 2, dtype, (128, 128), 1)
    try:
        assert operator.name == f"MatMul of 128 x 128, {dtype}"
        operator.repeat_for(0.003)
        operator.run()
        assert 0 < operator.steps_ms[ONCE] < 100
        assert operator.repeats > 1
    finally:
        operator.close()
        operator.close()


def test_an_operator_that_the_device_lacks_is_one_line_and_leaves_nothing(device):
    ort = import_cuda_onnxruntime() if device.kind == "cuda" else onnxruntime
    with pytest.raises(BackendError, match="cannot open a NoSuchThing of 4 x 4, float32") as error:
        DeviceOperator(ort, device, "NoSuchThing", 2, "float32", (4, 4), 1)
    assert "\n" not in str(error.value)


def test_the_product_is_the_smallest_at_full_rate():
    tried = []

    def device(rates):
        def milliseconds(size):
            tried.append(size)
            return size**3 / rates[size]

        return milliseconds

    rising = {256: 1e7, 512: 4e7, 1024: 8e7, 2048: 8.1e7, 4096: 8e7, 8192: 9e9}
    assert full_rate_size(list(rising), device({k: 1e3 * v for k, v in rising.items()}), 10) == 1024
    assert tried == [256, 512, 1024, 2048, 4096], "two sizes in a row brought nothing"
    tried.clear()
    disturbed = {256: 4e9, 512: 2e9, 1024: 8e9, 2048: 8e9, 4096: 8e9}
    assert full_rate_size(list(disturbed), device(disturbed), 10) == 1024
    tried.clear()
    steady = dict.fromkeys((256, 512, 1024, 2048), 1e6)  # 17, 134 and 1,074 ms
    assert full_rate_size(list(steady), device(steady), 10) == 256
    assert tried == [256], "the next one takes more than 30 ms"
    tried.clear()
    assert full_rate_size(list(rising), device({k: 1e3 * v for k, v in rising.items()}), 5e-5) == 256
    assert tried == [256], "no time is left for more"


@pytest.mark.parametrize(
    ("device", "kind", "expected"),
    [
        ("cpu", "fp16", "float32"),
        ("cpu", "fp32", "float32"),
        ("cuda:0", "fp32", "float32"),
        ("cuda:0", "fp16", "float16"),
        ("cuda:0", "int8", "float16"),
    ],
)
def test_the_rate_is_that_of_the_type_that_is_computed_in(device, kind, expected):
    manifest = SimpleNamespace(precision={"ingest": {"type": "fp32"}, "expert_1": {"type": kind}})
    assert compute_type(SimpleNamespace(device=device), manifest) == expected


def arithmetic(chain_ms, trunks_ms, *, matrix_ms=1.0, memory_ms=1.0, int8=False, batch=2):
    """A matrix product of 2 GFLOP and 2 MB; one image of 2 GFLOP in the chain, 1.5 GFLOP and 1 MB in the trunks."""
    probes = {name: SimpleNamespace(name=name) for name in ("matrix", "memory")}
    rates = SimpleNamespace(**probes, dtype="float32", size=1000, matrix_flop=2e9, memory_bytes=2_000_000)
    trunks = None if trunks_ms is None else Work(750_000_000, 100_000, 150_000)
    yardstick = Yardstick(rates, Work(1_000_000_000, 0, 0), trunks, int8)
    series = {
        name: Series(None, [], [[{ONCE: ms}]] * len(chain_ms))
        for name, ms in (("matrix", matrix_ms), ("memory", memory_ms))
    }
    return measured_arithmetic(yardstick, series, batch, chain_ms, trunks_ms)


def test_shares_of_the_rate_are_taken_within_a_round():
    found = arithmetic([10.0, 20.0], [6.0, 12.0])
    assert (found.chain_gmacs, found.trunks_gmacs) == (1.0, 0.75)
    assert found.rate_tflops.rounds == (2.0, 2.0)
    assert found.memory_gb_s.rounds == (2.0, 2.0)
    assert [ratio.rounds for ratio in found.tflops] == [(0.4, 0.2), (0.5, 0.25)]
    assert [ratio.rounds for ratio in found.shares] == [(0.2, 0.1), (0.25, 0.125)]
    arithmetic_part, trunks, rest = (part.rounds for part in found.parts)
    assert arithmetic_part == pytest.approx((0.2, 0.1))  # 2 images of 2 GFLOP at 2 TFLOP/s: 2 ms
    assert trunks == pytest.approx((0.45, 0.525))  # 6 - 1.5 of 10 ms
    assert rest == pytest.approx((0.35, 0.375))  # 10 - 6 - 0.5 of 10 ms
    assert found.traffic_mb == pytest.approx(4 * (100_000 + 2 * 150_000) / 1e6)
    assert found.traffic_share.rounds == pytest.approx((0.8 / 6, 0.8 / 12))
    assert found.limits[0] == "most of the time above the arithmetic goes to the trunks: 49% of the chain"
    assert found.limits[1].endswith("less than the 81% above their arithmetic: memory's rate alone does not explain it")
    table = _arithmetic(2, found)
    assert [row[1] for row in table.rows] == ["2", "0.3", "0.375", "15.0%", "18.8%", "15.0%", "48.8%", "36.2%"]
    assert all(limit in table.notes for limit in found.limits)


def test_what_limits_is_what_the_numbers_say():
    beside = arithmetic([10.0], [2.0]).limits
    assert beside[0] == "most of the time above the arithmetic goes to what lies beside the trunks: 75% of the chain"
    slow_memory = arithmetic([10.0], [6.0], memory_ms=7.0).limits
    assert slow_memory[1].endswith("enough for the 75% above their arithmetic: memory may limit them")
    assert arithmetic([10.0], [1.2]).limits[1] == "the trunks are at the measured matrix rate or above it"
    assert arithmetic([1.9], [1.2]).limits == ("the chain is at the measured matrix rate or above it",)
    without = arithmetic([10.0], None)
    assert (without.parts, without.trunks_gmacs, without.traffic_mb) == ((), None, None)
    assert without.limits[0].startswith("no bare trunks were run")
    integer = arithmetic([10.0], [6.0], int8=True)
    assert integer.limits[0].startswith("the bundle computes in INT8 and the rate is that of float32")
    assert integer.traffic_share is None


def test_a_bundle_is_counted_whatever_can_be_cut_out_of_it(bundle_path):
    with Bundle.open(bundle_path) as bundle:
        choice = choose("cpu", "onnxruntime", bundle=bundle)
    yardstick = open_yardstick(bundle_path, choice, 1, 0.0)
    try:
        assert yardstick.chain.macs == 3 * (CONVOLUTION.macs + LINEAR.macs) + 3 * 3
        assert (yardstick.trunks, yardstick.int8, yardstick.rates.size) == (None, False, 256)
        yardstick.rates.matrix.run()
        assert yardstick.rates.matrix.steps_ms[ONCE] > 0
    finally:
        yardstick.rates.close()


def test_a_device_that_cannot_run_the_product_says_why(bundle_path, no_gpu):
    if not no_gpu:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"built without CUDA|cannot be opened|cannot open|driver"):
        open_yardstick(bundle_path, SimpleNamespace(device="cuda:0", backend="onnxruntime"), 1, 0.0)
