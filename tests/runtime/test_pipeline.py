"""Predictions of a pipeline: what they hold, their order, threads, and what is refused."""

import gc
import json
import re
import threading
import time
import warnings

import numpy as np
import pytest

import mge_runtime.pipeline
from mge_runtime import BackendError, BundleError, InputError, Pipeline, Prediction
from mge_runtime.manifest import Crops
from mge_runtime.prediction import softmax
from mge_runtime.preprocess import compose_boxes, to_frame

FRAMES = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def pipeline(bundle_path):
    with Pipeline.open(bundle_path, threads=1) as opened:
        yield opened


@pytest.fixture
def opened(bundle_path):
    """Opens pipelines with threads and streams, and closes them."""
    pipelines = []

    def open_one(threads=1, streams=1, **options):
        pipelines.append(Pipeline.open(bundle_path, threads=threads, streams=streams, **options))
        return pipelines[-1]

    yield open_one
    for one in pipelines:
        one.close()


def same(a, b):
    np.testing.assert_allclose(a.logits, b.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(a.boxes, b.boxes)
    return True


def test_a_prediction_holds_the_outputs_of_the_chain(pipeline, photos):
    photo = photos[0]
    frame, viewport = to_frame(photo, pipeline.manifest.preprocess)
    tensors = pipeline.run(frame[None])
    found = pipeline.predict(photo)
    probabilities = np.exp(tensors["logits"][0]) / np.exp(tensors["logits"][0]).sum()
    np.testing.assert_array_equal(found.logits, tensors["logits"][0])
    assert found.class_index == probabilities.argmax()
    assert found.class_name == f"bird {found.class_index}"
    assert found.probability == pytest.approx(probabilities.max(), rel=1e-5)
    assert [t.name for t in found.top] == [f"bird {i}" for i in np.argsort(-probabilities)]
    assert sum(t.probability for t in found.top) == pytest.approx(1)
    assert found.top_k(2) == found.top[:2]
    np.testing.assert_array_equal(found.expert_logits, [tensors[f"logits_{k}"][0] for k in (1, 2, 3)])
    np.testing.assert_array_equal(found.gate, tensors["gate"][0])
    assert found.gate.sum() == pytest.approx(1)
    cuts = np.stack([tensors["box_1"][0], tensors["box_2"][0]])
    np.testing.assert_array_equal(found.boxes, compose_boxes(cuts, viewport, Crops((32,) * 3)))
    assert [h.shape for h in found.heatmaps] == [(8, 8)] * 3
    assert found.experts_used == 3
    assert (found.width, found.height) == (photo.shape[1], photo.shape[0])
    steps = dict(found.timings_ms)
    total = steps.pop("total")
    assert list(steps) == ["decode", "preprocess", "expert_1", "expert_2", "expert_3"]
    assert total == pytest.approx(sum(steps.values()))
    assert all(ms >= 0 for ms in steps.values())


def test_to_dict_is_json(pipeline, photos):
    found = pipeline.predict(photos[0])
    values = json.loads(json.dumps(found.to_dict(top_k=2), allow_nan=False))
    assert values["class_name"] == found.class_name
    assert len(values["top"]) == 2
    assert len(values["experts"]) == len(values["boxes"]) == len(values["gate"]) == 3
    assert values["timings_ms"]["total"] > 0
    assert json.loads(json.dumps(pipeline.predict(photos[0], exit=1).to_dict()))["gate"] is None
    assert "heatmaps" not in repr(found)


def test_an_exit_predicts_with_what_ran(pipeline, photos):
    whole = pipeline.predict(photos[2])
    first = pipeline.predict(photos[2], exit=np.int64(1))
    assert first.experts_used == 1
    assert first.gate is None
    assert first.boxes.shape == (1, 4)
    assert "expert_2" not in first.timings_ms
    np.testing.assert_array_equal(first.logits, whole.expert_logits[0])
    second = pipeline.predict(photos[2], exit=2)
    assert second.experts_used == 2
    np.testing.assert_allclose(second.logits, whole.expert_logits[:2].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(second.boxes, whole.boxes[:2])


def test_a_batch_keeps_order(pipeline, photos):
    found = pipeline.predict_batch(photos)
    for prediction, photo in zip(found, photos, strict=True):
        assert same(prediction, pipeline.predict(photo))
    assert pipeline.predict_batch([]) == []
    with pytest.raises(InputError):
        pipeline.predict_batch([photos[0], "/no/such.jpg"])


@pytest.mark.parametrize("batch", [1, 2, 3, 50])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("streams", [1, 2])
def test_the_iterator_keeps_order_and_reports_bad_images_in_place(opened, photos, batch, workers, streams, tmp_path):
    pipeline = opened(streams, streams)
    (tmp_path / "text.jpg").write_text("hello")
    sources = [photos[0], "/no/such.jpg", *photos[1:4], tmp_path / "text.jpg", photos[4]]
    found = list(pipeline.predict_iter(iter(sources), batch=batch, workers=workers))
    assert [id(source) for source, _ in found] == [id(source) for source in sources]
    for source, prediction in found:
        if isinstance(source, np.ndarray):
            assert same(prediction, pipeline.predict(source))
        else:
            assert isinstance(prediction, InputError)
            assert prediction.__traceback__ is None
    assert list(pipeline.predict_iter([])) == []
    assert len(list(pipeline.predict_iter(["/no/such.jpg"] * 5, batch=2))) == 5


@pytest.mark.parametrize(("streams", "most"), [(1, 2 * 2 + 2 + 2), (2, (2 * 2 + 1) * 2)])
def test_the_iterator_prefetches_a_bounded_number(opened, photos, streams, most):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield photos[taken % len(photos)]

    predictions = opened(streams, streams).predict_iter(endless(), batch=2, workers=2)
    for predicted in range(1, 30):
        next(predictions)
        assert taken <= predicted + most
    predictions.close()


@pytest.mark.parametrize("streams", [1, 2])
def test_closing_the_iterator_early_leaves_no_thread(opened, photos, streams):
    pipeline = opened(streams, streams)

    def decoders():
        return [t for t in threading.enumerate() if t.name.startswith("mge-ahead")]

    predictions = pipeline.predict_iter(photos * 10, workers=3)
    next(predictions)
    assert decoders()
    predictions.close()
    assert not decoders()
    predictions = pipeline.predict_iter(photos * 10)
    next(predictions)
    del predictions
    gc.collect()
    assert not decoders()

    def failing():
        yield photos[0]
        raise ValueError("the caller's own")

    with pytest.raises(ValueError, match="the caller's own"):
        list(pipeline.predict_iter(failing(), workers=2))
    assert not decoders()


def test_decoding_overlaps_computing(pipeline, photos, monkeypatch):
    """Both wait instead of working, so that the order of events shows and not this machine's speed."""
    decode, run, events = mge_runtime.pipeline.open_image, pipeline._run, []

    def slow_decode(source, max_pixels):
        time.sleep(0.05)
        events.append("decoded")
        return decode(source, max_pixels)

    def slow_run(*args, **options):
        events.append("start")
        time.sleep(0.15)
        events.append("end")
        return run(*args, **options)

    monkeypatch.setattr(mge_runtime.pipeline, "open_image", slow_decode)
    monkeypatch.setattr(pipeline, "_run", slow_run)
    list(pipeline.predict_iter(photos[:4], workers=1))
    first = events.index("start")
    assert "decoded" in events[first : events.index("end", first)]


def test_a_defect_in_decoding_is_not_swallowed(pipeline, photos, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(mge_runtime.pipeline, "open_image", broken)
    with pytest.raises(ZeroDivisionError):
        list(pipeline.predict_iter(photos))


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda p, _: p.predict_iter([], batch=0), BackendError, "at least 1"),
        (lambda p, _: p.predict_iter([], workers=0), BackendError, "at least 1"),
        (lambda _, path: Pipeline.open(path, threads=0), BackendError, "at least 1"),
        (lambda _, path: Pipeline.open(path, streams=0), BackendError, "at least 1"),
        (lambda p, _: p.run(FRAMES[:, :, 1:]), InputError, r"type uint8 \[1, 32, 31, 3\]; expected a uint8 array"),
        (lambda p, _: p.run(FRAMES[0]), InputError, "expected a uint8 array"),
        (lambda p, _: p.run(FRAMES[:0]), InputError, "expected a uint8 array"),
        (lambda p, _: p.run(FRAMES.astype(np.float32)), InputError, "float32"),
        (lambda p, _: p.run([1]), InputError, r"frames of type list; expected a uint8 array \[B, 32, 32, 3\]"),
        (lambda _, path: Pipeline.open(path.with_name("none.plan")), BundleError, "does not exist"),
        (lambda _, path: Pipeline.open(path, "cuda:99"), BackendError, "run device 'cuda:99' and backend 'auto'"),
        (lambda _, path: Pipeline.open(path, "cpu", "tensorrt"), BackendError, "tensorrt runs on NVIDIA GPUs alone"),
    ],
)
def test_what_cannot_be_asked_for(pipeline, bundle_path, use, error, message):
    with pytest.raises(error, match=message):
        use(pipeline, bundle_path)


