"""Engines for tests: on the first GPU (marked `gpu`; where it cannot be used they are skipped, with the reason), or of
TensorRT-RTX ahead of time, by the vendor's own parser and builder, without one. PyTorch is not needed.
"""

import shutil

import numpy as np
import pytest

from mge_runtime.bench_subject import open_subject
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError
from mge_runtime.files import temporary_folder
from mge_runtime.selfcheck import all_checks
from mge_runtime.trt.build import Job, ahead_of_time, build_engines, build_targets
from mge_runtime.trt.builder import BuildOptions
from mge_runtime.trt.target import BatchRange
from mge_runtime.trt.vendor import load_vendor

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
CHECKS = list(all_checks(np.empty(0, np.uint8)))


def open_on_gpu(bundle_path, backend, folder):
    """A copy of a bundle on one backend of the first GPU, with the engines that it needs."""
    path = shutil.copy(bundle_path, folder / "mge.plan")
    try:
        if backend != "onnxruntime":
            build_targets(path, [None], into_bundle=True, backend=backend)
        return open_subject(path, "cuda:0", backend)
    except BackendError as error:  # no GPU, no library, or a model that it cannot run
        pytest.skip(str(error))


def selfcheck(subject, frames, name):
    check = all_checks(frames)[name](subject)
    if check.outcome == "not run":
        pytest.skip(check.found)
    assert check.outcome == "passed", check


def build_all(path, *capabilities, batch="1"):
    """Build a bundle's engines ahead of time; return the sizes of the plans and what was recorded."""
    vendor = load_vendor("tensorrt-rtx")
    with Bundle.open(path) as bundle, temporary_folder("test") as folder:
        (target,) = ahead_of_time(vendor, capabilities)
        new = build_engines(bundle, Job(vendor, target, None, BuildOptions(BatchRange.parse(batch))), folder)
        return {graph: plan.stat().st_size for graph, plan in new.plans.items()}, new.details.precision
