"""Early exits in the executors: who leaves after which graph, on the host and on a device."""

import numpy as np
import pytest

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.backends.onnxruntime_cuda import open_ort_chain
from mge_runtime.calibrated import ExitPoint, confidence
from mge_runtime.device.executor import DeviceExecutor
from tests.helpers import chain_runs as runs
from tests.helpers.host_device import HostDevice

onnxruntime = load_onnxruntime()

EVERY, frames = runs.EVERY, runs.shuffled_frames

TEMPERATURES = {"mean_logits_1": 2.0, "mean_logits_2": 1.5, "logits": 0.8}
NONE, ALL = 1.0, 0.0  # thresholds


@pytest.fixture(scope="module")
def some(expected):
    """Thresholds such that of eight frames four leave after the first graph, two after the second."""
    tensors = expected.run(frames(8), outputs=EVERY).tensors
    first, second = (confidence(tensors[name], TEMPERATURES[name]) for name in ("mean_logits_1", "mean_logits_2"))
    threshold = float(np.sort(first)[3:5].mean())
    return {"mean_logits_1": threshold, "mean_logits_2": float(np.sort(second[first < threshold])[1:3].mean())}


@pytest.fixture
def host():
    return HostDevice()


@pytest.fixture
def chain(bundle, host):
    """The chain as a GPU runs it, on the host; it gives back what it took."""
    opened = open_ort_chain(onnxruntime, bundle, host)
    yield opened
    opened.close()
    assert (host.allocated, host.allocated_host) == (0, 0)


def points(first, second):
    pairs = (("mean_logits_1", first), ("mean_logits_2", second))
    return tuple(
        ExitPoint(number, name, TEMPERATURES[name], threshold)
        for number, (name, threshold) in enumerate(pairs, 1)
        if threshold is not None
    )


def rules(some):
    """None, some, all of the images leave after each graph; and chains with one exit alone."""
    first, second = some["mean_logits_1"], some["mean_logits_2"]
    return [points(a, b) for a in (None, NONE, first, ALL) for b in (None, NONE, second, ALL)]


def wanted(expected, batch, exits):
    """What each image must get, computed one by one from the whole chain, without a batch that anybody leaves."""
    images = []
    for frame in batch:
        full = {name: array[0] for name, array in expected.run(frame[None], outputs=EVERY).tensors.items()}
        ran = 3
        for point in reversed(exits):
            if confidence(full[point.logits], point.temperature) >= point.threshold:
                ran = point.graphs
        images.append((ran, full))
    return images


def check(result, manifest, images):
    """Rows are those of the images that ran, in order; nothing is there of what did not run."""
    assert result.graphs_run.tolist() == [ran for ran, _ in images]
    made = set()
    for number, graph in enumerate(manifest.graphs):
        ran = [full for count, full in images if count > number]
        names = {t.name for t in graph.outputs}
        for name in names & EVERY if ran else ():
            made.add(name)
            np.testing.assert_allclose(
                result.tensors[name], np.stack([full[name] for full in ran]), rtol=1e-4, atol=1e-5, err_msg=name
            )
            assert result.tensors[name].dtype == np.float32
    assert set(result.tensors) == made


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_graphs_on_the_host_let_images_leave(expected, bundle, some, batch):
    ends = set()
    for exits in rules(some):
        result = expected._executor.run(frames(batch), 3, EVERY, exits)
        check(result, bundle.manifest, wanted(expected, frames(batch), exits))
        ends.add(tuple(sorted(set(result.graphs_run.tolist()))))
    assert ends >= {(1,), (2,), (3,)}
    assert batch < 8 or (1, 2, 3) in ends, "a batch whose images end after every graph"


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_device_lets_the_same_images_leave(device, expected, bundle, some, batch):
    runs.need_sessions(device)
    chain = open_ort_chain(onnxruntime, bundle, device)
    for exits in rules(some):
        for seed in (0, 7):
            result = chain.run(frames(batch, seed), 3, EVERY, exits)
            check(result, bundle.manifest, wanted(expected, frames(batch, seed), exits))
    chain.close()


def test_a_large_batch_that_shrinks_needs_few_batch_sizes(chain, expected, bundle, some):
    chain._min_batch = 3  # as engines that were built for no less
    sizes = set()
    for seed in range(6):
        for exits in (points(some["mean_logits_1"], some["mean_logits_2"]), points(some["mean_logits_1"], None)):
            result = chain.run(frames(19, seed), 3, EVERY, exits)
            check(result, bundle.manifest, wanted(expected, frames(19, seed), exits))
            sizes |= {program["batch"] for program in chain.report()["programs"]}
    assert 19 in sizes
    assert len(sizes) > 1
    assert {size for size in sizes if size < 19} <= {3, 6, 9, 12, 15, 18}


