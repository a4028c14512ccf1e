"""The checks of `mge-bench --selfcheck` as tests: every backend of a GPU, on the tiny chain.

They need an NVIDIA GPU and one of `tensorrt`, `tensorrt_rtx` and `onnxruntime-gpu`, but no PyTorch, so a Jetson can run
them; those in tests/export run a real export on photographs.
"""

import pytest

from mge_runtime.bench_subject import Images
from tests.helpers.engines import BACKENDS, CHECKS, open_on_gpu, selfcheck

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=BACKENDS)
def subject(request, bundle_path, tmp_path_factory):
    return open_on_gpu(bundle_path, request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", CHECKS)
def test_selfcheck(subject, name):
    selfcheck(subject, Images.synthetic(subject.manifest.preprocess).frames, name)
