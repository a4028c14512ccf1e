"""Graphs of a chain on a device: when a run is captured, when launched, and what is said where it cannot be."""

import importlib.util
from pathlib import Path

import pytest

from mge_runtime.backends.onnxruntime_cuda import open_ort_chain
from mge_runtime.backends.ort import load_onnxruntime
from mge_runtime.device import Graph
from mge_runtime.device.host import HostDevice

onnxruntime = load_onnxruntime()

spec = importlib.util.spec_from_file_location("mge_tests_chain_runs", Path(__file__).with_name("chain_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
EVERY, frames, same = runs.EVERY, runs.frames, runs.same


class _Replaying(HostDevice):
    """A host whose graphs do again what was enqueued; or one that refuses, and notes how often it is asked."""

    def __init__(self, refusal=None):
        super().__init__()
        self.refusal, self.log = refusal, []

    def capture(self, stream, enqueue):
        self.log.append("capture")
        if self.refusal:
            return super().capture(stream, enqueue)
        log = self.log

        class Replay(Graph):
            def launch(self, stream):  # noqa: ARG002
                log.append("launch")
                enqueue()

            def close(self):
                log.append("close")

        return Replay()


def test_the_second_run_is_captured_and_later_ones_are_launched(bundle, expected):
    device = _Replaying()
    chain = runs.open_capturable(bundle, device)
    for run, log in enumerate(([], ["capture", "launch"], ["launch"], ["launch"])):
        device.log.clear()
        same(chain.run(frames(2, run), 3, EVERY).tensors, expected.run(frames(2, run), outputs=EVERY).tensors)
        assert device.log == log
        program = chain.report()["programs"][0]
        assert (program["graph"], program["runs"]) == (run > 0, run + 1)
    device.log.clear()
    chain.run(frames(2), 1, EVERY)
    chain.run(frames(1), 3, EVERY)
    assert device.log == [], "another batch size or number of segments is another program"
    chain.close()
    assert device.log == ["close"]


def test_a_refused_capture_is_asked_for_once_and_its_reason_kept(bundle, expected):
    device = _Replaying(refusal=True)
    chain = runs.open_capturable(bundle, device)
    for run in range(4):
        same(chain.run(frames(2, run), 3, EVERY).tensors, expected.run(frames(2, run), outputs=EVERY).tensors)
    assert device.log == ["capture"]
    assert chain.report()["programs"] == [
        {"batch": 2, "segments": 3, "graph": False, "why": "the host has no graphs", "runs": 4}
    ]
    chain.close()


def test_graphs_can_be_turned_off_and_units_can_decline(bundle):
    for options, open_chain, why in (
        ({"graphs": False}, runs.open_capturable, "graphs are turned off"),
        ({}, lambda b, d: open_ort_chain(onnxruntime, b, d), "ONNX Runtime has graphs on CUDA alone"),
    ):
        device = _Replaying()
        chain = open_chain(bundle, device, **options)
        for _ in range(3):
            chain.run(frames(1), 3, EVERY)
        assert device.log == []
        assert [(p["graph"], p["why"]) for p in chain.report()["programs"]] == [(False, why)]
        chain.close()


def test_graphs_of_a_batch_size_that_goes_are_closed(bundle):
    device = _Replaying()
    chain = runs.open_capturable(bundle, device)
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


@pytest.mark.gpu
def test_graphs_of_onnx_runtime_run_on_the_gpu(cuda, bundle):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime was built without CUDA: onnxruntime-gpu is not installed")
    chain = open_ort_chain(onnxruntime, bundle, cuda)
    plain = open_ort_chain(onnxruntime, bundle, cuda, graphs=False)
    for seed in range(4):
        same(chain.run(frames(2, seed), 3, EVERY).tensors, plain.run(frames(2, seed), 3, EVERY).tensors)
    assert chain.report()["programs"][0]["graph"], chain.report()
    assert not plain.report()["programs"][0]["graph"]
    chain.close()
    plain.close()
