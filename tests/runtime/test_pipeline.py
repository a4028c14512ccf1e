import gc
import io
import json
import re
import threading
import time
import warnings

import numpy as np
import pytest
from PIL import Image

import mge_runtime.pipeline
from mge_runtime import BackendError, BundleError, InputError, Pipeline, Prediction
from mge_runtime.prediction import softmax
from mge_runtime.preprocess import compose_boxes, to_frame


@pytest.fixture(scope="module")
def pipeline(bundle_path):
    with Pipeline.open(bundle_path, threads=1) as opened:
        yield opened


def same(a, b):
    np.testing.assert_allclose(a.logits, b.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(a.boxes, b.boxes)
    return True


def test_a_prediction_holds_what_the_chain_put_out(pipeline, photos):
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
    np.testing.assert_array_equal(found.boxes, compose_boxes(cuts, viewport, 32))
    assert [h.shape for h in found.heatmaps] == [(8, 8)] * 3
    assert found.experts_used == 3
    assert (found.width, found.height) == (photo.shape[1], photo.shape[0])
    steps = dict(found.timings_ms)
    total = steps.pop("total")
    assert list(steps) == ["decode", "preprocess", "expert_1", "expert_2", "expert_3"]
    assert total == pytest.approx(sum(steps.values()))
    assert all(ms >= 0 for ms in steps.values())


def test_boxes_nest_inside_the_picture_and_follow_it(pipeline, photos):
    for photo in photos:
        found = pipeline.predict(photo)
        assert (found.boxes[:, :2] >= -1e-3).all()
        assert (found.boxes[:, 2:] <= [photo.shape[1] + 1e-3, photo.shape[0] + 1e-3]).all()
        for outer, inner in zip(found.boxes, found.boxes[1:], strict=False):
            assert (inner[:2] >= outer[:2]).all()
            assert (inner[2:] <= outer[2:]).all()
    assert len({tuple(pipeline.predict(photo).boxes[2] / photo.shape[0]) for photo in photos}) > 1


def test_every_kind_of_source_gives_the_same(pipeline, photos, tmp_path):
    image = Image.fromarray(photos[1])
    image.save(tmp_path / "bird.png")
    data = (tmp_path / "bird.png").read_bytes()
    expected = pipeline.predict(photos[1])
    sources = [tmp_path / "bird.png", str(tmp_path / "bird.png"), data, io.BytesIO(data), image]
    for source in sources:
        assert same(pipeline.predict(source), expected)


def test_to_dict_is_json(pipeline, photos):
    found = pipeline.predict(photos[0])
    values = json.loads(json.dumps(found.to_dict(top_k=2), allow_nan=False))
    assert values["class_name"] == found.class_name
    assert len(values["top"]) == 2
    assert len(values["experts"]) == len(values["boxes"]) == len(values["gate"]) == 3
    assert values["timings_ms"]["total"] > 0
    assert json.loads(json.dumps(pipeline.predict(photos[0], exit=1).to_dict()))["gate"] is None
    assert "heatmaps" not in repr(found)


def test_an_exit_answers_with_what_ran(pipeline, photos):
    whole = pipeline.predict(photos[2])
    first = pipeline.predict(photos[2], exit=1)
    assert first.experts_used == 1
    assert first.gate is None
    assert first.boxes.shape == (1, 4)
    assert "expert_2" not in first.timings_ms
    np.testing.assert_array_equal(first.logits, whole.expert_logits[0])
    second = pipeline.predict(photos[2], exit=2)
    assert second.experts_used == 2
    np.testing.assert_allclose(second.logits, whole.expert_logits[:2].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(second.boxes, whole.boxes[:2])
    with pytest.raises(BackendError, match="from 1 to 3"):
        pipeline.predict(photos[2], exit=4)


def test_a_batch_keeps_order(pipeline, photos):
    found = pipeline.predict_batch(photos)
    assert len(found) == len(photos)
    for answer, photo in zip(found, photos, strict=True):
        assert same(answer, pipeline.predict(photo))
    assert pipeline.predict_batch([]) == []
    with pytest.raises(InputError):
        pipeline.predict_batch([photos[0], "/no/such.jpg"])


@pytest.mark.parametrize("batch", [1, 2, 3, 50])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("streams", [1, 2])
def test_the_iterator_keeps_order_and_reports_bad_pictures_in_place(
    bundle_path, photos, batch, workers, streams, tmp_path
):
    with Pipeline.open(bundle_path, threads=streams, streams=streams) as pipeline:
        check_order_and_bad_pictures(pipeline, photos, batch, workers, tmp_path)


def check_order_and_bad_pictures(pipeline, photos, batch, workers, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    sources = [photos[0], "/no/such.jpg", *photos[1:4], tmp_path / "text.jpg", photos[4]]
    found = list(pipeline.predict_iter(iter(sources), batch=batch, workers=workers))
    assert [id(source) for source, _ in found] == [id(source) for source in sources]
    for source, answer in found:
        if isinstance(source, np.ndarray):
            assert isinstance(answer, Prediction)
            assert same(answer, pipeline.predict(source))
        else:
            assert isinstance(answer, InputError)
            assert answer.__traceback__ is None
    assert list(pipeline.predict_iter([])) == []
    assert len(list(pipeline.predict_iter(["/no/such.jpg"] * 5, batch=2))) == 5


def test_the_iterator_looks_ahead_a_bounded_way(pipeline, bundle_path, photos):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield photos[taken % len(photos)]

    answers = pipeline.predict_iter(endless(), batch=2, workers=2)
    for answered in range(1, 30):
        next(answers)
        assert taken <= answered + 2 * 2 + 2 + 2
    answers.close()

    taken = 0
    with Pipeline.open(bundle_path, threads=2, streams=2) as several:
        answers = several.predict_iter(endless(), batch=2)
        for answered in range(1, 30):
            next(answers)
            assert taken <= answered + (2 * 2 + 1) * 2
        answers.close()


@pytest.mark.parametrize("streams", [1, 2])
def test_closing_the_iterator_early_leaves_no_thread(bundle_path, photos, streams):
    with Pipeline.open(bundle_path, threads=streams, streams=streams) as pipeline:
        check_no_thread_is_left(pipeline, photos)


def check_no_thread_is_left(pipeline, photos):
    def decoders():
        return [t for t in threading.enumerate() if t.name.startswith("mge-ahead")]

    answers = pipeline.predict_iter(photos * 10, workers=3)
    next(answers)
    assert decoders()
    answers.close()
    assert not decoders()
    answers = pipeline.predict_iter(photos * 10)
    next(answers)
    del answers
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
    decode, events = mge_runtime.pipeline.decode_picture, []

    def slow_decode(source, max_pixels):
        time.sleep(0.05)
        events.append("decoded")
        return decode(source, max_pixels)

    run = pipeline._run

    def slow_run(*args, **options):
        events.append("start")
        time.sleep(0.15)
        events.append("end")
        return run(*args, **options)

    monkeypatch.setattr(mge_runtime.pipeline, "decode_picture", slow_decode)
    monkeypatch.setattr(pipeline, "_run", slow_run)
    list(pipeline.predict_iter(photos[:4], workers=1))
    first = events.index("start")
    assert "decoded" in events[first : events.index("end", first)]


def test_a_defect_in_decoding_is_not_swallowed(pipeline, photos, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(mge_runtime.pipeline, "decode_picture", broken)
    with pytest.raises(ZeroDivisionError):
        list(pipeline.predict_iter(photos))


def test_counts_below_one_are_refused(pipeline, photos, bundle_path):
    for options in ({"batch": 0}, {"workers": 0}):
        with pytest.raises(BackendError, match="at least 1"):
            pipeline.predict_iter(photos, **options)
    with pytest.raises(BackendError, match="at least 1"):
        Pipeline.open(bundle_path, threads=0)
    with pytest.raises(BackendError, match="at least 1"):
        Pipeline.open(bundle_path, streams=0)


def test_frames_of_another_shape_are_refused(pipeline):
    for frames in (
        np.zeros((1, 32, 31, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((0, 32, 32, 3), np.uint8),
    ):
        with pytest.raises(InputError, match="expected uint8"):
            pipeline.run(frames)
    with pytest.raises(InputError, match="float32"):
        pipeline.run(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(InputError, match="frames of type list; expected a uint8 array"):
        pipeline.run([1])


@pytest.mark.parametrize("exit", [2.5, "soon", (), True, 0, 4])
def test_an_exit_that_is_no_graph_is_refused(pipeline, bundle_path, photos, exit):
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    for ask in (
        lambda: pipeline.predict(photos[0], exit=exit),
        lambda: pipeline.predict_batch(photos[:2], exit=exit),
        lambda: list(pipeline.predict_iter(photos[:2], exit=exit)),
        lambda: pipeline.run(frames, exit=exit),
        lambda: Pipeline.open(bundle_path, device="cpu", exit=exit),
    ):
        with pytest.raises(BackendError, match=re.escape(f"asked to stop after graph {exit!r};")):
            ask()


def test_an_exit_may_be_an_integer_of_numpy(pipeline, photos):
    wanted = pipeline.predict(photos[0], exit=1).probability
    assert pipeline.predict(photos[0], exit=np.int64(1)).probability == wanted


def test_a_closed_pipeline_says_so(bundle_path, photos):
    pipeline = Pipeline.open(bundle_path, threads=1)
    second = Pipeline.open(bundle_path, threads=1)
    pipeline.close()
    pipeline.close()
    for use in (
        lambda: pipeline.predict(photos[0]),
        lambda: pipeline.predict_iter(photos),
        lambda: pipeline.run(np.zeros((1, 32, 32, 3), np.uint8)),
    ):
        with pytest.raises(BackendError, match="closed"):
            use()
    assert second.predict(photos[0]).experts_used == 3
    second.close()


def test_an_iterator_of_a_pipeline_closed_meanwhile_says_so(bundle_path, photos):
    with Pipeline.open(bundle_path, threads=1) as pipeline:
        answers = pipeline.predict_iter(photos)
        next(answers)
    with pytest.raises(BackendError, match="closed"):
        next(answers)


def test_a_second_thread_is_refused(pipeline, photos, monkeypatch):
    inside, go_on, errors = threading.Event(), threading.Event(), []
    run = pipeline._chain.run

    def waiting(*args, **options):
        inside.set()
        go_on.wait(10)
        return run(*args, **options)

    monkeypatch.setattr(pipeline._chain, "run", waiting)
    thread = threading.Thread(target=lambda: errors.append(pipeline.predict(photos[0])))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(BackendError, match="in use by another thread"):
        pipeline.predict(photos[1])
    with pytest.raises(BackendError, match="in use by another thread"):
        pipeline.close()
    go_on.set()
    thread.join()
    assert isinstance(errors[0], Prediction)
    assert pipeline.predict(photos[1]).experts_used == 3


@pytest.mark.parametrize("streams", [2, "auto"])
def test_streams_compute_at_the_same_time(bundle_path, photos, streams):
    """Each run waits for the other: neither would end if they ran in turn."""
    with Pipeline.open(bundle_path, threads=2, streams=streams) as pipeline:
        assert pipeline.streams == 2
        run, both = pipeline._chain.run, threading.Barrier(2, timeout=10)

        def meeting(*args, **options):
            both.wait()
            return run(*args, **options)

        pipeline._chain.run = meeting
        assert len(list(pipeline.predict_iter(photos[:4]))) == 4


def test_streams_leave_no_more_threads_than_asked_for(bundle_path):
    for threads, streams, expected in ((4, 1, 4), (4, 2, 3), (4, "auto", 1), (12, "auto", 5), (1, 3, 1)):
        with Pipeline.open(bundle_path, threads=threads, streams=streams) as pipeline:
            session = pipeline._chain._executor._sessions["expert_1"]
            assert session.get_session_options().intra_op_num_threads == expected


def test_closing_waits_for_streams_that_compute(bundle_path, photos):
    pipeline = Pipeline.open(bundle_path, threads=2, streams=2)
    run, inside, go_on = pipeline._chain.run, threading.Event(), threading.Event()

    def waiting(*args, **options):
        inside.set()
        assert go_on.wait(10)
        return run(*args, **options)

    pipeline._chain.run = waiting
    found = []
    asking = threading.Thread(target=lambda: found.append(pipeline.predict(photos[0])))
    asking.start()
    assert inside.wait(10)
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    go_on.set()
    asking.join()
    closing.join()
    assert found[0].experts_used == 3
    with pytest.raises(BackendError, match="closed"):
        pipeline.predict(photos[0])


def test_another_thread_may_use_it_in_turn(pipeline, photos):
    found = []
    thread = threading.Thread(target=lambda: found.append(pipeline.predict(photos[0])))
    thread.start()
    thread.join()
    assert same(found[0], pipeline.predict(photos[0]))


def test_what_cannot_be_opened(tmp_path, bundle_path):
    with pytest.raises(BundleError, match="does not exist"):
        Pipeline.open(tmp_path / "none.plan")
    with pytest.raises(BackendError, match="nothing can run device 'cuda:99' and backend 'auto'"):
        Pipeline.open(bundle_path, device="cuda:99")
    with pytest.raises(BackendError, match="tensorrt runs on NVIDIA GPUs alone"):
        Pipeline.open(bundle_path, device="cpu", backend="tensorrt")


def test_softmax_of_large_logits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = softmax(np.array([1000.0, 1000.0, -1000.0], np.float32))
    np.testing.assert_allclose(found, [0.5, 0.5, 0])
