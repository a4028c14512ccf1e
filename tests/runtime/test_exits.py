"""Early exits: who leaves after which segment, on the host and on a device, and what a prediction says then."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from mge_runtime import Pipeline
from mge_runtime.backends.base import Span, split
from mge_runtime.backends.onnxruntime import OnnxRuntimeBackend
from mge_runtime.backends.onnxruntime_cuda import open_ort_chain
from mge_runtime.backends.ort_segment import open_segments
from mge_runtime.bundle import Bundle, add_calibration, write_bundle
from mge_runtime.calibrated import ExitPoint, confidence
from mge_runtime.chain import Chain
from mge_runtime.device import DeviceExecutor
from mge_runtime.device.host import HostDevice
from mge_runtime.device.rows import Rows
from mge_runtime.device.space import Space
from mge_runtime.errors import BackendError, BundleError
from mge_runtime.prediction import softmax
from mge_runtime.spec import SegmentSpec

TEMPERATURES = {"answer_1": 2.0, "answer_2": 1.5, "logits": 0.8}
EVERY = {
    "answer_1", "answer_2", "answer_3", "box_1", "box_2", "gate", "heatmap_1", "heatmap_2", "heatmap_3",
    "image_1", "image_2", "image_3", "logits", "logits_1", "logits_2", "logits_3",
}  # fmt: skip
NONE, ALL = 1.0, 0.0  # thresholds


def frames(count, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3))
    share = np.random.default_rng(seed + 1).permutation(np.linspace(0.1, 1, count))
    return (noise * share.reshape(-1, 1, 1, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def bundle(bundle_path):
    with Bundle.open(bundle_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def cpu(bundle):
    """The chain on the CPU, stage by stage."""
    chain = Chain(bundle, OnnxRuntimeBackend(threads=1))
    yield chain
    chain.close()


@pytest.fixture(scope="module")
def some(cpu):
    """Thresholds such that of eight frames four leave after the first segment, two after the second."""
    tensors = cpu.run(frames(8), outputs=EVERY).tensors
    first, second = (confidence(tensors[answer], TEMPERATURES[answer]) for answer in ("answer_1", "answer_2"))
    threshold = float(np.sort(first)[3:5].mean())
    return {"answer_1": threshold, "answer_2": float(np.sort(second[first < threshold])[1:3].mean())}


def points(first, second):
    pairs = (("answer_1", first), ("answer_2", second))
    return tuple(
        ExitPoint(number, answer, TEMPERATURES[answer], threshold)
        for number, (answer, threshold) in enumerate(pairs, 1)
        if threshold is not None
    )


def rules(some):
    """None, some, all of the images leave after each segment; and chains with one exit alone."""
    first, second = some["answer_1"], some["answer_2"]
    return [
        points(a, b)
        for a in (None, NONE, first, ALL)
        for b in (None, NONE, second, ALL)
    ]  # fmt: skip


def wanted(cpu, batch, exits):
    """What each image must get, computed one by one from the whole chain, without a batch that anybody leaves."""
    images = []
    for frame in batch:
        full = {name: array[0] for name, array in cpu.run(frame[None], outputs=EVERY).tensors.items()}
        ran = 3
        for point in reversed(exits):
            if confidence(full[point.answer], point.temperature) >= point.threshold:
                ran = point.segments
        images.append((ran, full))
    return images


def check(result, manifest, images):
    """Rows are those of the images that ran, in order; nothing is there of what did not run."""
    assert result.segments_run.tolist() == [ran for ran, _ in images]
    made = set()
    for number, segment in enumerate(manifest.segments):
        ran = [full for count, full in images if count > number]
        names = {t.name for name in segment.stages for t in manifest.stage(name).outputs}
        for name in names & EVERY if ran else ():
            made.add(name)
            np.testing.assert_allclose(
                result.tensors[name], np.stack([full[name] for full in ran]), rtol=1e-4, atol=1e-5, err_msg=name
            )
            assert result.tensors[name].dtype == np.float32
    assert set(result.tensors) == made


# --- executors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_stages_on_the_host_let_images_leave(cpu, bundle, some, batch):
    ends = set()
    for exits in rules(some):
        result = cpu._executor.run(frames(batch), 3, EVERY, exits)
        check(result, bundle.manifest, wanted(cpu, frames(batch), exits))
        ends.add(tuple(sorted(set(result.segments_run.tolist()))))
    assert ends >= {(1,), (2,), (3,)}
    assert batch < 8 or (1, 2, 3) in ends, "a batch whose images end after every segment"


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_device_lets_the_same_images_leave(device, cpu, bundle, some, batch):
    if device.kind == "cuda":
        onnxruntime.preload_dlls()
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime was built without CUDA: onnxruntime-gpu is not installed")
    chain = open_ort_chain(onnxruntime, bundle, device)
    for exits in rules(some):
        for seed in (0, 7):
            result = chain.run(frames(batch, seed), 3, EVERY, exits)
            check(result, bundle.manifest, wanted(cpu, frames(batch, seed), exits))
    chain.close()


def test_a_large_batch_that_shrinks_needs_few_batch_sizes(cpu, bundle, some):
    chain = open_ort_chain(onnxruntime, bundle, HostDevice())
    chain._min_batch = 3  # as engines that were built for no less
    sizes = set()
    for seed in range(6):
        for exits in (points(some["answer_1"], some["answer_2"]), points(some["answer_1"], None)):
            result = chain.run(frames(19, seed), 3, EVERY, exits)
            check(result, bundle.manifest, wanted(cpu, frames(19, seed), exits))
            sizes |= {program["batch"] for program in chain.report()["programs"]}
    assert 19 in sizes
    assert len(sizes) > 1
    assert {size for size in sizes if size < 19} <= {3, 6, 9, 12, 15, 18}
    chain.close()


@pytest.mark.parametrize(("running", "batch", "least", "rows"), [
    (1, 1, 1, 1), (5, 8, 1, 5), (1, 8, 4, 4), (3, 16, 1, 4), (16, 16, 1, 16), (16, 17, 1, 17), (2, 3, 3, 3),
])  # fmt: skip
def test_rows_that_are_computed_for_those_that_still_run(bundle, running, batch, least, rows):
    chain = open_ort_chain(onnxruntime, bundle, HostDevice())
    chain._min_batch = least
    assert chain._fitting(running, batch) == rows
    chain.close()


def test_between_two_segments_an_answer_visits_the_host_and_nothing_else(bundle, some):
    device = HostDevice()
    chain = open_ort_chain(onnxruntime, bundle, device)
    calls, counters = [], device.counters
    download = device._download
    device._download = lambda target, source, size, stream: (calls.append(size), download(target, source, size, stream))
    exits = points(some["answer_1"], some["answer_2"])
    result = chain.run(frames(8), 3, {"answer_1", "answer_2", "logits", "box_1", "image_2"}, exits)
    ran = [int(np.count_nonzero(result.segments_run > number)) for number in range(3)]
    assert 8 == ran[0] > ran[1] > ran[2] > 0
    row = {"answer_1": 20, "answer_2": 20, "logits": 20, "box_1": 16, "image_2": 3 * 32 * 32 * 4}
    assert calls[:2] == [ran[0] * 20, ran[1] * 20], "the answers of those that still run"
    made = {"answer_1": ran[0], "answer_2": ran[1], "box_1": ran[0], "image_2": ran[0], "logits": ran[2]}
    assert calls[2:] == [made[name] * row[name] for name in sorted(made)], "then each result once"
    assert (counters.host_to_device, counters.host_to_device_bytes) == (1, 8 * 32 * 32 * 3)
    assert chain.report()["row_copies"] == {
        "on_device": counters.on_device,
        "on_device_bytes": counters.on_device_bytes,
    }
    assert counters.on_device > 0
    chain.close()
    assert (device.allocated, device.allocated_host) == (0, 0)


def test_without_exits_a_run_is_one_program_and_copies_as_before(bundle):
    device = HostDevice()
    chain = open_ort_chain(onnxruntime, bundle, device)
    memory = device.allocated
    result = chain.run(frames(8), 3, {"logits"})
    assert [(p["batch"], p["segments"], "after" in p) for p in chain.report()["programs"]] == [(8, 3, False)]
    assert list(result.times_ms) == ["upload", "chain", "download", "host"]
    assert (device.counters.device_to_host, device.counters.on_device) == (1, 0)
    assert device.allocated >= memory
    assert chain._space._spare is None
    chain.run(frames(8), 3, {"logits"}, points(None, 0.9))
    assert {(p["batch"], p.get("after", 0), p["segments"]) for p in chain.report()["programs"]} >= {
        (8, 0, 3),
        (8, 0, 2),
    }
    chain.close()


def test_steps_are_named_and_belong_to_segments(bundle, cpu):
    chain = open_ort_chain(onnxruntime, bundle, HostDevice())
    every = {"segment_1": 0, "segment_2": 1, "segment_3": 2}
    for exits, steps, ran in (
        (points(NONE, NONE), every, ["segment_1", "segment_2", "segment_3"]),
        (points(ALL, NONE), every, ["segment_1"]),
        (points(None, NONE), {"segments_1_to_2": 0, "segment_3": 2}, ["segments_1_to_2", "segment_3"]),
        (points(NONE, None), {"segment_1": 0, "segments_2_to_3": 1}, ["segment_1", "segments_2_to_3"]),
    ):
        result = chain.run(frames(3), 3, {"answer_1", "answer_2", "logits"}, exits)
        assert result.step_segments == steps
        assert list(result.times_ms) == ["upload", *ran, "download", "host"]
        assert all(ms >= 0 for ms in result.times_ms.values())
    result = cpu._executor.run(frames(3), 3, {"answer_1"}, points(NONE, ALL))
    assert result.step_segments == {"ingest": 0, "expert_1": 0, "expert_2": 1}
    assert list(result.times_ms) == ["ingest", "expert_1", "expert_2"]
    chain.close()


def test_a_segment_that_fails_for_those_that_are_left_is_named_and_the_next_run_works(bundle, cpu, some, monkeypatch):
    device = HostDevice()
    chain = open_ort_chain(onnxruntime, bundle, device)
    exits = points(some["answer_1"], some["answer_2"])
    chain.run(frames(8), 3, EVERY, exits)
    unit = chain._units[1]
    session = unit.session

    class Failing:
        def run_with_iobinding(self, *_):
            raise RuntimeError("the kernel failed")

    monkeypatch.setattr(unit, "session", Failing())
    with pytest.raises(BackendError, match=r"failed in segment 2 \(expert_2\)"):
        chain.run(frames(8), 3, EVERY, exits)
    monkeypatch.setattr(unit, "session", session)
    check(chain.run(frames(8), 3, EVERY, exits), bundle.manifest, wanted(cpu, frames(8), exits))
    chain.close()


def test_a_unit_is_prepared_once_for_each_batch_size_whatever_programs_it_is_in(bundle, cpu, some):
    seen = []

    def open_units(device, stream):
        for unit in open_segments(onnxruntime, bundle, device, stream):
            prepare = unit.prepare
            unit.prepare = lambda a, s, p=prepare, u=unit: (seen.append((u.segment, a.batch)), p(a, s))[1]
            yield unit

    chain = DeviceExecutor(bundle.manifest, HostDevice(), open_units)
    exits = points(some["answer_1"], None)
    for _ in range(2):
        check(chain.run(frames(8), 3, EVERY, exits), bundle.manifest, wanted(cpu, frames(8), exits))
    left = int(np.count_nonzero(chain.run(frames(8), 3, EVERY, exits).segments_run > 1))
    assert seen == [(0, 8), (1, left), (2, left)]
    check(chain.run(frames(8), 3, EVERY), bundle.manifest, wanted(cpu, frames(8), ()))
    assert seen[3:] == [(1, 8), (2, 8)], "the whole chain has the first unit ready"
    chain.close()


def test_an_answer_that_no_stage_reads_decides_too(tiny, tmp_path, cpu):
    """All experts in one segment, the gate in the next: the exit saves the gate's trunk alone."""
    graphs = tiny.make_stages()
    stages = ("ingest", "expert_1", "expert_2", "expert_3"), ("gate", "mixture")
    segments = tuple(SegmentSpec(*pair) for pair in zip(stages, ("answer_3", "logits"), strict=True))
    manifest = replace(tiny.make_manifest(graphs), segments=segments)
    write_bundle(tmp_path / "mge.plan", manifest, {g.spec.name: g.model() for g in graphs})
    full = cpu.run(frames(8), outputs=EVERY).tensors
    sure = confidence(full["answer_3"], 3.0)
    point = ExitPoint(1, "answer_3", 3.0, float(np.sort(sure)[4:6].mean()))
    with Bundle.open(tmp_path / "mge.plan") as other:
        on_device = open_ort_chain(onnxruntime, other, HostDevice())
        on_host = Chain(other, OnnxRuntimeBackend(threads=1))
        for run in (on_device.run, on_host._executor.run):
            result = run(frames(8), 2, {"answer_3", "logits"}, (point,))
            assert result.segments_run.tolist() == [1 if row >= point.threshold else 2 for row in sure]
            goes_on = sure < point.threshold
            np.testing.assert_allclose(result.tensors["logits"], full["logits"][goes_on], rtol=1e-4, atol=1e-5)
            # Nobody asked for the answer itself here; it is looked at all the same.
            assert set(run(frames(8), 2, {"logits"}, (point,)).tensors) == {"logits"}
        on_device.close()
        on_host.close()


