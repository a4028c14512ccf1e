"""`mge-bench --selfcheck` on the CPU: its report, what stops it, and engines that do not fit."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.cli.bench import main
from mge_runtime.errors import BackendError
from mge_runtime.selfcheck import Images, check_refused, run_checks
from mge_runtime.selfcheck.memory import host_memory


def test_the_command_reports_on_the_cpu(bundle_path, tmp_path):
    out = tmp_path / "report.md"
    arguments = ["--engine", str(bundle_path), "--selfcheck", "--device", "cpu", "--runs", "20", "--threads", "1"]
    # A process of its own: what the tests before left behind moves the memory that is measured.
    command = [sys.executable, "-c", "from mge_runtime.cli.bench import main; main()", *arguments, "--json"]
    result = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert {name: check["outcome"] for name, check in report["checks"].items()} == {
        "the same outputs as ONNX Runtime on the CPU": "not run",
        "the same outputs in batches": "passed",
        "the same outputs with CUDA graphs as without": "not run",
        "one copy in, one out for each wanted tensor": "not run",
        "the same outputs from two pipelines at once": "passed",
        "engines that do not fit are refused": "passed",
        "no memory grows": "passed" if host_memory() else "not run",
    }
    assert all(check["found"] for check in report["checks"].values())
    assert (report["backend"], report["device"], report["bundle"]["name"]) == ("onnxruntime", "cpu", "mge.plan")
    assert report["machine"]["libraries"]["onnxruntime"] == load_onnxruntime().__version__
    text = out.read_text()
    assert text.startswith("### mge-bench: tiny, 3 experts")
    assert "\n4 passed, 0 failed, 3 not run\n" in text or not host_memory()
    assert "synthetic" in text
    assert str(bundle_path.parent) not in text + result.stdout, "a posted report names no folder"


def test_images_are_named_and_a_bad_one_is_passed_over(bundle_path, tmp_path):
    for number in range(3):
        Image.new("RGB", (50, 60), (0, 80 * number, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    options = ["--engine", str(bundle_path), "--selfcheck", "--device", "cpu", "--runs", "2", "--threads", "1"]
    result = CliRunner().invoke(main, [*options, str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "images   3 of 4 named images" in result.stdout
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ") and "bad.png" in line]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--runs", "1"], 2, "--runs"),
        (["--engine", "missing.plan"], 1, "error: no bundle at missing.plan"),
        (["--engine", "missing.plan", "no.jpg", "nowhere/*.jpg"], 1, "error: "),
    ],
)
def test_what_cannot_be_checked_is_said_before_anything_runs(arguments, code, said):
    result = CliRunner().invoke(main, ["--selfcheck", *arguments])
    assert result.exit_code == code
    assert said in result.stderr


@pytest.fixture
def failing(on_cpu):
    class Failing:
        max_batch = None

        def run(self, *_, **__):
            raise BackendError("the GPU\nis on fire")

        def report(self):
            raise KeyError("programs")

        def close(self):
            pass

    return replace(on_cpu, open=lambda **_: Failing())


def test_a_failed_check_is_reported_the_others_go_on_and_the_exit_code_is_1(bundle_path, failing, frames, monkeypatch):
    report = run_checks(failing, Images((), frames, "drawn"), runs=2)
    assert report.verdict == "1 passed, 5 failed, 1 not run"
    assert report.checks["the same outputs in batches"].found == "the GPU is on fire"
    defect = report.checks["the same outputs with CUDA graphs as without"].found
    assert defect.startswith("KeyError: 'programs' in test_selfcheck.py, line ")
    monkeypatch.setattr("mge_runtime.bench_subject.open_subject", lambda *_, **__: failing)
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--selfcheck", "--runs", "2"])
    assert result.exit_code == 1
    assert result.stdout.count("\nFAILED ") == 5


def test_engines_that_do_not_fit_are_refused(on_cpu, monkeypatch):
    check = check_refused(on_cpu)
    assert check.outcome == "passed", check
    assert set(check.numbers) == {"another GPU", "another version", "another system"}
    assert on_cpu.machine.gpus or "a stand-in where there is no GPU" in check.found
    assert "is for sm87, this GPU is NVIDIA GeForce RTX 3060 (sm86)" in check.found
    assert "was built by tensorrt 9.9.9, " in check.found
    monkeypatch.setattr("mge_runtime.selfcheck.checks.why_not", lambda *_: None)
    check = check_refused(on_cpu)
    assert check.outcome == "failed"
    assert "engines for another GPU are not refused" in check.found
