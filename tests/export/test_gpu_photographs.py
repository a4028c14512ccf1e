"""The checks of `mge-bench --selfcheck` on real exports and photographs: on the CPU, and on every backend of a GPU."""

import pytest

from mge_runtime.bench_subject import Images, open_subject
from mge_runtime.sources import find_images
from tests.helpers.engines import BACKENDS, CHECKS, open_on_gpu, selfcheck


def read(folder, subject):
    images = Images.read(find_images([str(folder)]).images, subject, problem=pytest.fail)
    assert images.source == "10 named images"
    return images.frames


@pytest.mark.parametrize("name", ["the same outputs in batches", "the same outputs from two pipelines at once"])
def test_an_export_passes_on_the_cpu(exported, photographs, name):
    subject = open_subject(exported.path, "cpu", threads=1)
    selfcheck(subject, read(photographs, subject), name)
    assert subject.tolerances.relative == exported.result.report.tolerances.relative


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKS)
def test_selfcheck(exported, photographs, backend, name, tmp_path):
    subject = open_on_gpu(exported.path, backend, tmp_path)
    selfcheck(subject, read(photographs, subject), name)
