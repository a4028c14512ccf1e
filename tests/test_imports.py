"""Arrows between the packages point one way: mge_runtime <- mge_calibration <- mge_export -> mge."""

import subprocess
import sys

import pytest

CHECK = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print("\\n".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""
FORBIDDEN = {
    "mge_runtime": {"torch", "torchvision", "timm", "lightning", "onnx", "mge", "mge_calibration", "mge_export"},
    "mge_calibration": {"torch", "mge", "mge_export"},
    "mge": {"mge_calibration", "mge_export"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_every_module_of_a_package_imports_only_what_it_may(package):
    done = subprocess.run([sys.executable, "-c", CHECK, package], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert package in loaded
    assert not loaded & FORBIDDEN[package]
