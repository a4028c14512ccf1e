"""The self-check's comparisons on the host as a device; and that each of them can fail."""

import mmap
import threading
from dataclasses import replace

import numpy as np
import pytest

from mge_runtime.bundle import Bundle
from mge_runtime.compare import TOLERANCES
from mge_runtime.device.base import Graph
from mge_runtime.device.host import HostDevice
from mge_runtime.errors import BackendError
from mge_runtime.selfcheck import (
    check_batches,
    check_copies,
    check_graphs,
    check_memory,
    check_parity,
    check_together,
    drawn_frames,
)
from mge_runtime.selfcheck.memory import HOST_LIMIT, host_memory
from mge_runtime.selfcheck.outputs import compared_tensors
from tests.helpers import chain_runs as runs


def unchanged(tensors, _):
    return tensors


class GraphDevice(HostDevice):
    """The host with graphs: a launch does again what was enqueued; `stale` ones do nothing."""

    def __init__(self, *, refusal=None, stale=False):
        super().__init__()
        self.refusal, self.stale = refusal, stale

    def capture(self, stream, enqueue):
        if self.refusal:
            return super().capture(stream, enqueue)
        device = self

        class Replay(Graph):
            nodes = None

            def launch(self, stream):  # noqa: ARG002
                if not device.stale:
                    enqueue()

            def close(self):
                pass

        return Replay()


class OnDevice:
    """A chain on a device, opened as a check wants it; `change` may alter what a run puts out."""

    def __init__(self, path, device, graphs, change=unchanged):
        with Bundle.open(path) as bundle:
            self.manifest = bundle.manifest
            self.chain = runs.open_capturable(bundle, device, graphs=graphs)
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

    def make(change=unchanged, *, opened=OnDevice, **device):
        def open_it(graphs):
            return opened(on_cpu.path, GraphDevice(**device), graphs, change)

        return replace(on_cpu, backend="a device", device="host", open=open_it, reference=lambda: on_cpu.open(True))

    return make


def failed(check, text):
    assert check.outcome == "failed", check
    assert text in check.found
    return True


# --- outputs ------------------------------------------------------------------------------------------------------


def test_a_device_that_answers_as_the_cpu_passes(on_device, frames):
    subject = on_device()
    for check in (check_parity, check_batches, check_graphs, check_copies, check_together):
        result = check(subject, frames)
        assert result.outcome == "passed", result
        assert result.found
    assert check_graphs(subject, frames).numbers["opened"] == {}
    parity = check_parity(subject, frames)
    assert parity.numbers["images"] == len(frames)
    assert parity.numbers["gate_relative"] <= 1e-4


def shifted(name, row, by):
    def change(tensors, _):
        tensors[name] = tensors[name].copy()
        tensors[name][row] += by
        return tensors

    return change


@pytest.mark.parametrize(
    ("name", "by", "said"),
    [
        ("logits", 0.1, "logits differs by"),
        ("logits", [100, 0, 0, 0, 0], "change their class"),
        ("logits_1", 0.1, "logits_1 differs by"),
        ("gate", [0.01, -0.01, 0], "gate differs by"),
        ("gate", np.nan, "gate holds numbers that are not finite"),
        ("box_1", [4, 4, 0, 0], "box_1: median box IoU"),
        ("box_2", [4, 4, 0, 0], "box_2: median box IoU"),
    ],
)
def test_answers_that_differ_from_the_cpu_fail(on_device, frames, name, by, said):
    assert failed(check_parity(on_device(shifted(name, slice(None), by)), frames), said)


def test_a_batch_whose_rows_are_mixed_up_fails(on_device, frames):
    def rolled(tensors, _):
        return {name: np.roll(array, 1, 0) for name, array in tensors.items()}

    assert failed(check_batches(on_device(rolled), frames), "differs by")


def test_the_last_row_of_a_remainder_counts(on_device, frames):
    def forgotten(tensors, frames):
        if 1 < len(frames) < 8:
            tensors["gate"][-1] = tensors["gate"][0][::-1]
        return tensors

    assert failed(check_batches(on_device(forgotten), frames[:3]), "gate differs by")
    assert check_batches(on_device(), frames[:3]).numbers["images"] == 12


def test_engines_for_one_image_have_no_batches(on_device, frames):
    class Single(OnDevice):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.max_batch = 1

    subject = on_device(opened=Single)
    assert check_batches(subject, frames).outcome == "not run"
    assert check_parity(subject, frames).outcome == "passed"


def test_graphs_that_replay_old_work_fail(on_device, frames):
    assert failed(check_graphs(on_device(stale=True), frames), "batch 1: ")


def test_graphs_that_were_refused_fail_with_the_reason(on_device, frames):
    assert failed(check_graphs(on_device(refusal=True), frames), "batch 8: no graph: the host has no graphs")