def test_rows_that_leave_change_places_with_those_that_stay(bundle):
    device = HostDevice()
    space, stream = Space(device, bundle.manifest, 6), device.create_stream()
    rows = Rows(6, {"answer_1"})
    rows.add(["answer_1", "image_2"])
    rows.leave(np.array([True, False, True, False, False, True]), ["answer_1", "image_2"], device, space, stream)
    assert rows.running.tolist() == [3, 1, 4]
    assert rows.images("answer_1").tolist() == [3, 1, 4, 0, 2, 5]
    assert device.counters.on_device == 2 * 3 + 2, "two rows: changed where they are kept, else copied"
    rows.add(["answer_2"])
    assert rows.made == ["answer_1"]
    space.close()
    assert (device.allocated, device.allocated_host) == (0, 0)


def test_a_chain_is_cut_behind_its_exits_but_not_at_its_end():
    one, two = points(0.5, 0.6)
    assert split(3, ()) == [Span(0, 3, None)]
    assert split(3, (two, one)) == [Span(0, 1, one), Span(1, 2, two), Span(2, 3, None)]
    assert split(3, (two,)) == [Span(0, 2, two), Span(2, 3, None)]
    assert split(2, (one, two)) == [Span(0, 1, one), Span(1, 2, None)]
    assert split(1, (one, two)) == [Span(0, 1, None)]


