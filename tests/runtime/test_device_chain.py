"""The chain on a device: real ONNX Runtime sessions over I/O binding, on the CPU and, where there is one, on a GPU."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mge_runtime.pipeline
from mge_runtime import Pipeline
from mge_runtime.backends.base import Backend
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.backends.onnxruntime_cuda import OrtGraph, open_ort_chain
from mge_runtime.bundle import Bundle, write_bundle
from mge_runtime.device.executor import DeviceExecutor
from mge_runtime.device.host import HostDevice
from mge_runtime.errors import BackendError

onnxruntime = load_onnxruntime()

spec = importlib.util.spec_from_file_location("mge_tests_chain_runs", Path(__file__).with_name("chain_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
EVERY, frames, same = runs.EVERY, runs.frames, runs.same


@pytest.fixture(autouse=True)
def _needs_a_session(request):
    if "device" in request.fixturenames:
        runs.need_sessions(request.getfixturevalue("device"))


# --- results ------------------------------------------------------------------------------------------------------


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


def test_only_the_graphs_that_are_asked_for_run(bundle, monkeypatch):
    chain = open_ort_chain(onnxruntime, bundle, HostDevice())
    monkeypatch.setattr(chain._units[2], "prepare", lambda *_: pytest.fail("the third was not asked for"))
    assert set(chain.run(frames(1), 2, EVERY).tensors) == EVERY - {
        "logits_3", "heatmap_3", "gate", "logits"
    }  # fmt: skip
    chain.close()


def test_units_share_scratch_memory_and_know_how_much(device, bundle):
    seen = []

    def open_units(device, stream):
        for unit, size in zip(runs.open_graphs(bundle, device, stream), (100, 3000, 0), strict=True):
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


def test_two_chains_in_one_process_do_not_mix(device, bundle, expected):
    chains = [open_ort_chain(onnxruntime, bundle, device) for _ in range(2)]
    for seed in range(4):
        for number, chain in enumerate(chains):
            found = chain.run(frames(2, 10 * number + seed), 3, {"logits"}).tensors
            same(found, {"logits": expected.run(frames(2, 10 * number + seed)).tensors["logits"]})
    chains[0].close()
    assert chains[1].run(frames(1), 3, {"logits"}).tensors["logits"].shape == (1, 5)
    chains[1].close()


# --- copies and memory --------------------------------------------------------------------------------------------


def test_only_frames_go_in_and_only_what_is_asked_for_comes_out(device, bundle):
    chain = open_ort_chain(onnxruntime, bundle, device)
    for run in range(1, 5):
        chain.run(frames(3), 3, {"logits", "box_1"})
        copies = device.copies
        assert (copies["host_to_device"], copies["host_to_device_bytes"]) == (run, run * 3 * 32 * 32 * 3)
        assert (copies["device_to_host"], copies["device_to_host_bytes"]) == (2 * run, run * 3 * (5 + 4) * 4)
    assert chain.report()["copies"]["device_to_host"] == 8
    chain.close()


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


@pytest.mark.gpu
def test_the_gpu_has_as_much_free_memory_after_a_thousand_runs(cuda, bundle):
    from cuda.bindings import driver

    runs.need_sessions(cuda)
    chain = open_ort_chain(onnxruntime, bundle, cuda)
    for batch in (1, 8):
        for _ in range(10):
            chain.run(frames(batch), 3, {"logits"})
    _, free, _ = driver.cuMemGetInfo()
    for run in range(1000):
        chain.run(frames((1, 8)[run % 2]), 3, {"logits"})
    _, after, _ = driver.cuMemGetInfo()
    assert free - after < 2**20
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
    graphs = tiny.make_graphs()
    models = {g.spec.name: g.model() for g in graphs}
    models["expert_3"] = replace(models["expert_3"], graph=models["expert_3"].graph.replace(b"Softmax", b"Softmix"))
    write_bundle(tmp_path / "mge.plan", tiny.make_manifest(graphs), models)
    closed = []
    monkeypatch.setattr(OrtGraph, "close", lambda unit: closed.append(unit.name))
    with (
        Bundle.open(tmp_path / "mge.plan") as broken,
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


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 32, 31, 3), np.uint8), np.zeros((2, 32), np.uint8)]
)
def test_frames_of_another_kind_are_refused(device, bundle, wrong):
    chain = open_ort_chain(onnxruntime, bundle, device)
    with pytest.raises(BackendError, match=r"expected uint8 \[\d, 32, 32, 3\]"):
        chain.run(wrong, 3, EVERY)
    assert device.copies["host_to_device"] == 0
    chain.close()


# --- pipeline -----------------------------------------------------------------------------------------------------


class _Limited(Backend):
    """Runs on the host as if its engines had been built for a batch of at most two."""

    name, device, version, streams = "onnxruntime", "host", "", 1

    def open_chain(self, bundle):
        chain = open_ort_chain(onnxruntime, bundle, HostDevice())
        chain.max_batch = 2
        return chain


@pytest.fixture
def limited(bundle_path, monkeypatch):
    monkeypatch.setattr(mge_runtime.pipeline, "open_backend", lambda *_, **__: _Limited())
    with Pipeline.open(bundle_path) as pipeline:
        yield pipeline


def test_a_pipeline_splits_what_is_larger_than_its_engines(limited, photos, bundle_path):
    assert limited.max_batch == 2
    with Pipeline.open(bundle_path, device="cpu", threads=1) as cpu:
        wanted = [answer.logits for answer in cpu.predict_batch(photos)]
    for answers in (
        limited.predict_batch(photos),
        [answer for _, answer in limited.predict_iter(photos, batch=3)],
    ):
        np.testing.assert_allclose([answer.logits for answer in answers], wanted, rtol=1e-4, atol=1e-5)
    runs = {program["batch"]: program["runs"] for program in limited.report()["programs"]}
    assert runs == {2: 6, 1: 2}, "seven pictures, twice, in as few runs as there can be"
    timings = dict(answers[0].timings_ms)
    total = timings.pop("total")
    assert list(timings) == ["decode", "preprocess", "upload", "chain", "download", "host"]
    assert total == pytest.approx(sum(timings.values()))


def test_frames_that_are_too_many_are_refused_with_the_command(limited):
    with pytest.raises(BackendError, match=r"5 frames at once; .* at most 2: .*`mge-build --batch 1,1,5`"):
        limited.run(frames(5))
    assert limited.run(frames(2))["logits"].shape == (2, 5)


def test_a_cpu_pipeline_has_no_limit_and_nothing_to_report(bundle_path):
    with Pipeline.open(bundle_path, device="cpu") as pipeline:
        assert pipeline.max_batch is None
        assert pipeline.report() == {}
    with pytest.raises(BackendError, match="closed"):
        pipeline.report()
