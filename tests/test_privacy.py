"""Nothing leaves the machine: ONNX Runtime, which sends telemetry by default, is imported where that is turned off."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mge", "export", "runtime", "calibration", "benchmarks", "examples", "tests")
HELPER = "runtime/mge_runtime/backends/onnxruntime.py"
# What tells ONNX Runtime that it runs in continuous integration, where it sends nothing anyway.
SUPPRESSED = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "CIRCLECI", "JENKINS_URL", "GITLAB_CI", "BUILD_ID", "ORT_")
IMPORTERS = ("import_module", "__import__", "importorskip")
SECONDS = os.environ.get("MGE_NETWORK_SECONDS", "1")

RUN = """
import sys, time
import numpy as np
from mge_runtime import Pipeline
from mge_runtime.machine import describe_machine
describe_machine(always=True)
end = time.monotonic() + float(sys.argv[2])
with Pipeline.open(sys.argv[1], device="cpu", threads=1) as pipeline:
    while time.monotonic() < end:
        pipeline.predict(np.zeros((40, 50, 3), np.uint8))
        time.sleep(0.05)
"""


def imports_of_onnxruntime(source):
    """Lines of a file that import ONNX Runtime, by a statement, by name, or in a program that is a string."""
    for node in ast.walk(ast.parse(source)) if "onnxruntime" in source else ():
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORTERS):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"^\s*(?:import|from) +(onnxruntime\b)", node.value, re.MULTILINE)
        if any(str(name).partition(".")[0] == "onnxruntime" for name in names):
            yield node.lineno


def test_one_helper_imports_onnx_runtime():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    found = [(str(p.relative_to(ROOT)), line) for p in paths for line in imports_of_onnxruntime(p.read_text())]
    assert [name for name, _ in found] == [HELPER], f"expected load_onnxruntime() of {HELPER} instead of: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "import numpy, onnxruntime as ort",
        "def f():\n    from onnxruntime.quantization import calibrate",
        "ort = importlib.import_module('onnxruntime')",
        "ort = pytest.importorskip('onnxruntime.capi')",
        "run('''\nimport sys\nimport onnxruntime\n''')",
    ],
)
def test_every_way_to_import_it_is_seen(source):
    assert list(imports_of_onnxruntime(source))


def test_a_run_looks_up_no_host_and_writes_nothing(tmp_path):
    """Telemetry leaves files within a second; its first look-up comes after nine (`make check-network`)."""
    subprocess.run([sys.executable, ROOT / "tests/runtime/tiny_chain.py", tmp_path / "mge.plan"], check=True)
    folders = {name: tmp_path / name.lower() for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "CWD")}
    for folder in folders.values():
        folder.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SUPPRESSED)}
    command = [sys.executable, "-c", RUN, tmp_path / "mge.plan", SECONDS]
    calls = tmp_path / "calls"
    traced = shutil.which("strace") and subprocess.run(["strace", "-o", calls, "true"], check=False).returncode == 0
    if traced:
        command = ["strace", "-f", "-qq", "-e", "trace=connect,sendto", "-o", calls, *command]
    elif float(SECONDS) > 1:
        pytest.fail("strace cannot be run, so nobody would see a host looked up: apt-get install strace")
    environment = kept | {name: str(folder) for name, folder in folders.items()}
    subprocess.run(command, check=True, cwd=folders["CWD"], env=environment)
    assert [path for folder in folders.values() for path in folder.rglob("*") if path.is_file()] == []
    assert not traced or "connect(" not in calls.read_text()