@pytest.mark.parametrize("exit", [2.5, "soon", (), True, 0, 4])
def test_an_exit_that_is_no_graph_is_refused(pipeline, bundle_path, photos, exit):
    for ask in (
        lambda: pipeline.predict(photos[0], exit=exit),
        lambda: pipeline.predict_batch(photos[:2], exit=exit),
        lambda: list(pipeline.predict_iter(photos[:2], exit=exit)),
        lambda: pipeline.run(FRAMES, exit=exit),
        lambda: Pipeline.open(bundle_path, device="cpu", exit=exit),
    ):
        with pytest.raises(BackendError, match=re.escape(f"asked to stop after graph {exit!r};")):
            ask()


def test_a_closed_pipeline_says_so(opened, photos):
    pipeline, second = opened(), opened()
    predictions = pipeline.predict_iter(photos)
    next(predictions)
    pipeline.close()
    pipeline.close()
    for use in (
        lambda: pipeline.predict(photos[0]),
        lambda: pipeline.predict_iter(photos),
        lambda: pipeline.run(FRAMES),
        lambda: next(predictions),
    ):
        with pytest.raises(BackendError, match="closed"):
            use()
    assert second.predict(photos[0]).experts_used == 3


class Waiting:
    """Holds a pipeline's chain in its next run until it is told to go on."""

    def __init__(self, pipeline, monkeypatch):
        self.inside, self.go_on, self.found = threading.Event(), threading.Event(), []
        run = pipeline._chain.run

        def waiting(*args, **options):
            self.inside.set()
            assert self.go_on.wait(10)
            return run(*args, **options)

        monkeypatch.setattr(pipeline._chain, "run", waiting)

    def predict(self, pipeline, source):
        thread = threading.Thread(target=lambda: self.found.append(pipeline.predict(source)))
        thread.start()
        assert self.inside.wait(10)
        return thread


