"""TensorRT on a GPU: engines built on it, run on the device layer, checked against ONNX Runtime on the CPU.

They need an NVIDIA GPU, and `tensorrt` or `tensorrt_rtx`. Memory and two pipelines at once are checked by
`test_gpu_selfcheck.py`.
"""

import numpy as np
import pytest

from mge_runtime.backends import choose, open_executor
from mge_runtime.bundle import Bundle
from mge_runtime.chain import Chain
from mge_runtime.errors import BackendError
from tests.helpers.chain_runs import EVERY, frames
from tests.helpers.engines import open_on_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def ready(request, bundle_path, tmp_path_factory):
    """A bundle with engines for the first GPU, and the choice that runs it."""
    path = open_on_gpu(bundle_path, request.param, tmp_path_factory.mktemp(request.param)).path
    with Bundle.open(path) as bundle:
        yield bundle, choose("cuda:0", request.param, bundle=bundle)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_every_tensor_equals_the_chain_on_the_cpu(ready, expected, batch, cuda_graphs):
    bundle, choice = ready
    chain = Chain(bundle, open_executor(choice, bundle, cuda_graphs=cuda_graphs))
    for seed in range(3):
        found, wanted = (each.run(frames(batch, seed), outputs=EVERY).tensors for each in (chain, expected))
        for name in EVERY:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-3, err_msg=name)
    report = chain.report()
    assert report["programs"][0]["cuda_graph"] is cuda_graphs, report
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
