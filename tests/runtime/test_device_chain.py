"""The chain on a device: real ONNX Runtime sessions over I/O binding, on the CPU and, where there is one, on a GPU."""

from dataclasses import replace

import numpy as np
import pytest

import mge_runtime.pipeline
from mge_runtime import Pipeline
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.backends.onnxruntime_cuda import OrtGraph, open_ort_chain
from mge_runtime.bundle import Bundle
from mge_runtime.device.executor import DeviceExecutor
from mge_runtime.errors import BackendError
from tests.helpers.chain_runs import EVERY, frames, need_sessions, open_graphs, same, write_chain
from tests.helpers.host_device import HostDevice

onnxruntime = load_onnxruntime()


@pytest.fixture(autouse=True)
def _needs_a_session(request):
    if "device" in request.fixturenames:
        need_sessions(request.getfixturevalue("device"))


@pytest.mark.parametrize("graphs", [1, 2, 3])
def test_every_tensor_equals_the_chain_on_the_cpu(device, bundle, expected, graphs):
    chain = open_ort_chain(onnxruntime, bundle, device)
    for batch in (1, 3, 8):
        for seed in (1, 2, 3):  # plain, captured, launched
            found = chain.run(frames(batch, seed), graphs, EVERY)
            same(found.tensors, expected.run(frames(batch, seed), graphs=graphs, outputs=EVERY).tensors)
    assert list(found.times_ms) == ["upload", "chain", "download", "host"]
    assert all(ms >= 0 for ms in found.times_ms.values())
    chain.close()


def test_units_share_scratch_memory_and_know_how_much(device, bundle):
    seen = []

    def open_units(device, stream):
        for unit, size in zip(open_graphs(bundle, device, stream), (100, 3000, 0), strict=True):
            unit.scratch_bytes = size
            prepare = unit.prepare
            unit.prepare = lambda a, s, prepare=prepare: (seen.append((a.scratch, a.scratch_bytes)), prepare(a, s))[1]
            yield unit

    chain = DeviceExecutor(bundle.manifest, device, open_units)
    chain.run(frames(2), 3, EVERY)
    report = chain.report()
    assert (report["scratch_bytes"], report["scratch_bytes_if_not_shared"]) == (3072, 3072 + 256)
    assert seen == [(seen[0][0], 3072)] * 3
    assert seen[0][0] % 256 == 0
    assert device.allocated == report["tensor_bytes"] + 3072
    chain.close()


def test_results_outlive_the_next_run_and_the_chain(device, bundle, expected):
    chain = open_ort_chain(onnxruntime, bundle, device)
    apart = frames(4, 1)[::2]  # no contiguous array
    first = chain.run(apart, 3, EVERY).tensors
    chain.run(frames(2, 2), 3, EVERY)
    chain.close()
    same(first, expected.run(apart, outputs=EVERY).tensors)


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_stays_as_it_is_after_the_largest_batch(device, bundle, expected):
    chain = open_ort_chain(onnxruntime, bundle, device)
    chain.run(frames(1), 3, EVERY)
    small = device.allocated
    chain.run(frames(12), 3, EVERY)
    assert device.allocated > 8 * small
    same(chain.run(frames(1, 5), 3, EVERY).tensors, expected.run(frames(1, 5), outputs=EVERY).tensors)
    before = device.allocated, device.allocated_host
    for run in range(60):
        chain.run(frames(1 + run % 12), 1 + run % 3, EVERY)
    assert (device.allocated, device.allocated_host) == before
    assert len({program["batch"] for program in chain.report()["programs"]}) <= 8, "old batch sizes must go"
    chain.close()


def test_closing_gives_everything_back_and_twice_is_once(device, bundle):
    chain = open_ort_chain(onnxruntime, bundle, device)
    chain.run(frames(2), 3, EVERY)
    assert device.allocated > 0
    chain.close()
    chain.close()
    assert (device.allocated, device.allocated_host) == (0, 0)
    with pytest.raises(BackendError, match="closed"):
        chain.run(frames(1), 3, EVERY)


