"""`mge-bench --selfcheck` on the CPU: its report, what stops it, and engines that do not fit."""

import json
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bench_subject import Images
from mge_runtime.cli.bench import main
from mge_runtime.errors import BackendError
from mge_runtime.selfcheck import check_refused, host_memory, run_checks


def test_the_command_reports_on_the_cpu(bundle_path, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (50, 60), (0, 80 * number, 0)).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/bad.png").write_bytes(b"no image")
    out = tmp_path / "report.md"
    options = {"--engine": bundle_path, "--device": "cpu", "--runs": 20, "--threads": 1, "--out": out}
    arguments = [str(part) for option in options.items() for part in option]
    # A process of its own: what the tests before left behind moves the memory that is measured.
    command = [sys.executable, "-c", "from mge_runtime.cli.bench import main; main()", "--selfcheck", "--json"]
    command += [*arguments, str(tmp_path / "images")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert {name: check["outcome"] for name, check in report["checks"].items()} == {
        "the same outputs as ONNX Runtime on the CPU": "not run",
        "the same outputs in batches": "passed",
        "the same outputs with CUDA graphs as without": "not run",
        "the same outputs from two pipelines at once": "passed",
        "engines that do not fit are refused": "passed",
        "no memory grows": "passed" if host_memory() else "not run",
    }
    assert all(check["found"] for check in report["checks"].values())
    assert (report["backend"], report["device"], report["bundle"]["name"]) == ("onnxruntime", "cpu", "mge.plan")
    assert report["machine"]["libraries"]["onnxruntime"] == load_onnxruntime().__version__
    assert report["images"] == "3 of 4 named images"
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ") and "bad.png" in line]
    text = out.read_text()
    assert text.startswith("### mge-bench: tiny, 3 experts")
    assert "\n4 passed, 0 failed, 2 not run\n" in text or not host_memory()
    assert str(bundle_path.parent) not in text + result.stdout, "a posted report names no folder"


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
    assert report.verdict == "1 passed, 4 failed, 1 not run"
    assert report.checks["the same outputs in batches"].found == "the GPU is on fire"
    defect = report.checks["the same outputs with CUDA graphs as without"].found
    assert defect.startswith("KeyError: 'programs' in test_selfcheck.py, line ")
    monkeypatch.setattr("mge_runtime.bench_subject.open_subject", lambda *_, **__: failing)
    monkeypatch.setattr("mge_runtime.bench_subject._SYNTHETIC", 1)
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--selfcheck", "--runs", "2"])
    assert result.exit_code == 1
    assert result.stdout.count("\nFAILED ") == 4


def test_an_interrupt_leaves_out_the_checks_that_follow(failing, frames):
    interrupt = Mock(side_effect=[None, None, KeyboardInterrupt])
    report = run_checks(failing, Images((), frames, "drawn"), runs=2, interrupt=interrupt)
    assert [check.outcome for check in report.checks.values()] == ["not run", "failed", *["not run"] * 4]
    assert report.to_text().startswith(
        "PARTIAL  it was interrupted during the same outputs with CUDA graphs as without; "
    )


def test_engines_that_do_not_fit_are_refused(on_cpu, monkeypatch):
    check = check_refused(on_cpu)
    assert check.outcome == "passed", check
    assert set(check.numbers) == {"another GPU", "another version", "another system"}
    assert on_cpu.machine.gpus or "a stand-in where there is no GPU" in check.found
    assert "is for sm87, this GPU is NVIDIA GeForce RTX 3060 (sm86)" in check.found
    assert "was built by tensorrt 9.9.9, " in check.found
    monkeypatch.setattr("mge_runtime.selfcheck.why_not", lambda *_: None)
    check = check_refused(on_cpu)
    assert check.outcome == "failed"
    assert "engines for another GPU are not refused" in check.found