# --- pipeline -----------------------------------------------------------------------------------------------------


def calibrate(path, exits, temperatures=TEMPERATURES):
    values = {"temperatures": temperatures, "exits": None, "data": {}, "seed": 0, "made_by": "test", "report": {}}
    if exits is not None:
        values["exits"] = {"epsilon": 0.01, "delta": 0.05, "thresholds": exits}
    add_calibration(path, values)
    return path


def thresholds(path, photos):
    """Such that of the photos some leave after each segment."""
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        first = sorted(confidence(pipeline.predict(p, exit=1).logits, 2.0) for p in photos)
        second = sorted(confidence(pipeline.predict(p, exit=2).logits, 1.5) for p in photos)
    return {"answer_1": float(np.mean(first[4:6])), "answer_2": float(np.mean(second[3:5]))}


@pytest.fixture
def path(copy, photos):
    return calibrate(copy, thresholds(copy, photos))


@pytest.mark.parametrize("place", ["opening", "call"])
def test_exits_that_were_learned_elsewhere_are_noted_once(path, photos, caplog, place):
    with Bundle.open(path) as bundle:
        values = dict(bundle.calibration().values)
    for runs_on, lines in (
        ({"backend": "onnxruntime", "device": "cpu"}, 0),
        ({"backend": "tensorrt", "device": "cuda:0"}, 1),
    ):
        add_calibration(path, values | {"runs_on": runs_on})
        caplog.clear()
        opened, call = ("calibrated", None) if place == "opening" else ("never", "calibrated")
        with Pipeline.open(path, device="cpu", threads=1, exit=opened) as pipeline:
            pipeline.predict(photos[0], exit="never")
            for _ in range(2):
                pipeline.predict(photos[0], exit=call)
        assert [record.name for record in caplog.records] == ["mge_runtime"] * lines
    assert "no promise for onnxruntime on cpu" in caplog.text


