"""TensorRT on a GPU: engines built on it, run on the device layer, checked against ONNX Runtime on the CPU.

Nobody has run these yet: they need an NVIDIA GPU, and `tensorrt` or `tensorrt_rtx`. Memory, copies and two pipelines at
once are checked by `test_gpu_selfcheck.py`.
"""

import shutil

import numpy as np
import pytest

from mge_runtime import Pipeline
from mge_runtime.backends import choose, open_executor
from mge_runtime.bundle import Bundle
from mge_runtime.chain import Chain
from mge_runtime.errors import BackendError
from mge_runtime.trt.vendor import load_vendor
from tests.helpers import chain_runs as runs

pytestmark = pytest.mark.gpu

EVERY, frames = runs.EVERY, runs.frames


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def ready(request, no_gpu, bundle_path, tmp_path_factory):
    """A bundle and the choice of what runs it, its engines built into a cache that is thrown away."""
    if no_gpu:
        pytest.skip(no_gpu)
    folder = tmp_path_factory.mktemp(request.param)
    path = shutil.copy(bundle_path, folder / "mge.plan")
    with pytest.MonkeyPatch.context() as patch, Bundle.open(path) as bundle:
        patch.setenv("MGE_CACHE_DIR", str(folder / "cache"))
        try:
            load_vendor(request.param)
            choice = choose("cuda:0", request.param, bundle=bundle)
        except BackendError as error:
            pytest.skip(str(error))
        yield bundle, choice


@pytest.fixture
def expected(bundle_path):
    with Pipeline.open(bundle_path, device="cpu", threads=1) as pipeline:
        yield lambda frames: pipeline.run(frames, outputs=EVERY)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("graphs", [True, False])
def test_every_tensor_equals_the_chain_on_the_cpu(ready, expected, batch, graphs):
    bundle, choice = ready
    chain = Chain(bundle, open_executor(choice, bundle, graphs=graphs))
    for seed in range(3):
        found, wanted = chain.run(frames(batch, seed), outputs=EVERY).tensors, expected(frames(batch, seed))
        for name in EVERY:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-3, err_msg=name)
    report = chain.report()
    assert report["programs"][0]["graph"] is graphs, report
    assert report["scratch_bytes"] <= report["scratch_bytes_if_not_shared"]
    assert report["copies"]["host_to_device"] == 3
    assert report["copies"]["device_to_host"] == 3 * len(EVERY)
    chain.close()


def test_more_than_the_engines_were_built_for_is_refused(ready):
    bundle, choice = ready
    chain = Chain(bundle, open_executor(choice, bundle))
    with pytest.raises(BackendError, match=r"mge-build --batch"):
        chain.run(frames(chain.max_batch + 1))
    chain.close()