def test_a_switch_that_does_nothing_fails(on_device, frames):
    class Always(OnDevice):
        def __init__(self, path, device, graphs, change):  # noqa: ARG002
            super().__init__(path, device, True, change)

    assert failed(check_graphs(on_device(opened=Always), frames), "where graphs were turned off")


# --- copies -------------------------------------------------------------------------------------------------------


def test_one_copy_too_many_fails(on_device, frames):
    class Detour(OnDevice):
        def run(self, frames, *, outputs=None):
            tensors = super().run(frames, outputs=outputs)
            stream, memory = self.device.create_stream(), self.device.allocate(64)
            buffer = self.device.allocate_host(64)
            self.device.download(buffer, 0, memory, 64, stream)
            memory.close()
            buffer.close()
            return tensors

    assert failed(check_copies(on_device(opened=Detour), frames), "run 1 copied host_to_device 1, ")


# --- memory -------------------------------------------------------------------------------------------------------


def test_a_leak_on_the_host_fails(on_cpu, frames):
    if host_memory() is None:
        pytest.skip("this system does not tell how much memory is in use")
    kept = []

    def leaking(graphs):
        opened = on_cpu.open(graphs)
        run = opened.run

        def run_and_keep(*arguments, **options):
            kept.append(mmap.mmap(-1, 2**17))  # the heap may have room that earlier tests left
            kept[-1].write(bytes(2**17))
            return run(*arguments, **options)

        opened.run = run_and_keep
        return opened

    check = check_memory(replace(on_cpu, open=leaking), frames, 60)
    assert failed(check, "host memory grew by")
    assert check.numbers["host_growth"] > HOST_LIMIT
    kept.clear()
    check = check_memory(on_cpu, frames, 60)
    assert check.outcome == "passed", check


def test_a_leak_on_the_device_fails(on_device, frames):
    devices = []

    class Leaking(OnDevice):
        def run(self, frames, *, outputs=None):
            devices.append((self.device, self.device.allocate(1024)))
            return super().run(frames, outputs=outputs)

    def used():
        return devices[-1][0].allocated if devices else 0

    assert failed(
        check_memory(on_device(opened=Leaking), frames, 40, meters={"device": (used, 0)}), "device memory grew"
    )


def test_what_others_take_for_a_while_is_no_growth_and_what_nobody_tells_is_not_run(on_cpu, frames):
    values = iter([100, 900, 100, 900] * 100)
    assert check_memory(on_cpu, frames, 20, meters={"device": (lambda: next(values), 0)}).numbers["device_growth"] == 0
    assert check_memory(on_cpu, frames, 2, meters={"host": (lambda: None, 0)}).outcome == "not run"


def test_a_heap_that_settles_once_is_no_leak_and_one_that_grows_each_time_is(on_cpu, frames):
    samples = 21  # a period
    settling = iter([0] * 11 + [500] * (2 * samples))  # the first is asked whether the meter tells anything
    check = check_memory(on_cpu, frames, 20, meters={"host": (lambda: next(settling), 100)})
    assert (check.outcome, check.numbers["host_growth"]) == ("passed", 0)
    assert len(check.numbers["host_series"]) == 2 * samples
    growing = iter(range(0, 50 * (3 * samples + 1), 50))
    check = check_memory(on_cpu, frames, 20, meters={"host": (lambda: next(growing), 400)})
    assert (check.outcome, check.numbers["host_growth"]) == ("failed", 500)
    assert len(check.numbers["host_series"]) == 3 * samples


# --- two pipelines ------------------------------------------------------------------------------------------------


def test_pipelines_that_share_their_answers_fail(on_device, frames):
    lock, last = threading.Lock(), {}

    def mixed(tensors, _):
        if threading.current_thread() is threading.main_thread():
            return tensors
        with lock:
            return last.setdefault(len(tensors["gate"]), tensors)

    assert failed(check_together(on_device(mixed), frames), "pipeline 1: ")


def test_a_pipeline_that_fails_beside_another_is_said(on_device, frames):
    def refused(tensors, _):
        if threading.current_thread().name.endswith("_1"):
            raise BackendError("in use by another thread")
        return tensors

    with pytest.raises(BackendError, match="in use by another thread"):
        check_together(on_device(refused), frames)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mge-selfcheck")]


# --- how outputs are compared -------------------------------------------------------------------------------------


def test_the_tolerances_are_those_of_the_precision(on_cpu):
    half = {name: {"type": "fp16"} for name in on_cpu.manifest.precision}
    for plan, precision in ((half, "fp16"), ({**half, "expert_1": {"type": "int8"}}, "int8")):
        assert replace(on_cpu, manifest=replace(on_cpu.manifest, precision=plan)).precision == precision
    assert on_cpu.tolerances is TOLERANCES["fp32"]


def test_drawn_images_are_the_same_every_time_and_differ(on_cpu):
    first, second = (drawn_frames(on_cpu.manifest.preprocess).frames for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len({frame.tobytes() for frame in first}) == len(first)
