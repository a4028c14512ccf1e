import importlib.util
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tiny():
    """The module `tiny_chain`."""
    spec = importlib.util.spec_from_file_location("mge_tests_tiny_chain", Path(__file__).with_name("tiny_chain.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bundle_path(tiny, tmp_path_factory):
    """A tiny bundle; tests that change it work on a copy."""
    path = tmp_path_factory.mktemp("bundle") / "mge.plan"
    tiny.write_tiny_bundle(path)
    return path


@pytest.fixture(scope="session")
def photos():
    """Seeded pictures of several shapes, uint8 RGB."""
    rng = np.random.default_rng(7)
    coarse = [
        rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((6, 5), (5, 9), (7, 7), (4, 6), (9, 5), (6, 6), (3, 8))
    ]
    return [np.kron(c, np.ones((9, 9, 1), np.uint8)) for c in coarse]
