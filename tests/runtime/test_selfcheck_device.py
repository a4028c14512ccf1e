"""The self-check's comparisons on the host as a device; and that each of them can fail."""

import mmap
import threading
from dataclasses import replace

import numpy as np
import pytest

from mge_runtime import bench_subject, selfcheck
from mge_runtime.bundle import Bundle
from mge_runtime.compare import TOLERANCES
from mge_runtime.errors import BackendError
from mge_runtime.selfcheck import (
    check_batches,
    check_cuda_graphs,
    check_memory,
    check_parity,
    check_together,
    compared_tensors,
)
from tests.helpers import chain_runs as runs


def unchanged(tensors, _):
    return tensors


class OnDevice:
    """A chain on a device, opened as a check wants it; `change` may alter its outputs."""

    def __init__(self, path, device, cuda_graphs, change=unchanged):
        with Bundle.open(path) as bundle:
            self.manifest = bundle.manifest
            self.chain = runs.open_capturable(bundle, device, cuda_graphs=cuda_graphs)
        self.max_batch, self.device, self.change = None, device, change

    def run(self, frames, *, outputs=None):
        outputs = compared_tensors(self.manifest) if outputs is None else outputs
        tensors = self.chain.run(frames, len(self.manifest.graphs), set(outputs)).tensors
        return self.change(dict(tensors), frames)

    def report(self):
        return self.chain.report()

    def close(self):
        self.chain.close()


@pytest.fixture
def on_device(on_cpu):
    """Make a subject that runs on the host as a device, checked against the CPU."""

    def make(change=unchanged, *, opened=OnDevice, always=False, **device):
        def open_it(cuda_graphs=True):
            return opened(on_cpu.path, runs.ReplayingDevice(**device), cuda_graphs or always, change)

        return replace(on_cpu, backend="a device", device="host", open=open_it, reference=on_cpu.open)

    return make


def assert_fails(check, text):
    assert check.outcome == "failed", check
    assert text in check.found


# --- outputs ------------------------------------------------------------------------------------------------------


def test_a_device_that_predicts_as_the_cpu_passes(on_device, frames):
    subject = on_device()
    for check in (check_parity, check_batches, check_cuda_graphs, check_together):
        result = check(subject, frames)
        assert result.outcome == "passed", result
        assert result.found
    assert check_cuda_graphs(subject, frames).numbers["opened"] == {}
    parity = check_parity(subject, frames)
    assert parity.numbers["images"] == len(frames)
    assert parity.numbers["gate_relative"] <= 1e-4


def shifted(name, by):
    def change(tensors, _):
        return {**tensors, name: tensors[name] + np.float32(by)}

    return change


def mixed_up(tensors, _):
    return {name: np.roll(array, 1, 0) for name, array in tensors.items()}


def last_of_a_remainder(tensors, frames):
    if 1 < len(frames) < 8:
        tensors["gate"][-1] = tensors["gate"][0][::-1]
    return tensors


@pytest.mark.parametrize(
    ("check", "change", "said"),
    [
        (check_parity, shifted("logits", 0.1), "logits differs by"),
        (check_parity, shifted("logits", [100, 0, 0, 0, 0]), "change their class"),
        (check_parity, shifted("logits_1", 0.1), "logits_1 differs by"),
        (check_parity, shifted("gate", [0.01, -0.01, 0]), "gate differs by"),
        (check_parity, shifted("gate", np.nan), "gate holds numbers that are not finite"),
        (check_parity, shifted("box_1", [4, 4, 0, 0]), "box_1: median box IoU"),
        (check_parity, shifted("box_2", [4, 4, 0, 0]), "box_2: median box IoU"),
        (check_batches, mixed_up, "differs by"),
        (check_batches, last_of_a_remainder, "gate differs by"),
    ],
)
def test_outputs_that_differ_fail(on_device, frames, check, change, said):
    assert_fails(check(on_device(change), frames), said)


def test_few_images_are_repeated_until_there_is_a_remainder(on_device, frames):
    assert check_batches(on_device(), frames[:3]).numbers["images"] == 12


