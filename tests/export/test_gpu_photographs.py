"""The checks of `mge-bench --selfcheck` on real exports and photographs: on the CPU, and on every backend of a GPU."""

import numpy as np
import pytest

from mge_runtime.backends import choose
from mge_runtime.bench import BenchImages
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError
from mge_runtime.selfcheck.run import all_checks
from mge_runtime.selfcheck.subject import open_subject
from mge_runtime.sources import MAX_PIXELS, find_images

NAMES = [name for name, _ in all_checks(np.empty(0, np.uint8))]


def named(folder, subject):
    named = find_images([str(folder)]).images
    return BenchImages.read(named, subject.manifest.preprocess, MAX_PIXELS, float("inf"), pytest.fail)


@pytest.mark.parametrize("name", ["the same answers in batches", "two pipelines in one process"])
def test_an_export_passes_on_the_cpu(exported, photographs, name):
    subject = open_subject(exported.path, "cpu", threads=1)
    frames = named(photographs, subject)
    check = dict(all_checks(frames.frames))[name](subject)
    assert check.outcome == "passed", check
    assert subject.limits.relative == exported.result.report.tolerances.relative
    assert "parity report" in subject.limits.source


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx", "onnxruntime"])
def on_gpu(request, tmp_path_factory):
    """The name of a backend for the first GPU; its engines go into a cache that is thrown away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MGE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield request.param


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_selfcheck(on_gpu, exported, photographs, name):
    with Bundle.open(exported.path) as bundle:
        try:
            choose("cuda:0", on_gpu, bundle=bundle)
        except BackendError as error:  # no GPU, no engines, or a model that this GPU cannot run
            pytest.skip(str(error))
    subject = open_subject(exported.path, "cuda:0", on_gpu)
    check = dict(all_checks(named(photographs, subject).frames))[name](subject)
    if check.outcome == "not run":
        pytest.skip(check.found)
    assert check.outcome == "passed", check
