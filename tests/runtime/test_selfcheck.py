"""The self-check's report, and what it says of engines."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bundle import add_engine
from mge_runtime.cli.bench import main
from mge_runtime.errors import BackendError
from mge_runtime.machine import Gpu
from mge_runtime.selfcheck.engines import check_attested, check_refused
from mge_runtime.selfcheck.memory import host_memory
from mge_runtime.selfcheck.pictures import Frames
from mge_runtime.selfcheck.run import run_checks
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.target import BatchRange

onnxruntime = load_onnxruntime()


@pytest.fixture
def with_engines(on_cpu, tmp_path):
    """Make a subject whose bundle holds the descriptions of engines."""

    def make(precision, *, gpu=None, options=None):
        path = tmp_path / "mge.plan"
        shutil.copyfile(on_cpu.path, path)
        details = EngineDetails("1.7.1", gpu, BatchRange(), precision, options or {}, "mge test")
        plans = {graph.name: b"bytes" for graph in on_cpu.manifest.graphs}
        target = "tensorrt-rtx-1.7-sm86-linux-x86_64"
        add_engine(path, target, plans, details.to_dict(), manifest_sha256=on_cpu.manifest_sha256)
        return replace(on_cpu, path=path)

    return make


def failed(check, text):
    assert check.outcome == "failed", check
    assert text in check.found
    return True


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_command_reports_on_the_cpu(bundle_path, tmp_path):
    out = tmp_path / "report.md"
    arguments = ["--engine", str(bundle_path), "--selfcheck", "--device", "cpu", "--runs", "20", "--threads", "1"]
    # A process of its own: what the tests before left behind moves the memory that is measured.
    command = [sys.executable, "-c", "from mge_runtime.cli.bench import main; main()", *arguments, "--json"]
    result = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    outcomes = {check["name"]: check["outcome"] for check in report["checks"]}
    assert outcomes == {
        "the same answers as ONNX Runtime on the CPU": "not run",
        "the same answers in batches of 1 and 8": "passed",
        "the same answers with CUDA graphs as without": "not run",
        "one copy in, one out for each wanted tensor": "not run",
        "no copy to or from the host between graphs": "not run",
        "two pipelines in one process answer as one alone": "passed",
        "engines that do not fit are refused": "passed",
        "the precision of every engine is attested": "not run",
        "no memory grows over 20 runs": "passed" if host_memory() else "not run",
    }
    assert all(check["found"] for check in report["checks"])
    assert report["verdict"].startswith("4 passed, 0 failed, ")
    assert (report["backend"], report["device"], report["bundle"]) == ("onnxruntime", "cpu", "mge.plan")
    assert report["machine"]["libraries"]["onnxruntime"] == onnxruntime.__version__
    assert "drawn" in report["images"]
    text = out.read_text()
    assert text.startswith(f"### mge-bench --selfcheck: {report['verdict']}")
    assert str(bundle_path.parent) not in text + result.stdout, "a posted report names no folder"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.replace(r"\|", "").count("|") in (3, 5) for row in rows)


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
        (["--selfcheck", "--seconds", "9", "-b", "2"], 2, "measures no speed, so it cannot use --batch, --seconds"),
        (["--runs", "5"], 2, "without --selfcheck nothing is checked, so it cannot use --runs"),
        (["--selfcheck", "--engine", "missing.plan"], 1, "error: no bundle at missing.plan"),
        (["--selfcheck", "--engine", "missing.plan", "no.jpg", "nowhere/*.jpg"], 1, "error: "),
    ],
)
def test_what_cannot_be_checked_is_said_before_anything_runs(arguments, code, said):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code
    assert said in result.stderr


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom mge_runtime.cli.bench import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "assert not {'numpy', 'PIL', 'onnxruntime', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


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
    outcomes = [check.outcome for check in report.checks]
    assert outcomes.count("failed") == 6
    assert report.failed
    assert report.checks[1].found == "the GPU is on fire"
    assert (
        report.checks[2].found
        == "KeyError: 'programs' in test_selfcheck.py, line " + report.checks[2].found.split()[-1]
    )
    assert "FAILED" in report.to_text()
    assert "**failed**" in report.to_markdown()
    monkeypatch.setattr("mge_runtime.selfcheck.subject.open_subject", lambda *_, **__: broken)
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--selfcheck", "--runs", "2"])
    assert result.exit_code == 1
    assert "6 failed" in result.stdout


# --- engines ------------------------------------------------------------------------------------------------------


def test_engines_that_do_not_fit_are_refused_and_the_bundle_stays_as_it_was(on_cpu):
    before = on_cpu.path.read_bytes()
    check = check_refused(on_cpu)
    assert check.outcome == "passed", check
    assert set(check.numbers) == {"another GPU", "another version", "another operating system"}
    assert all("mge-build mge.plan" in line for line in check.numbers.values())
    assert on_cpu.machine.gpus or "there is no GPU here" in check.found
    assert "is for sm87, this GPU is NVIDIA GeForce RTX 3060 (sm86)" in check.found
    assert on_cpu.path.read_bytes() == before


def test_engines_that_are_not_refused_fail(on_cpu, monkeypatch):
    monkeypatch.setattr("mge_runtime.trt.engines.why_not", lambda *_: None)
    assert failed(check_refused(on_cpu), "engines for another GPU: not refused")


def test_engines_that_are_read_before_they_are_refused_fail(on_cpu, monkeypatch):
    def reading(choice, _):
        choice.engines.plan("expert_3")
        raise BackendError("TensorRT does not accept its engine")

    monkeypatch.setattr("mge_runtime.selfcheck.engines.open_backend", reading)
    assert failed(check_refused(on_cpu), "not refused")


def test_precision_is_attested_for_every_graph(on_cpu, with_engines):
    graphs = [graph.name for graph in on_cpu.manifest.graphs]
    good = {name: {"type": "fp32", "attested": "network"} for name in graphs}
    check = check_attested(with_engines(good))
    assert (check.outcome, check.numbers) == (
        "passed",
        {"tensorrt-rtx-1.7-sm86-linux-x86_64": {"engine": 0, "network": len(graphs)}},
    )
    assert failed(
        check_attested(with_engines({**good, "expert_3": {"type": "fp32"}})), "graph expert_3 is attested by None"
    )
    wrong = {**good, "expert_3": {"type": "fp16", "attested": "network"}}
    assert failed(check_attested(with_engines(wrong)), "graph expert_3 is recorded as fp16; the bundle says fp32")
    missing = {name: good[name] for name in graphs[1:]}
    assert failed(check_attested(with_engines(missing)), f"graph {graphs[0]} has no record")
    gpu = Gpu("NVIDIA GeForce RTX 3060", "sm86", 12 * 2**30, 28)
    assert failed(check_attested(with_engines(good, gpu=gpu)), "inspector was not asked")
    asked = {"scratch": dict.fromkeys(graphs, 0)}
    assert check_attested(with_engines(good, gpu=gpu, options=asked)).outcome == "passed"
