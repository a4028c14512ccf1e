import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mge_runtime.pipeline import Pipeline


@pytest.fixture(scope="session")
def tiny():
    """The module `tiny_chain` of the runtime's tests."""
    path = Path(__file__).parents[1] / "runtime" / "tiny_chain.py"
    spec = importlib.util.spec_from_file_location("mge_tests_tiny_chain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_path(tiny, tmp_path_factory):
    """A tiny bundle; tests that change it work on a copy."""
    path = tmp_path_factory.mktemp("bundle") / "mge.plan"
    tiny.write_tiny_bundle(path)
    return path


@pytest.fixture(scope="session")
def labeled(tiny_path, tmp_path_factory):
    """180 seeded images in class folders, named after what the tiny chain sees in them, one in six after another."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(3)
    with Pipeline.open(tiny_path, threads=1) as pipeline:
        for number in range(180):
            image = np.kron(rng.integers(0, 256, (5, 6, 3), np.uint8), np.ones((7, 7, 1), np.uint8))
            seen = pipeline.predict(image).class_index
            label = rng.integers(5) if number % 6 == 0 else seen
            place = folder / f"bird {label}"
            place.mkdir(exist_ok=True)
            Image.fromarray(image).save(place / f"{number}.png")
    return folder


@pytest.fixture
def copy(tiny_path, tmp_path):
    """A copy of the tiny bundle, to change."""
    return Path(shutil.copy(tiny_path, tmp_path / "mge.plan"))


@pytest.fixture
def data(labeled, tmp_path):
    """A copy of the labeled images, to change."""
    return Path(shutil.copytree(labeled, tmp_path / "data"))
