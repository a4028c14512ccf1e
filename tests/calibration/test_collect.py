"""ChainLogits of a bundle on labelled images."""

import numpy as np
import pytest

from mge_calibration.collect import collect, measure_times
from mge_calibration.images import list_labeled
from mge_runtime.bundle import write_bundle
from mge_runtime.calibrated import Calibrated, Promise
from mge_runtime.errors import BackendError
from mge_runtime.pipeline import Pipeline


def fail(error):
    raise error


@pytest.mark.parametrize("streams", [1, 2])
def test_answers_are_those_of_each_image_in_order(tiny_path, labelled, streams):
    steps = []
    with Pipeline.open(tiny_path, threads=2, streams=streams) as pipeline:
        names = pipeline.manifest.class_names
        images = list_labeled(labelled, names)[1][:21]
        answers = collect(pipeline, images, problem=fail, step=lambda: steps.append(1))
        predictions = [pipeline.predict(image.path) for image in images]
        first = [pipeline.predict(image.path, exit=1) for image in images]
    assert list(answers.logits) == ["mean_logits_1", "mean_logits_2", "logits"]
    assert [names[label] for label in answers.labels] == [image.path.parent.name for image in images]
    np.testing.assert_allclose(answers.logits["logits"], [p.logits for p in predictions], rtol=1e-5)
    np.testing.assert_allclose(answers.logits["mean_logits_1"], [p.logits for p in first], rtol=1e-5)
    assert len(steps) == 21
    assert len(answers.take(np.array([3, 5]))) == 2
    assert answers.take(np.array([3, 5])).images == (images[3], images[5])


def test_answers_that_are_not_finite_are_refused(tiny, labelled, tmp_path):
    graphs = tiny.make_graphs()
    expert = next(g for g in graphs if g.spec.name == "expert_2")
    expert.weights[-4:] = np.float32(np.inf).tobytes()
    write_bundle(tmp_path / "inf.plan", tiny.make_manifest(graphs), {g.spec.name: g.model() for g in graphs})
    with Pipeline.open(tmp_path / "inf.plan", threads=1) as pipeline:
        images = list_labeled(labelled, pipeline.manifest.class_names)[1][:3]
        with pytest.raises(BackendError, match="_2 of the graph expert_2 holds NaN or infinity"):
            collect(pipeline, images, problem=fail)


def test_every_stop_is_timed(tiny_path):
    with Pipeline.open(tiny_path, threads=1) as pipeline:
        times = measure_times(pipeline, [np.zeros((32, 32, 3), np.uint8)])
    assert (times.images, len(times.stops), times.exits) == (1, 3, None)
    assert all(0 < time < 1000 for time in (*times.stops, times.full))


class Slow:
    """A pipeline whose runs take as long as its frame says, in ms: with exits, and without by where they stop."""

    def __init__(self, pipeline):
        self.manifest, self.calibrated = pipeline.manifest, Calibrated({}, {"mean_logits_1": 0.5}, Promise(0.01, 0.05))
        self.now, self.order = 0.0, []

    def run(self, frame, *, exit, outputs):  # noqa: ARG002 - as the pipeline's
        self.order.append(exit)
        self.now += frame.max() * {1: 1, 2: 2, "never": 4, "calibrated": 3}[exit] / 1e3


def test_exits_are_timed_beside_the_full_chain(tiny_path, monkeypatch):
    with Pipeline.open(tiny_path, threads=1) as pipeline:
        slow = Slow(pipeline)
    monkeypatch.setattr("mge_calibration.collect.time.perf_counter", lambda: slow.now)
    frames = [np.full((32, 32, 3), value, np.uint8) for value in (1, 2, 9)]
    times = measure_times(slow, frames, rounds=2)
    assert times.stops == pytest.approx([2, 4, 8])  # medians over images
    assert (times.full, times.exits) == pytest.approx((16, 12))  # means over images
    assert len(slow.order) == 3 * 3 * 4  # with a round that is not counted
    groups = {tuple(slow.order[start : start + 4]) for start in range(0, 36, 4)}
    assert len(groups) == 4  # each way comes first somewhere
    assert all(set(group) == {1, 2, "never", "calibrated"} for group in groups)
