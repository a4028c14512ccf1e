"""The self-check's report, and engines that do not fit."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.cli.bench import main
from mge_runtime.errors import BackendError
from mge_runtime.selfcheck import Frames, check_refused, run_checks
from mge_runtime.selfcheck.memory import host_memory

onnxruntime = load_onnxruntime()


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_command_reports_on_the_cpu(bundle_path, tmp_path):
    out = tmp_path / "report.md"
    arguments = ["--engine", str(bundle_path), "--selfcheck", "--device", "cpu", "--runs", "20", "--threads", "1"]
    # A process of its own: what the tests before left behind moves the memory that is measured.
    command = [sys.executable, "-c", "from mge_runtime.cli.bench import main; main()", *arguments, "--json"]
    result = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    outcomes = {name: check["outcome"] for name, check in report["checks"].items()}
    assert outcomes == {
        "the same outputs as ONNX Runtime on the CPU": "not run",
        "the same outputs in batches": "passed",
        "the same outputs with CUDA graphs as without": "not run",
        "one copy in, one out for each wanted tensor": "not run",
        "the same outputs from two pipelines at once": "passed",
        "engines that do not fit are refused": "passed",
        "no memory grows": "passed" if host_memory() else "not run",
    }
    assert all(check["found"] for check in report["checks"].values())
    assert report["verdict"].startswith("4 passed, 0 failed, ")
    assert (report["backend"], report["device"], report["bundle"]) == ("onnxruntime", "cpu", "mge.plan")
    assert report["machine"]["libraries"]["onnxruntime"] == onnxruntime.__version__
    assert "drawn" in report["images"]
    text = out.read_text()
    assert text.startswith(f"### mge-bench --selfcheck: {report['verdict']}")
    assert str(bundle_path.parent) not in text + result.stdout, "a posted report names no folder"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.replace(r"\|", "").count("|") in (3, 4) for row in rows)


def test_photographs_are_named_and_a_bad_one_is_passed_over_as_in_measuring(bundle_path, tmp_path):
    for number, picture in enumerate(np.random.default_rng(0).integers(0, 256, (3, 50, 60, 3), np.uint8)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    arguments = ["--engine", str(bundle_path), "--selfcheck", "--device", "cpu", "--runs", "2", "--threads", "1"]
    result = CliRunner().invoke(main, [*arguments, str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "images   3 named images" in result.stdout
    (tmp_path / "bad.png").write_bytes(b"no picture")
    result = CliRunner().invoke(main, [*arguments, str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "images   3 of 4 named images" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "bad.png" in line
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "bad.png")])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"{line}\n")
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "0.png"), "--max-pixels", "10"])
    assert result.exit_code == 1
    assert "expected at most 1e-05 megapixels" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--selfcheck", "--runs", "1"], 2, "--runs"),
        (["--selfcheck", "--engine", "missing.plan"], 1, "error: no bundle at missing.plan"),
        (["--selfcheck", "--engine", "missing.plan", "no.jpg", "nowhere/*.jpg"], 1, "error: "),
    ],
)
def test_what_cannot_be_checked_is_said_before_anything_runs(arguments, code, said):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code
    assert said in result.stderr


def test_a_failed_check_is_reported_the_others_go_on_and_the_exit_code_is_1(bundle_path, on_cpu, frames, monkeypatch):
    class Failing:
        max_batch = None

        def run(self, *_, **__):
            raise BackendError("the GPU\nis on fire")

        def report(self):
            raise KeyError("programs")

        def close(self):
            pass

    broken = replace(on_cpu, open=lambda _: Failing())
    report = run_checks(broken, Frames(frames, "drawn"), runs=2)
    assert report.verdict == "1 passed, 5 failed, 1 not run"
    assert report.failed
    assert report.checks["the same outputs in batches"].found == "the GPU is on fire"
    defect = report.checks["the same outputs with CUDA graphs as without"].found
    assert defect.startswith("KeyError: 'programs' in test_selfcheck.py, line ")
    assert "FAILED" in report.to_text()
    assert "**failed**" in report.to_markdown()
    monkeypatch.setattr("mge_runtime.selfcheck.open_subject", lambda *_, **__: broken)
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--selfcheck", "--runs", "2"])
    assert result.exit_code == 1
    assert "5 failed" in result.stdout


# --- engines ------------------------------------------------------------------------------------------------------


def test_engines_that_do_not_fit_are_refused_and_the_bundle_stays_as_it_was(on_cpu):
    before = on_cpu.path.read_bytes()
    check = check_refused(on_cpu)
    assert check.outcome == "passed", check
    assert set(check.numbers) == {"another GPU", "another version", "another system"}
    assert on_cpu.machine.gpus or "a stand-in where there is no GPU" in check.found
    assert "is for sm87, this GPU is NVIDIA GeForce RTX 3060 (sm86)" in check.found
    assert on_cpu.path.read_bytes() == before


def test_engines_that_are_not_refused_fail(on_cpu, monkeypatch):
    monkeypatch.setattr("mge_runtime.trt.engines.why_not", lambda *_: None)
    check = check_refused(on_cpu)
    assert check.outcome == "failed"
    assert "engines for another GPU are not refused" in check.found
