import ctypes
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mge_runtime.bundle import Bundle
from tests.runtime import tiny_chain


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MGE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny():
    """The module `tiny_chain`."""
    return tiny_chain


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory):
    """A tiny bundle; tests that change it work on a copy."""
    path = tmp_path_factory.mktemp("bundle") / "mge.plan"
    tiny_chain.write_tiny_bundle(path)
    return path


@pytest.fixture(scope="session")
def photos():
    """Seeded images of several shapes, uint8 RGB."""
    rng = np.random.default_rng(7)
    coarse = [
        rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((6, 5), (5, 9), (7, 7), (4, 6), (9, 5), (6, 6), (3, 8))
    ]
    return [np.kron(c, np.ones((9, 9, 1), np.uint8)) for c in coarse]


@pytest.fixture(scope="session")
def no_gpu():
    """Why CUDA cannot be used here; None where a driver is installed."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return f"no NVIDIA driver: {name} cannot be loaded"
    return None


@pytest.fixture
def cuda(no_gpu):
    """The first GPU as a `CudaDevice`; where there is no driver the test is skipped, with that reason."""
    if no_gpu:
        pytest.skip(no_gpu)
    from mge_runtime.device.cuda import CudaDevice

    return CudaDevice(0)


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every device that is here; whoever uses it gives back what it took."""
    if request.param == "cuda":
        found = request.getfixturevalue("cuda")
    else:
        from tests.helpers.host_device import HostDevice

        found = HostDevice()
    yield found
    assert (found.allocated, found.allocated_host) == (0, 0), "memory was left behind"


@pytest.fixture
def bundle(bundle_path):
    """The tiny bundle, open."""
    with Bundle.open(bundle_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def expected(bundle_path):
    """The tiny chain on the CPU, graph by graph: what others must predict, too."""
    from tests.helpers.chain_runs import open_chain

    chain = open_chain(bundle_path)
    yield chain
    chain.close()


@pytest.fixture
def copy(bundle_path, tmp_path):
    """A copy of the tiny bundle, to change."""
    return Path(shutil.copy(bundle_path, tmp_path / "mge.plan"))


@pytest.fixture
def make(tiny, tmp_path, monkeypatch):
    """Make tiny bundles with bytes in place of engines; the working folder is theirs."""
    from tests.helpers.recorded_machines import write_with_engines

    monkeypatch.chdir(tmp_path)
    return partial(write_with_engines, tiny, tmp_path / "mge.plan")


@pytest.fixture(scope="session")
def on_cpu(bundle_path):
    """The tiny bundle on the CPU, as the self-check takes it."""
    from mge_runtime.bench_subject import open_subject

    return open_subject(bundle_path, "cpu", threads=1)


@pytest.fixture(scope="session")
def frames(on_cpu):
    """The frames of a self-check without images, which are small here."""
    from mge_runtime import bench_subject

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_subject, "_HEIGHT", 96)
        patch.setattr(bench_subject, "_WIDTH", 128)
        return bench_subject.Images.synthetic(on_cpu.manifest.preprocess).frames
