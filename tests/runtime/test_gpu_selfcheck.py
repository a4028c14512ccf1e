"""The checks of `mge-bench --selfcheck` as tests: every backend of a GPU, on the tiny chain.

Nobody has run these yet: they need an NVIDIA GPU, and one of `tensorrt`, `tensorrt_rtx` and `onnxruntime-gpu`. They
need no PyTorch, so a Jetson can run them; those in tests/export run a real export on photographs.
"""

import shutil

import numpy as np
import pytest

from mge_runtime.backends import choose
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError
from mge_runtime.selfcheck import all_checks, drawn_frames, open_subject

pytestmark = pytest.mark.gpu

NAMES = list(all_checks(np.empty(0, np.uint8)))


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx", "onnxruntime"])
def subject(request, no_gpu, bundle_path, tmp_path_factory):
    """A bundle on one backend of the first GPU, its engines built into a cache that is thrown away."""
    if no_gpu:
        pytest.skip(no_gpu)
    folder = tmp_path_factory.mktemp(request.param)
    path = shutil.copy(bundle_path, folder / "mge.plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MGE_CACHE_DIR", str(folder / "cache"))
        with Bundle.open(path) as bundle:
            try:
                choose("cuda:0", request.param, bundle=bundle)
            except BackendError as error:
                pytest.skip(str(error))
        yield open_subject(path, "cuda:0", request.param)


@pytest.mark.parametrize("name", NAMES)
def test_selfcheck(subject, name):
    check = all_checks(drawn_frames(subject.manifest.preprocess).frames)[name](subject)
    if check.outcome == "not run":
        pytest.skip(check.found)
    assert check.outcome == "passed", check
