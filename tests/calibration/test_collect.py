"""Logits of a bundle on labeled images, and how they are split."""

import numpy as np
import pytest

from mge_calibration.collect import ChainLogits, collect
from mge_calibration.images import LabeledImage, list_labeled, short_digest
from mge_runtime.bundle import write_bundle
from mge_runtime.errors import BackendError
from mge_runtime.pipeline import Pipeline


def fail(error):
    raise error


@pytest.mark.parametrize("streams", [1, 2])
def test_logits_are_those_of_each_image_in_order(tiny_path, labeled, streams):
    steps = []
    with Pipeline.open(tiny_path, threads=2, streams=streams) as pipeline:
        names = pipeline.manifest.class_names
        images = list_labeled(labeled, names)[1][:21]
        found = collect(pipeline, images, problem=fail, step=lambda: steps.append(1))
        predictions = [pipeline.predict(image.path) for image in images]
        first = [pipeline.predict(image.path, exit=1) for image in images]
    assert list(found.logits) == ["mean_logits_1", "mean_logits_2", "logits"]
    assert [names[label] for label in found.labels] == [image.path.parent.name for image in images]
    np.testing.assert_array_equal(found.logits["logits"], [p.logits for p in predictions])
    np.testing.assert_array_equal(found.logits["mean_logits_1"], [p.logits for p in first])
    assert len(steps) == 21


def test_logits_that_are_not_finite_are_refused(tiny, labeled, tmp_path):
    graphs = tiny.make_graphs()
    expert = next(g for g in graphs if g.spec.name == "expert_2")
    expert.weights[-4:] = np.float32(np.inf).tobytes()
    write_bundle(tmp_path / "inf.plan", tiny.make_manifest(graphs), {g.spec.name: g.model() for g in graphs})
    with Pipeline.open(tmp_path / "inf.plan", threads=1) as pipeline:
        images = list_labeled(labeled, pipeline.manifest.class_names)[1][:3]
        with pytest.raises(BackendError, match="_2 of the graph expert_2 holds NaN or infinity"):
            collect(pipeline, images, problem=fail)


def test_a_split_follows_content_and_seed_alone():
    images = [LabeledImage(f"{n}.png", None, n % 3, f"{n:02x}" * 32) for n in range(60)]

    def split(images, seed=0, known=()):
        labels = np.array([image.label for image in images])
        parts = ChainLogits(tuple(images), labels, {"logits": labels[:, None]}).split(frozenset(known), seed)
        assert all([image.label for image in part.images] == part.logits["logits"][:, 0].tolist() for part in parts)
        return [{image.sha256 for image in part.images} for part in parts]

    first, second = split(images)
    assert (len(first), len(second), len(first | second)) == (20, 40, 60)
    assert split([LabeledImage("other name", None, 0, image.sha256) for image in images[::-1]]) == [first, second]
    assert split(images, seed=1) != [first, second]
    known = {short_digest(sha256) for sha256 in sorted(second)[:10]}
    few, others = split(images, known=known)
    assert known <= {short_digest(sha256) for sha256 in few}
    assert (len(few), len(others)) == (20, 40)