def test_a_larger_batch_than_the_device_holds_leaves_the_chain_usable(bundle, expected, monkeypatch):
    device = HostDevice()
    chain = open_ort_chain(onnxruntime, bundle, device)
    allocate = device._allocate

    def small(size):
        if size > 4 * chain._space.tensor_bytes:
            raise BackendError("out of memory")
        return allocate(size)

    chain.run(frames(2), 3, EVERY)
    monkeypatch.setattr(device, "_allocate", small)
    with pytest.raises(BackendError, match="out of memory"):
        chain.run(frames(64), 3, EVERY)
    same(chain.run(frames(2), 3, EVERY).tensors, expected.run(frames(2), outputs=EVERY).tensors)
    chain.close()
    assert (device.allocated, device.allocated_host) == (0, 0)


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_graph_that_fails_to_open_takes_the_others_with_it(device, tiny, tmp_path, monkeypatch):
    def misspell(graph):
        model = graph.model()
        return replace(model, graph=model.graph.replace(b"Softmax", b"Softmix"))

    path, closed = write_chain(tiny, tmp_path / "mge.plan", misspell), []
    monkeypatch.setattr(OrtGraph, "close", lambda unit: closed.append(unit.name))
    with (
        Bundle.open(path) as broken,
        pytest.raises(BackendError, match=r"cannot open graph expert_3: .*Softmix"),
    ):
        open_ort_chain(onnxruntime, broken, device)
    assert closed == ["expert_2", "expert_1"]


def test_memory_that_runs_out_while_opening_closes_the_units(bundle, monkeypatch):
    device, closed = HostDevice(), []
    monkeypatch.setattr(OrtGraph, "close", lambda unit: closed.append(unit.name))

    def none(size):
        raise BackendError(f"no page-locked memory of {size} bytes")

    monkeypatch.setattr(device, "_allocate_host", none)
    with pytest.raises(BackendError, match="no page-locked memory"):
        open_ort_chain(onnxruntime, bundle, device)
    assert closed == ["expert_3", "expert_2", "expert_1"]
    assert device.allocated == 0


def test_a_run_that_fails_is_named_and_the_next_one_works(device, bundle, expected, monkeypatch):
    chain = open_ort_chain(onnxruntime, bundle, device)
    chain.run(frames(2), 3, EVERY)
    unit = chain._units[1]
    session, before = unit.session, device.allocated

    class Failing:
        def __getattr__(self, name):
            return getattr(session, name)

        def run_with_iobinding(self, *_):
            raise RuntimeError("the kernel\nfailed")

    monkeypatch.setattr(unit, "session", Failing())
    with pytest.raises(BackendError, match=r"^ONNX Runtime failed in graph expert_2: the kernel failed$"):
        chain.run(frames(2), 3, EVERY)
    monkeypatch.setattr(unit, "session", session)
    same(chain.run(frames(2), 3, EVERY).tensors, expected.run(frames(2), outputs=EVERY).tensors)
    assert device.allocated == before
    chain.close()


# --- pipeline -----------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(bundle_path, monkeypatch):
    """A pipeline on the host as if its engines had been built for a batch of at most two."""

    def open_executor(_choice, bundle, **_):
        executor = open_ort_chain(onnxruntime, bundle, HostDevice())
        executor.max_batch = 2
        return executor

    monkeypatch.setattr(mge_runtime.pipeline, "open_executor", open_executor)
    with Pipeline.open(bundle_path) as pipeline:
        yield pipeline


def test_a_pipeline_splits_what_is_larger_than_its_engines(limited, photos, bundle_path):
    assert limited.max_batch == 2
    with Pipeline.open(bundle_path, device="cpu", threads=1) as cpu:
        wanted = [prediction.logits for prediction in cpu.predict_batch(photos)]
    for predictions in (
        limited.predict_batch(photos),
        [prediction for _, prediction in limited.predict_iter(photos, batch=3)],
    ):
        found = [prediction.logits for prediction in predictions]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    runs = {program["batch"]: program["runs"] for program in limited.report()["programs"]}
    assert runs == {2: 6, 1: 2}, "seven images, twice, in as few runs as there can be"
    timings = dict(predictions[0].timings_ms)
    total = timings.pop("total")
    assert list(timings) == ["decode", "preprocess", "upload", "chain", "download", "host"]
    assert total == pytest.approx(sum(timings.values()))


def test_frames_that_are_too_many_are_refused_with_the_command(limited):
    with pytest.raises(BackendError, match=r"5 frames at once; .* for 1 to 2: .*`mge-build --batch 1,1,5`"):
        limited.run(frames(5))
    assert limited.run(frames(2))["logits"].shape == (2, 5)


def test_a_cpu_pipeline_has_no_limit_and_nothing_to_report(bundle_path):
    with Pipeline.open(bundle_path, device="cpu") as pipeline:
        assert pipeline.max_batch is None
        assert pipeline.report() == {}
    with pytest.raises(BackendError, match="closed"):
        pipeline.report()
