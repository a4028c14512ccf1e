"""The checks of `mge-bench --selfcheck` on real exports and photographs: on the CPU, and on every backend of a GPU."""

import numpy as np
import pytest

from mge_runtime.backends import choose
from mge_runtime.bench import BenchImages
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError
from mge_runtime.selfcheck import all_checks, open_subject
from mge_runtime.sources import MAX_PIXELS, find_images

NAMES = list(all_checks(np.empty(0, np.uint8)))


def named(folder, subject):
    images = find_images([str(folder)]).images
    return BenchImages.read(images, subject.manifest.preprocess, MAX_PIXELS, float("inf"), pytest.fail)


@pytest.mark.parametrize("name", ["the same outputs in batches", "the same outputs from two pipelines at once"])
def test_an_export_passes_on_the_cpu(exported, photographs, name):
    subject = open_subject(exported.path, "cpu", threads=1)
    frames = named(photographs, subject)
    check = all_checks(frames.frames)[name](subject)
    assert check.outcome == "passed", check
    assert frames.source == "10 named images"
    assert subject.tolerances.relative == exported.result.report.tolerances.relative


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx", "onnxruntime"])
def on_gpu(request, tmp_path_factory):
    """The name of a backend that runs on the first GPU; its engines go into a cache that is thrown away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MGE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        try:
            choose("cuda:0", request.param)
        except BackendError as error:
            pytest.skip(str(error))
        yield request.param


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_selfcheck(on_gpu, exported, photographs, name):
    with Bundle.open(exported.path) as bundle:
        try:
            choose("cuda:0", on_gpu, bundle=bundle)
        except BackendError as error:  # a model that this GPU cannot run, such as FP32 on Turing
            pytest.skip(str(error))
    subject = open_subject(exported.path, "cuda:0", on_gpu)
    check = all_checks(named(photographs, subject).frames)[name](subject)
    if check.outcome == "not run":
        pytest.skip(check.found)
    assert check.outcome == "passed", check