def test_engines_for_one_image_have_no_batches(on_device, frames):
    class Single(OnDevice):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.max_batch = 1

    subject = on_device(opened=Single)
    assert check_batches(subject, frames).outcome == "not run"
    assert check_parity(subject, frames).outcome == "passed"


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ({"stale": True}, "batch 1: "),
        ({"refusal": True}, "batch 8: no CUDA graph: the host has no graphs"),
        ({"always": True}, "where they were turned off"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_graphs_that_do_old_work_were_refused_or_cannot_be_turned_off_fail(on_device, frames, device, said):
    assert_fails(check_cuda_graphs(on_device(**device), frames), said)


# --- memory -------------------------------------------------------------------------------------------------------


def test_a_leak_on_the_host_fails(on_cpu, frames):
    if selfcheck.host_memory() is None:
        pytest.skip("this system does not tell how much memory is in use")
    kept = []

    def leaking():
        opened = on_cpu.open()
        run = opened.run

        def run_and_keep(*arguments, **options):
            kept.append(mmap.mmap(-1, 2**17))  # the heap may have room that earlier tests left
            kept[-1].write(bytes(2**17))
            return run(*arguments, **options)

        opened.run = run_and_keep
        return opened

    assert_fails(check_memory(replace(on_cpu, open=leaking), frames, 60), "host memory grew by")
    kept.clear()
    check = check_memory(on_cpu, frames, 60)
    assert check.outcome == "passed", check


def test_a_leak_on_the_device_fails(on_device, frames, monkeypatch):
    devices = []

    class Leaking(OnDevice):
        def run(self, frames, *, outputs=None):
            devices.append((self.device, self.device.allocate(2**17)))
            return super().run(frames, outputs=outputs)

    monkeypatch.setattr(selfcheck, "device_memory", lambda _: devices[-1][0].allocated if devices else 0)
    subject = replace(on_device(opened=Leaking), device="cuda:0")
    assert_fails(check_memory(subject, frames, 40), "device memory grew")


MIB = 2**20


@pytest.mark.parametrize(
    ("used", "outcome", "growth", "periods"),
    [
        ([0, 9 * MIB] * 100, "passed", 0, 1),  # what others take for a while
        ([0] * 10 + [9 * MIB] * 100, "passed", 0, 2),  # a heap that settles once
        (range(0, 20 * MIB, MIB // 4), "failed", 10 * MIB // 4, 3),  # one that grows each time
    ],
)
def test_growth_counts_where_it_stays_and_goes_on(on_cpu, frames, monkeypatch, used, outcome, growth, periods):
    values = iter([0, *used])  # the first is asked whether the system tells anything
    monkeypatch.setattr(selfcheck, "host_memory", lambda: next(values))
    check = check_memory(on_cpu, frames, 20)
    assert (check.outcome, check.numbers["host_growth"]) == (outcome, growth)
    assert len(check.numbers["host_series"]) == 21 * periods


def test_what_nobody_tells_is_not_run(on_cpu, frames, monkeypatch):
    monkeypatch.setattr(selfcheck, "host_memory", lambda: None)
    assert check_memory(on_cpu, frames, 2).outcome == "not run"


# --- two pipelines ------------------------------------------------------------------------------------------------


def test_pipelines_that_share_their_outputs_fail(on_device, frames):
    lock, last = threading.Lock(), {}

    def mixed(tensors, _):
        if threading.current_thread() is threading.main_thread():
            return tensors
        with lock:
            return last.setdefault(len(tensors["gate"]), tensors)

    assert_fails(check_together(on_device(mixed), frames), "pipeline 1: ")


def test_a_pipeline_that_fails_beside_another_is_said(on_device, frames):
    def refused(tensors, _):
        if threading.current_thread().name.endswith("_1"):
            raise BackendError("in use by another thread")
        return tensors

    with pytest.raises(BackendError, match="in use by another thread"):
        check_together(on_device(refused), frames)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mge-selfcheck")]


# --- what is checked ----------------------------------------------------------------------------------------------


def test_the_tolerances_are_those_of_the_precision(on_cpu):
    half = {name: {"type": "fp16"} for name in on_cpu.manifest.precision}
    for plan, precision in ((half, "fp16"), ({**half, "expert_1": {"type": "int8"}}, "int8")):
        assert replace(on_cpu, manifest=replace(on_cpu.manifest, precision=plan)).precision == precision
    assert on_cpu.tolerances is TOLERANCES["fp32"]


def test_synthetic_images_are_the_same_every_time_and_differ(on_cpu, monkeypatch):
    monkeypatch.setattr(bench_subject, "_SYNTHETIC", 3)
    first, second = (bench_subject.Images.synthetic(on_cpu.manifest.preprocess).frames for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len({frame.tobytes() for frame in first}) == 3
