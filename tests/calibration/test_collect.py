"""Answers of a bundle on labelled images."""

import numpy as np
import pytest

from mge_calibration.collect import collect
from mge_calibration.folder import list_labelled
from mge_runtime.bundle import write_bundle
from mge_runtime.errors import BackendError
from mge_runtime.pipeline import Pipeline


def fail(error):
    raise error


@pytest.mark.parametrize("streams", [1, 2])
def test_answers_are_those_of_each_image_in_order(tiny_path, labelled, streams):
    steps = []
    with Pipeline.open(tiny_path, threads=2, streams=streams) as pipeline:
        names = pipeline.manifest.class_names
        images = list_labelled(labelled, names)[1][:21]
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
        images = list_labelled(labelled, pipeline.manifest.class_names)[1][:3]
        with pytest.raises(BackendError, match="_2 of the graph expert_2 holds NaN or infinity"):
            collect(pipeline, images, problem=fail)
