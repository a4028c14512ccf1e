"""The first GPU, for tests marked `gpu`; where it cannot be used they are skipped, with the reason."""

import shutil

import numpy as np
import pytest

from mge_runtime.bench_subject import open_subject
from mge_runtime.errors import BackendError
from mge_runtime.selfcheck import all_checks
from mge_runtime.trt.build import build_targets
from mge_runtime.trt.target import TargetRequest

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
CHECKS = list(all_checks(np.empty(0, np.uint8)))


def open_on_gpu(bundle_path, backend, folder):
    """A copy of a bundle on one backend of the first GPU, with the engines that it needs."""
    path = shutil.copy(bundle_path, folder / "mge.plan")
    try:
        if backend != "onnxruntime":
            build_targets(path, [TargetRequest(None)], into_bundle=True, backend=backend)
        return open_subject(path, "cuda:0", backend)
    except BackendError as error:  # no GPU, no library, or a model that it cannot run
        pytest.skip(str(error))


def selfcheck(subject, frames, name):
    check = all_checks(frames)[name](subject)
    if check.outcome == "not run":
        pytest.skip(check.found)
    assert check.outcome == "passed", check