def test_between_two_graphs_what_is_wanted_visits_the_host_and_nothing_else(chain, host, some):
    calls, copies, download = [], host.copies, host.download
    host.download = lambda *args: (calls.append(args[3]), download(*args))
    exits = points(some["mean_logits_1"], some["mean_logits_2"])
    result = chain.run(frames(8), 3, {"mean_logits_1", "mean_logits_2", "logits", "box_1", "image_2"}, exits)
    ran = [int(np.count_nonzero(result.graphs_run > number)) for number in range(3)]
    assert 8 == ran[0] > ran[1] > ran[2] > 0
    row = {"mean_logits_1": 20, "mean_logits_2": 20, "logits": 20, "box_1": 16, "image_2": 3 * 32 * 32 * 4}
    made = (("box_1", 0), ("image_2", 0), ("mean_logits_1", 0), ("mean_logits_2", 1), ("logits", 2))
    assert calls == [ran[number] * row[name] for name, number in made], "each result once, when it is made"
    assert (copies["host_to_device"], copies["host_to_device_bytes"]) == (1, 8 * 32 * 32 * 3)
    assert chain.report()["row_copies"] == {key: copies[key] for key in ("on_device", "on_device_bytes")}
    assert copies["on_device"] > 0


def test_without_exits_a_run_is_one_program_and_copies_as_before(chain, host):
    result = chain.run(frames(8), 3, {"logits"})
    assert [(p["batch"], p["graphs"], "after" in p) for p in chain.report()["programs"]] == [(8, 3, False)]
    assert list(result.times_ms) == ["upload", "chain", "download", "host"]
    assert (host.copies["device_to_host"], host.copies["on_device"]) == (1, 0)
    chain.run(frames(8), 3, {"logits"}, points(None, 0.9))
    assert {(p["batch"], p.get("after", 0), p["graphs"]) for p in chain.report()["programs"]} >= {(8, 0, 3), (8, 0, 2)}


def test_steps_are_named_and_belong_to_graphs(chain, expected):
    every = {"graph_1": 0, "graph_2": 1, "graph_3": 2}
    for exits, steps, ran in (
        (points(NONE, NONE), every, ["graph_1", "graph_2", "graph_3"]),
        (points(ALL, NONE), every, ["graph_1"]),
        (points(None, NONE), {"graphs_1_to_2": 0, "graph_3": 2}, ["graphs_1_to_2", "graph_3"]),
        (points(NONE, None), {"graph_1": 0, "graphs_2_to_3": 1}, ["graph_1", "graphs_2_to_3"]),
    ):
        result = chain.run(frames(3), 3, {"mean_logits_1", "mean_logits_2", "logits"}, exits)
        assert result.step_graphs == steps
        assert list(result.times_ms) == ["upload", *ran, "download", "host"]
        assert all(ms >= 0 for ms in result.times_ms.values())
    result = expected._executor.run(frames(3), 3, {"mean_logits_1"}, points(NONE, ALL))
    assert result.step_graphs == {"expert_1": 0, "expert_2": 1, "expert_3": 2}
    assert list(result.times_ms) == ["expert_1", "expert_2"]


def test_a_unit_is_prepared_once_for_each_batch_size_whatever_programs_it_is_in(bundle, expected, some):
    seen = []

    def open_units(device, stream):
        for number, unit in enumerate(runs.open_graphs(bundle, device, stream)):
            prepare = unit.prepare
            unit.prepare = lambda a, s, p=prepare, n=number: (seen.append((n, a.batch)), p(a, s))[1]
            yield unit

    chain = DeviceExecutor(bundle.manifest, HostDevice(), open_units)
    exits = points(some["mean_logits_1"], None)
    for _ in range(2):
        check(chain.run(frames(8), 3, EVERY, exits), bundle.manifest, wanted(expected, frames(8), exits))
    left = int(np.count_nonzero(chain.run(frames(8), 3, EVERY, exits).graphs_run > 1))
    assert seen == [(0, 8), (1, left), (2, left)]
    check(chain.run(frames(8), 3, EVERY), bundle.manifest, wanted(expected, frames(8), ()))
    assert seen[3:] == [(1, 8), (2, 8)], "the whole chain has the first unit ready"
    chain.close()


def test_logits_that_no_graph_reads_decide_too(chain, bundle, expected, some):
    """The last graph reads each expert's own: what the second exit looks at is no input of anything."""
    assert "mean_logits_2" not in {tensor.name for graph in bundle.manifest.graphs for tensor in graph.inputs}
    exits = points(None, some["mean_logits_2"])
    for run in (chain.run, expected._executor.run):
        # Nobody asked for the logits themselves here; they are looked at all the same.
        assert set(run(frames(8), 3, {"logits"}, exits).tensors) == {"logits"}
        check(run(frames(8), 3, EVERY, exits), bundle.manifest, wanted(expected, frames(8), exits))