def test_a_second_thread_is_refused(opened, photos, monkeypatch):
    pipeline = opened()
    waiting = Waiting(pipeline, monkeypatch)
    thread = waiting.predict(pipeline, photos[0])
    for use in (lambda: pipeline.predict(photos[1]), pipeline.close):
        with pytest.raises(BackendError, match="in use by another thread"):
            use()
    waiting.go_on.set()
    thread.join()
    assert isinstance(waiting.found[0], Prediction)
    assert same(waiting.found[0], pipeline.predict(photos[0])), "another thread may use it in turn"


def test_closing_waits_for_streams_that_compute(opened, photos, monkeypatch):
    pipeline = opened(2, 2)
    waiting = Waiting(pipeline, monkeypatch)
    thread = waiting.predict(pipeline, photos[0])
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    waiting.go_on.set()
    thread.join()
    closing.join()
    assert waiting.found[0].experts_used == 3
    with pytest.raises(BackendError, match="closed"):
        pipeline.predict(photos[0])


@pytest.mark.parametrize("streams", [2, "auto"])
def test_streams_compute_at_the_same_time(opened, photos, streams, monkeypatch):
    """Each run waits for the other: neither would end if they ran in turn."""
    pipeline = opened(2, streams)
    assert pipeline.streams == 2
    run, both = pipeline._chain.run, threading.Barrier(2, timeout=10)

    def meeting(*args, **options):
        both.wait()
        return run(*args, **options)

    monkeypatch.setattr(pipeline._chain, "run", meeting)
    assert len(list(pipeline.predict_iter(photos[:4]))) == 4


@pytest.mark.parametrize(
    ("threads", "streams", "expected"), [(4, 1, 4), (4, 2, 3), (4, "auto", 1), (12, "auto", 5), (1, 3, 1)]
)
def test_streams_leave_no_more_threads_than_asked_for(opened, threads, streams, expected):
    session = opened(threads, streams)._chain._executor._sessions["expert_1"]
    assert session.get_session_options().intra_op_num_threads == expected


def test_softmax_of_large_logits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = softmax(np.array([1000.0, 1000.0, -1000.0], np.float32))
    np.testing.assert_allclose(found, [0.5, 0.5, 0])