def same(found, expected):
    assert found.class_index == expected.class_index
    assert found.experts_used == expected.experts_used
    assert (found.temperature, found.calibrated) == (expected.temperature, expected.calibrated)
    assert found.probability == pytest.approx(expected.probability, abs=1e-5)
    for name in ("logits", "expert_logits", "boxes"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert (found.gate is None) == (expected.gate is None)
    if found.gate is not None:
        np.testing.assert_allclose(found.gate, expected.gate, rtol=1e-4)
    assert list(found.timings_ms) == list(expected.timings_ms)


def test_a_prediction_that_stops_early_is_that_of_its_segment(path, photos):
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        found = [pipeline.predict(photo, exit="calibrated") for photo in photos]
        used = [prediction.experts_used for prediction in found]
        assert set(used) == {1, 2, 3}
        for photo, prediction, experts in zip(photos, found, used, strict=True):
            same(prediction, pipeline.predict(photo, exit=experts))
            assert prediction.expert_logits.shape == (experts, 5)
            assert prediction.boxes.shape == (experts, 4)
            assert len(prediction.heatmaps) == experts
            assert (prediction.gate is None) == (experts < 3)
            steps = ["decode", "preprocess", "ingest", *(f"expert_{k + 1}" for k in range(experts))]
            steps += ["gate", "mixture"] if experts == 3 else []
            assert list(prediction.timings_ms) == [*steps, "total"]
            answer = ("answer_1", "answer_2", "logits")[experts - 1]
            assert prediction.temperature == TEMPERATURES[answer]
            json.dumps(prediction.to_dict())


@pytest.mark.parametrize("batch", [3, 7, 8])
@pytest.mark.parametrize("streams", [1, 2])
def test_batches_answer_as_one_by_one_and_in_order(path, photos, batch, streams):
    with Pipeline.open(path, device="cpu", threads=2, streams=streams, exit="calibrated") as pipeline:
        alone = [pipeline.predict(photo) for photo in photos]
        for found in (
            [answer for _, answer in pipeline.predict_iter(photos, batch=batch)],
            pipeline.predict_batch(photos),
        ):
            for prediction, expected in zip(found, alone, strict=True):
                same(prediction, expected)
        assert {prediction.experts_used for prediction in alone} == {1, 2, 3}


def test_time_is_shared_by_those_that_took_part(path, photos, monkeypatch):
    with Pipeline.open(path, device="cpu", threads=1, exit="calibrated") as pipeline:
        run = pipeline._chain._executor.run

        def timed(*arguments):
            result = run(*arguments)
            return replace(result, times_ms=dict.fromkeys(result.times_ms, 12.0))

        monkeypatch.setattr(pipeline._chain._executor, "run", timed)
        found = pipeline.predict_batch(photos)
    used = [prediction.experts_used for prediction in found]
    for prediction in found:
        for expert in range(1, prediction.experts_used + 1):
            took_part = sum(count >= expert for count in used)
            assert prediction.timings_ms[f"expert_{expert}"] == pytest.approx(12.0 / took_part)


def test_the_exit_said_when_opening_holds_until_a_call_says_another(path, photos):
    with Pipeline.open(path, device="cpu", threads=1, exit="calibrated") as pipeline:
        early = {pipeline.predict(photo).experts_used for photo in photos}
        assert early == {1, 2, 3}
        assert {answer.experts_used for _, answer in pipeline.predict_iter(photos, exit="never")} == {3}
        assert {answer.experts_used for answer in pipeline.predict_batch(photos, exit=2)} == {2}
        assert pipeline.run(frames(2))["logits"].shape == (2, 5), "parity checks run the whole chain unless they ask"
    with Pipeline.open(path, device="cpu", threads=1, exit=1) as pipeline:
        assert pipeline.predict(photos[0]).experts_used == 1
        assert pipeline.predict(photos[0], exit="never").experts_used == 3
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        assert {pipeline.predict(photo).experts_used for photo in photos} == {3}


def test_frames_that_are_ready_run_with_exits_too(path):
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        tensors = pipeline.run(frames(8), exit="calibrated")
        full = pipeline.run(frames(8), outputs=["answer_1", "answer_2"])
    goes_on = confidence(full["answer_1"], 2.0) < pipeline.calibrated.exits["answer_1"]
    np.testing.assert_allclose(tensors["answer_1"], full["answer_1"], rtol=1e-5)
    np.testing.assert_allclose(tensors["answer_2"], full["answer_2"][goes_on], rtol=1e-4, atol=1e-5)


def test_probabilities_are_those_of_the_temperature_and_logits_stay_raw(copy, photos):
    with Pipeline.open(copy, device="cpu", threads=1) as pipeline:
        plain = {exit: pipeline.predict(photos[0], exit=exit) for exit in (1, 2, "never")}
    assert all(not p.calibrated and p.temperature == 1.0 for p in plain.values())
    assert plain[1].probability == pytest.approx(float(softmax(plain[1].logits).max()))
    calibrate(copy, None)
    with Pipeline.open(copy, device="cpu", threads=1) as pipeline:
        for exit, answer in ((1, "answer_1"), (2, "answer_2"), ("never", "logits")):
            found = pipeline.predict(photos[0], exit=exit)
            assert found.calibrated
            np.testing.assert_array_equal(found.logits, plain[exit].logits)
            wanted = softmax(found.logits.astype(np.float64) / TEMPERATURES[answer])
            assert found.probability == pytest.approx(wanted.max())
            assert found.probability != pytest.approx(plain[exit].probability, abs=1e-3)
            assert [p for _, p in found.top_k(3)] == pytest.approx(np.sort(wanted)[::-1][:3].tolist())
            assert found.top == found.top_k(5)
            assert found.class_index == plain[exit].class_index
            values = found.to_dict()
            assert values["calibrated"] is True
            assert values["probability"] == pytest.approx(wanted.max(), abs=1e-6)
            alone = float(softmax(found.expert_logits[0]).max())
            assert values["experts"][0]["probability"] == pytest.approx(alone, abs=1e-6)


def test_calibrated_exits_that_are_not_there_are_one_line(copy, photos):
    for prepare, message in (
        (lambda: None, "no calibration; learn them with `mge-calibrate"),
        (lambda: calibrate(copy, None), "found none that keep its promise"),
        (lambda: calibrate(copy, {"answer_1": None, "answer_2": None}), "found none that keep its promise"),
    ):
        prepare()
        with pytest.raises(BackendError, match=message) as caught:
            Pipeline.open(copy, device="cpu", exit="calibrated")
        assert "\n" not in str(caught.value)
        with Pipeline.open(copy, device="cpu", threads=1) as pipeline:
            for ask in (
                lambda: pipeline.predict(photos[0], exit="calibrated"),
                lambda: pipeline.predict_batch([], exit="calibrated"),
                lambda: pipeline.predict_iter([], exit="calibrated"),
                lambda: pipeline.run(frames(1), exit="calibrated"),
            ):
                with pytest.raises(BackendError, match=message):
                    ask()


def test_a_calibration_that_cannot_be_read_names_the_file_and_can_be_passed_over(copy, photos):
    calibrate(copy, None, {"answer_1": 1.0, "answer_2": -1.0, "logits": 1.0})
    with pytest.raises(BundleError, match=r"mge\.plan: calibration\.json: temperatures\.answer_2 is -1\.0; expected"):
        Pipeline.open(copy, device="cpu")
    with Pipeline.open(copy, device="cpu", threads=1, calibration=False) as pipeline:
        assert not pipeline.predict(photos[0]).calibrated
