"""What imports take and load; between packages they go mge_runtime <- mge_calibration <- mge_export -> mge."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import mge_runtime

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
HEAVY = {"torch", "torchvision", "timm", "onnx", "mge", "mge_export", "lightning"}
NOT_FOR_HELP = HEAVY | {"numpy", "PIL", "onnxruntime", "fastapi", "uvicorn", "prometheus_client"}


def loaded(code):
    """Modules after `code` ran in a fresh interpreter, and the processor time that it took in seconds."""
    program = (
        f"import time; start = time.process_time()\n{code}\ntaken = time.process_time() - start\n"
        "import sys, json; print(json.dumps([sorted(sys.modules), taken]))"
    )
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    modules, seconds = json.loads(out.splitlines()[-1])
    return set(modules), seconds


def test_importing_the_runtime_is_quick_and_loads_nothing_heavy():
    runs = [loaded("import mge_runtime") for _ in range(3)]
    # The figure is 0.3 s of wall time on a quiet machine; processor time is what a busy one can keep, too.
    assert min(seconds for _, seconds in runs) < 0.3
    assert not runs[0][0] & {*NOT_FOR_HELP, "click"}


@pytest.mark.parametrize("command", ["bench", "build", "info", "run", "serve"])
def test_help_loads_nothing_heavy(command):
    code = (
        f"from mge_runtime.cli.{command} import main\ntry: main(['--help'])\nexcept SystemExit as s: assert not s.code"
    )
    assert not loaded(code)[0] & NOT_FOR_HELP


def test_predicting_loads_no_torch_and_the_decoders_before_the_first_image(bundle_path):
    opening = (
        "import numpy as np\n"
        "from mge_runtime import Pipeline\n"
        f"pipeline = Pipeline.open({str(bundle_path)!r}, threads=1)\n"
        "import sys; assert {'PIL.Image', 'PIL.JpegImagePlugin', 'PIL.TiffImagePlugin', 'PIL.WebPImagePlugin'} <= "
        "set(sys.modules)\n"
        "pipeline.predict(np.zeros((40, 50, 3), np.uint8))"
    )
    modules, _ = loaded(opening)
    assert "onnxruntime" in modules
    assert not modules & HEAVY


def test_public_names_are_there():
    for name in mge_runtime.__all__:
        assert getattr(mge_runtime, name).__name__ == name
    assert set(mge_runtime.__all__) <= set(dir(mge_runtime))
    assert mge_runtime.__version__ == version("mge")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mge_runtime.nothing


@pytest.mark.parametrize("package", FORBIDDEN)
def test_every_module_of_a_package_imports_only_what_it_may(package):
    done = subprocess.run([sys.executable, "-c", CHECK, package], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert package in loaded
    assert not loaded & FORBIDDEN[package]
