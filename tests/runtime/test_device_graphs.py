"""Graphs of a chain on a device: when a run is captured, when launched, and what is said where it cannot be."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import onnx
import pytest

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.backends.onnxruntime_cuda import open_ort_chain
from mge_runtime.bundle import Bundle
from mge_runtime.device.program import Addresses
from mge_runtime.errors import BackendError
from tests.helpers.chain_runs import (
    EVERY,
    CudaOnHost,
    FakeCuda,
    ReplayingDevice,
    frames,
    need_sessions,
    open_capturable,
    open_graphs,
    same,
    write_typed,
)
from tests.helpers.host_device import HostDevice

onnxruntime = load_onnxruntime()


def test_the_hand_made_chain_asks_for_fp32_alone(tiny):
    """What the tests marked `gpu` compare must not differ by more than the order of FP32 sums."""
    for graph in tiny.make_graphs():
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph.model().graph), strict_mode=True)
        kinds = {t.name: t.type.tensor_type.elem_type for t in (*model.graph.value_info, *model.graph.input)}
        kinds |= {t.name: t.data_type for t in model.graph.initializer}
        for node in model.graph.node:
            assert node.op_type not in ("QuantizeLinear", "DequantizeLinear")
            if node.op_type in ("Conv", "MatMul", "Gemm"):
                assert {kinds[name] for name in node.input} == {onnx.TensorProto.FLOAT}, node


# --- capture ------------------------------------------------------------------------------------------------------


def test_the_second_run_is_captured_and_later_ones_are_launched(bundle, expected):
    device = ReplayingDevice()
    chain = open_capturable(bundle, device)
    for run, log in enumerate(([], ["capture", "launch"], ["launch"], ["launch"])):
        device.log.clear()
        same(chain.run(frames(2, run), 3, EVERY).tensors, expected.run(frames(2, run), outputs=EVERY).tensors)
        assert device.log == log
        program = chain.report()["programs"][0]
        assert (program["cuda_graph"], program["runs"]) == (run > 0, run + 1)
    device.log.clear()
    chain.run(frames(2), 1, EVERY)
    chain.run(frames(1), 3, EVERY)
    assert device.log == [], "another batch size or number of graphs is another program"
    chain.close()
    assert device.log == ["close"]


@pytest.mark.parametrize(
    ("open_chain", "device", "asked", "why"),
    [
        (open_capturable, ReplayingDevice(refusal=True), ["capture"], "the host has no graphs"),
        (lambda *args: open_capturable(*args, cuda_graphs=False), ReplayingDevice(), [], "CUDA graphs are turned off"),
        (
            lambda *args: open_ort_chain(onnxruntime, *args),
            ReplayingDevice(),
            [],
            "ONNX Runtime has CUDA graphs with its CUDA provider alone",
        ),
    ],
    ids=["refused", "turned off", "declined"],
)
def test_a_chain_that_cannot_be_captured_runs_plain_and_keeps_the_reason(
    bundle, expected, open_chain, device, asked, why
):
    chain = open_chain(bundle, device)
    for run in range(4):
        same(chain.run(frames(2, run), 3, EVERY).tensors, expected.run(frames(2, run), outputs=EVERY).tensors)
    assert device.log == asked, "once"
    assert chain.report()["programs"] == [{"batch": 2, "graphs": 3, "cuda_graph": False, "why": why, "runs": 4}]
    chain.close()


def test_graphs_of_a_batch_size_that_goes_are_closed(bundle):
    device = ReplayingDevice()
    chain = open_capturable(bundle, device)
    chain.run(frames(9), 1, {"logits_1"})
    for batch in range(1, 9):
        chain.run(frames(batch), 1, {"logits_1"})
        chain.run(frames(batch), 1, {"logits_1"})
    assert "close" not in device.log
    chain.run(frames(1), 1, {"logits_1"})
    chain.run(frames(9), 1, {"logits_1"})
    assert device.log.count("close") == 1
    left = [program["batch"] for program in chain.report()["programs"]]
    assert left == [3, 4, 5, 6, 7, 8, 1, 9], "the least recently used batch size makes way"
    chain.close()
    assert device.log.count("close") == 8


# --- turns --------------------------------------------------------------------------------------------------------


class _Gate:
    """Stops a chain inside its next run, at the first unit, until it is let on; or lets it fail there."""

    def __init__(self, chain):
        self.inside, self.let_on, self.fails, self.stops = threading.Event(), threading.Event(), False, False
        unit = chain._units[0]
        prepare = unit.prepare

        def gated(addresses, stream):
            launch = prepare(addresses, stream)
            enqueue = launch.enqueue

            def stopped(stream):
                if self.stops:
                    self.inside.set()
                    assert self.let_on.wait(30)
                if self.fails:
                    raise BackendError("no kernel was found")
                enqueue(stream)

            launch.enqueue = stopped
            return launch

        unit.prepare = gated


@pytest.fixture
def pair(bundle):
    """Two chains of one process, the gate of the first, and a way to run them in threads of their own."""
    chains = [open_capturable(bundle, ReplayingDevice()) for _ in range(2)]
    gate = _Gate(chains[0])
    with ThreadPoolExecutor(2) as pool:
        yield chains, gate, lambda number, batch: pool.submit(chains[number].run, frames(batch), 3, {"logits"})
        gate.let_on.set()
    for chain in chains:
        chain.close()


def test_first_runs_and_captures_take_turns_and_later_runs_do_not(pair):
    (first, second), gate, start = pair
    gate.stops = True
    for log in ([], ["capture", "launch"]):  # the first run, then the one that is captured
        gate.inside.clear()
        gate.let_on.clear()
        running = start(0, 2)
        assert gate.inside.wait(30)
        other = start(1, 2)
        assert wait([other], 0.2).not_done, "another pipeline's run did not wait for its turn"
        gate.let_on.set()
        for run in (running, other):
            run.result(30)
        assert first._device.log == second._device.log == log
    gate.inside.clear()
    gate.let_on.clear()
    running = start(0, 2)
    assert gate.inside.wait(30)
    start(1, 2).result(30)  # while the first chain's third run has not ended
    assert not running.done()


def fail(chain):
    chain._units[0].session = None
    with pytest.raises(BackendError, match="failed in graph expert_1"):
        chain.run(frames(2), 3, {"logits"})


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda _, bundle: open_capturable(bundle, ReplayingDevice()).close(), id="opening"),
        pytest.param(lambda chain, _: chain.close(), id="closing"),
        pytest.param(lambda chain, _: fail(chain), id="a run that fails"),
        pytest.param(lambda chain, _: chain.run(frames(2), 3, EVERY), id="a larger buffer for more outputs"),
        pytest.param(lambda chain, _: chain._space.close(), id="what it frees"),
    ],
)
def test_whatever_allocates_or_frees_waits_for_another_pipelines_first_run(pair, bundle, monkeypatch, act):
    (_, settled), gate, start = pair
    for _ in range(2):
        settled.run(frames(2), 3, {"logits"})
    log = []
    for name in ("_allocate", "_allocate_host"):
        method = getattr(HostDevice, name)
        monkeypatch.setattr(HostDevice, name, lambda *args, method=method: log.append(args) or method(*args))
    device, gate.stops = settled._device, True
    running = start(0, 2)
    assert gate.inside.wait(30)
    taken = device.allocated, device.allocated_host
    log.clear()
    device.log.clear()
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act, settled, bundle)
        done = wait([acting], 0.3).done
        early = log + [entry for entry in device.log if entry == "close"], (device.allocated, device.allocated_host)
        gate.let_on.set()
        acting.result(30)
    assert not done
    assert early == ([], taken)
    running.result(30)


def test_a_first_run_that_fails_gives_its_turn_back(pair, expected):
    (first, second), gate, start = pair
    gate.fails = True
    for _ in range(2):
        with pytest.raises(BackendError, match="no kernel was found"):
            start(0, 2).result(30)
    gate.fails = False
    wanted = {"logits": expected.run(frames(2)).tensors["logits"]}
    for chain in (second, first):
        same(chain.run(frames(2), 3, {"logits"}).tensors, wanted)


# --- ONNX Runtime on CUDA -----------------------------------------------------------------------------------------


def open_on_cuda(bundle, ort, **options):
    device = CudaOnHost()
    return open_graphs(bundle, device, device.create_stream(), ort=ort, **options)


CAPTURED_NHWC, CAPTURED_NCHW, PLAIN_NHWC, PLAIN_NCHW = (True, True), (False, True), (True, False), (False, False)


@pytest.mark.parametrize(
    ("kind", "cuda_graphs", "refused", "ways"),
    [
        ("fp32", True, (), [CAPTURED_NCHW]),
        ("fp32", True, (CAPTURED_NCHW,), [CAPTURED_NCHW, PLAIN_NCHW]),
        ("fp32", False, (), [PLAIN_NCHW]),
        ("fp16", True, (), [CAPTURED_NHWC]),
        ("int8", True, (CAPTURED_NHWC,), [CAPTURED_NHWC, CAPTURED_NCHW]),
        ("fp16", True, (CAPTURED_NHWC, CAPTURED_NCHW), [CAPTURED_NHWC, CAPTURED_NCHW, PLAIN_NHWC]),
        ("fp16", False, (), [PLAIN_NHWC]),
        ("fp16", False, (PLAIN_NHWC,), [PLAIN_NHWC, PLAIN_NCHW]),
    ],
)
def test_fp16_opens_with_tensor_cores_in_the_best_layout_that_works(tiny, tmp_path, kind, cuda_graphs, refused, ways):
    path = write_typed(tiny, tmp_path / "mge.plan", {"expert_2": kind, "expert_3": None})
    ort, half = FakeCuda(lambda *way: way in refused), kind != "fp32"
    with Bundle.open(path) as opened:
        first, second, third = open_on_cuda(opened, ort, cuda_graphs=cuda_graphs)
    tried = [way for way in ort.tried if way[2] == half] if half else ort.tried[: len(ways)]
    assert tried == [(*way, half) for way in ways], "the second graph alone has tensor cores"
    assert first.opened["tensor_cores"] is third.opened["tensor_cores"] is False
    names = [f"{'NHWC' if nhwc else 'NCHW'} {'with' if capture else 'without'} a CUDA graph" for nhwc, capture in ways]
    assert (second.opened["way"], second.opened["tensor_cores"]) == (names[-1], half)
    assert list(second.opened["refused"]) == names[:-1]
    assert all("have not been partitioned" in why for why in second.opened["refused"].values())
    assert (second.why_plain is None) == ways[-1][1]


def test_a_graph_that_opens_in_no_way_says_why(bundle):
    with pytest.raises(BackendError, match=r"cannot open graph expert_1: all compute graph nodes have"):
        next(open_on_cuda(bundle, FakeCuda(lambda *_: True)))


def test_where_cuda_does_not_load_one_session_is_tried(tiny, tmp_path):
    ort = FakeCuda(providers=["CPUExecutionProvider"])
    path = write_typed(tiny, tmp_path / "mge.plan", {"expert_1": "fp16"})
    with Bundle.open(path) as opened, pytest.raises(BackendError, match="cannot use CUDAExecution"):
        next(open_on_cuda(opened, ort))
    assert len(ort.tried) == 1


def test_each_launch_whose_capture_fails_runs_again_without_and_the_unit_says_so(bundle):
    unit = next(open_on_cuda(bundle, FakeCuda()))
    ids = []

    def run_with_iobinding(_binding, options):
        ids.append(options.get_run_config_entry("gpu_graph_id"))
        if ids[-1] in ("1", "2"):
            raise RuntimeError("operation not permitted when stream is capturing")

    binding = SimpleNamespace(bind_input=lambda *_: None, bind_output=lambda *_: None)
    unit.session = SimpleNamespace(io_binding=lambda: binding, run_with_iobinding=run_with_iobinding)
    tensors = dict.fromkeys([t.name for t in (*unit.spec.inputs, *unit.spec.outputs)], 0)
    launches = [unit.prepare(Addresses(batch, tensors, 0, 0), None) for batch in (1, 2, 3)]
    for launch in launches:
        launch.enqueue(None)
        launch.enqueue(None)
    assert ids == ["1", "-1", "-1", "2", "-1", "-1", "3", "3"]
    assert [launch.has_graph for launch in launches] == [False, False, True]
    assert not unit.prepare(Addresses(4, tensors, 0, 0), None).has_graph
    assert unit.opened["way"] == "NCHW without a CUDA graph"
    assert "stream is capturing" in unit.opened["refused"]["NCHW with a CUDA graph"]


def test_what_units_say_of_themselves_is_in_the_report(bundle):
    chain = open_ort_chain(onnxruntime, bundle, HostDevice())
    assert chain.report()["opened"] == {}
    chain._units[1].opened = {"way": "NHWC with a CUDA graph"}
    assert chain.report()["opened"] == {"expert_2": {"way": "NHWC with a CUDA graph"}}
    chain.close()


@pytest.mark.gpu
def test_graphs_of_onnx_runtime_run_on_the_gpu(cuda, bundle):
    need_sessions(cuda)
    chain = open_ort_chain(onnxruntime, bundle, cuda)
    plain = open_ort_chain(onnxruntime, bundle, cuda, cuda_graphs=False)
    for seed in range(4):
        same(chain.run(frames(2, seed), 3, EVERY).tensors, plain.run(frames(2, seed), 3, EVERY).tensors)
    assert chain.report()["programs"][0]["cuda_graph"], chain.report()
    assert not plain.report()["programs"][0]["cuda_graph"]
    chain.close()
    plain.close()
