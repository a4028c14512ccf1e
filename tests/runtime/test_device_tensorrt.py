"""TensorRT on a GPU: engines built on it, run on the device layer, held against ONNX Runtime on the CPU.

Nobody has run these yet: they need an NVIDIA GPU, and `tensorrt` or `tensorrt_rtx`.
"""

import shutil

import numpy as np
import pytest

from mge_runtime import Pipeline
from mge_runtime.backends import choose, open_backend
from mge_runtime.backends.tensorrt import TensorRTBackend
from mge_runtime.bundle import Bundle
from mge_runtime.chain import Chain
from mge_runtime.errors import BackendError
from mge_runtime.trt.vendor import load_vendor

pytestmark = pytest.mark.gpu

EVERY = {
    "answer_1", "answer_2", "answer_3", "box_1", "box_2", "gate", "heatmap_1", "heatmap_2", "heatmap_3",
    "image_1", "image_2", "image_3", "logits", "logits_1", "logits_2", "logits_3",
}  # fmt: skip


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def ready(request, no_gpu, bundle_path, tmp_path_factory):
    """A bundle and the backend that runs it, its engines built into a cache that is thrown away."""
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
        yield bundle, open_backend(choice, bundle)


@pytest.fixture
def expected(bundle_path):
    with Pipeline.open(bundle_path, device="cpu", threads=1) as pipeline:
        yield lambda frames: pipeline.run(frames, outputs=EVERY)


def frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("graphs", [True, False])
def test_every_tensor_equals_the_chain_on_the_cpu(ready, expected, batch, graphs):
    bundle, opened = ready
    chain = Chain(bundle, TensorRTBackend(opened._vendor, opened._engines, graphs=graphs))
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


def test_the_gpu_has_as_much_free_memory_after_a_thousand_runs(ready):
    from cuda.bindings import driver

    bundle, backend = ready
    chain = Chain(bundle, backend)
    for batch in (1, 8):
        for _ in range(10):
            chain.run(frames(batch))
    _, free, _ = driver.cuMemGetInfo()
    for run in range(1000):
        chain.run(frames((1, 8)[run % 2]))
    _, after, _ = driver.cuMemGetInfo()
    assert free - after < 2**20
    chain.close()


def test_two_chains_in_one_process_do_not_mix(ready, expected):
    bundle, backend = ready
    chains = [Chain(bundle, backend) for _ in range(2)]
    for seed in range(4):
        for number, chain in enumerate(chains):
            batch = frames(2, 10 * number + seed)
            found = chain.run(batch).tensors["logits"]
            np.testing.assert_allclose(found, expected(batch)["logits"], rtol=1e-3, atol=1e-3)
    for chain in chains:
        chain.close()


def test_more_than_the_engines_were_built_for_is_refused(ready):
    bundle, backend = ready
    chain = Chain(bundle, backend)
    with pytest.raises(BackendError, match=r"mge-build --batch"):
        chain.run(frames(chain.max_batch + 1))
    chain.close()
