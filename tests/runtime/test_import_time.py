import json
import subprocess
import sys
from importlib.metadata import version

import pytest

HEAVY = ("torch", "torchvision", "timm", "onnx", "mge", "mge_export", "lightning")


def loaded(code):
    """Modules after `code` ran in a fresh interpreter."""
    program = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return set(json.loads(out.splitlines()[-1]))


def test_importing_the_runtime_loads_nothing_heavy():
    modules = loaded("import mge_runtime")
    assert "mge_runtime" in modules
    assert not modules & {*HEAVY, "numpy", "PIL", "onnxruntime", "click"}


@pytest.mark.parametrize("command", ["bench", "build", "info", "run"])
def test_help_loads_nothing_heavy(command):
    code = (
        f"from mge_runtime.cli.{command} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0"
    )
    assert not loaded(code) & {*HEAVY, "numpy", "PIL", "onnxruntime"}


def test_opening_loads_the_decoders_so_that_the_first_picture_does_not(bundle_path):
    opening = f"from mge_runtime import Pipeline; pipeline = Pipeline.open({str(bundle_path)!r}, threads=1)"
    assert {"PIL.Image", "PIL.JpegImagePlugin", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin"} <= loaded(opening)


def test_answering_needs_no_torch(bundle_path):
    code = (
        "import numpy as np\n"
        "from mge_runtime import Pipeline\n"
        f"with Pipeline.open({str(bundle_path)!r}, threads=1) as pipeline:\n"
        "    pipeline.predict(np.zeros((40, 50, 3), np.uint8))"
    )
    modules = loaded(code)
    assert "onnxruntime" in modules
    assert not modules & set(HEAVY)


def test_public_names_are_there():
    import mge_runtime

    for name in mge_runtime.__all__:
        assert getattr(mge_runtime, name).__name__ == name
    assert set(mge_runtime.__all__) <= set(dir(mge_runtime))
    assert mge_runtime.__version__ == version("mge")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mge_runtime.nothing


def test_importing_is_quick():
    """The figure is 0.3 s of wall time on a quiet machine; processor time is what a busy one can hold."""
    code = "import time; start = time.process_time(); import mge_runtime; print(time.process_time() - start)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.3
