"""The command `mge-bench` on the CPU: what it reports, the time it takes, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime import bench, bench_subject
from mge_runtime.backends import choose
from mge_runtime.bench import NO_TIME
from mge_runtime.bench_report import BatchTimes
from mge_runtime.bundle import add_calibration
from mge_runtime.cli.bench import main
from mge_runtime.errors import BackendError
from mge_runtime.machine import Machine
from mge_runtime.pipeline import Pipeline


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Synthetic images of a few pixels, few runs and one fresh process: nobody reads the figures here."""
    for name, value in {"_HEIGHT": 96, "_WIDTH": 128}.items():
        monkeypatch.setattr(bench_subject, name, value)
    for name, value in {"_WARM_UP": 1, "_MOST_RUNS": 12, "_MOST_STARTS": 1}.items():
        monkeypatch.setattr(bench, name, value)


def run(engine, *arguments, seconds=60):
    options = ["--engine", str(engine), "--device", "cpu", "--threads", "1", "--seconds", str(seconds)]
    return CliRunner().invoke(main, [*options, *map(str, arguments)])


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_report_holds_every_measurement(bundle_path, tmp_path):
    out = tmp_path / "report.md"
    result = run(bundle_path, "--batch", "1,3", "--json", "--out", out)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    with Pipeline.open(bundle_path, "cpu", threads=1) as pipeline:
        size = pipeline.manifest.preprocess.size
        steps = list(pipeline.run_timed(np.zeros((1, size, size, 3), np.uint8)).times_ms)
    assert [batch["batch"] for batch in report["batches"]] == [1, 3]
    for batch in report["batches"]:
        rows = {row["name"]: row for row in batch["rows"]}
        file = "image file to prediction"
        assert list(rows) == [
            "chain",
            *(f"chain/{step}" for step in steps),
            file,
            f"{file}/decode",
            f"{file}/preprocess",
        ]
        for row in rows.values():
            assert len(row["runs_ms"]) == batch["runs"] == 12
            assert 0 < row["p50_ms"] <= row["p90_ms"] <= max(row["runs_ms"])
            assert row["p99_ms"] is None, "twelve runs have no 99th percentile"
            assert row["images_per_s"] == pytest.approx(batch["batch"] / row["p50_ms"] * 1e3)
        assert rows["chain"]["p50_ms"] > sum(rows[f"chain/{step}"]["p50_ms"] for step in steps) / 2
    assert (len(report["start_up_s"]), report["not_run"], report["interrupted"]) == (1, {}, None)
    if os.path.exists("/proc/self/status"):  # noqa: PTH110
        assert 20e6 < report["peak_bytes"][0] < 1e9
    assert (report["backend"], report["device"], report["threads"]) == ("onnxruntime", "cpu", 1)
    text = out.read_text()
    assert text.startswith("### mge-bench: tiny, 3 experts")
    assert str(bundle_path.parent) not in text, "a posted report names no folder"
    for wanted in ("batch 3, 12 runs", "process start to first prediction", "peak memory", "exit never", "synthetic"):
        assert wanted in text


def test_rare_percentiles_need_many_runs():
    values = np.random.default_rng(0).exponential(1, 100)
    (chain,) = BatchTimes(2, runs_ms=[{"chain": ms} for ms in values]).to_dict()["rows"]
    for key, percent in (("p50_ms", 50), ("p90_ms", 90), ("p99_ms", 99)):
        assert chain[key] == pytest.approx(np.percentile(values, percent))


def test_named_images_are_measured_in_turn_and_an_unreadable_one_is_passed_over(copy, tmp_path, monkeypatch):
    temperatures = dict.fromkeys(("mean_logits_1", "mean_logits_2", "logits"), 2.0)
    add_calibration(copy, {"version": 1, "temperatures": temperatures, "exits": None, "data": {}})
    for number in range(3):
        Image.new("RGB", (50, 60), (0, 80 * number, 0)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    seen = []
    predict = Pipeline.predict_batch
    monkeypatch.setattr(Pipeline, "predict_batch", lambda self, files: seen.append(list(files)) or predict(self, files))
    result = run(copy, tmp_path, "--batch", "2")
    assert result.exit_code == 0, result.output
    assert [[path.stem for path in files] for files in seen[:3]] == [["0", "1"], ["2", "0"], ["1", "2"]]
    assert "3 of 4 named images" in result.stdout
    assert "(exit never); the bundle is calibrated, exits are not taken" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "bad.jpg" in line


def test_a_batch_that_fails_takes_nothing_from_the_others(bundle_path, monkeypatch):
    run_timed = Pipeline.run_timed

    def fail(self, frames):
        if len(frames) == 2:
            raise BackendError("out of\nmemory")
        return run_timed(self, frames)

    monkeypatch.setattr(Pipeline, "run_timed", fail)
    result = run(bundle_path, "-b", "1,2", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [batch["batch"] for batch in report["batches"]] == [1]
    assert report["not_run"] == {"batch 2": "out of memory"}
    result = run(bundle_path, "-b", "2")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "error: out of memory")


def test_a_fresh_process_that_fails_says_why(bundle_path, monkeypatch):
    monkeypatch.setattr(bench, "_FRESH", "raise SystemExit('no such\\ndevice')")
    result = run(bundle_path)
    assert result.exit_code == 0, result.output
    assert "not run: start-up: a fresh process failed: device" in result.stdout


def test_everything_that_is_measured_is_opened_as_asked_for(bundle_path, tmp_path, monkeypatch):
    opened, open_pipeline, start = [], Pipeline.open, subprocess.run

    def open_watched(*arguments, **options):
        opened.append(options)
        return open_pipeline(*arguments, **options)

    def start_watched(command, **options):
        opened.append(json.loads(command[-2]))
        return start(command, **options)

    monkeypatch.setattr(Pipeline, "open", open_watched)
    monkeypatch.setattr(subprocess, "run", start_watched)
    Image.new("RGB", (5, 4)).save(tmp_path / "0.png")
    result = run(bundle_path, "--no-mmap", "--max-pixels", "20", tmp_path)
    assert result.exit_code == 0, result.output
    asked = {"threads": 1, "mmap": False, "max_pixels": 20}
    assert opened == [asked, asked]
    assert "process start to first prediction" in result.stdout


def test_engines_that_would_run_are_said_to_be_missing(bundle_path, monkeypatch, caplog):
    orin = Path(__file__).with_name("machines") / "jetson-agx-orin-jetpack-6.2.json"
    machine = Machine.from_json(orin.read_bytes())
    monkeypatch.setattr(bench_subject, "choose", partial(choose, machine=machine))
    subject = bench_subject.open_subject(bundle_path)
    assert subject.backend == "onnxruntime"
    subject.open().close()
    (record,) = caplog.records
    assert "not with tensorrt on cuda:0: no engines are ready for Orin (sm87) (the bundle has none)" in record.message


# --- the time it takes, and signals -------------------------------------------------------------------------------


def test_a_run_ends_in_its_time_and_lists_what_that_left_no_time_for(bundle_path, monkeypatch):
    """A chain that takes 2 s an image by the bench's own clock."""
    now = 1000.0
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now))
    run_timed = Pipeline.run_timed

    def slowly(self, frames):
        nonlocal now
        now += 2.0 * len(frames)
        return run_timed(self, frames)

    monkeypatch.setattr(Pipeline, "run_timed", slowly)
    result = run(bundle_path, "-b", "1,2,64", "--json", seconds=100)
    assert result.exit_code == 0, result.output
    assert now - 1000 <= 100 + 2 * 64, "soft to within one measurement"
    assert result.stderr.splitlines()[0] == "this takes 100 s at most; --seconds names another time"
    report = json.loads(result.stdout)
    assert report["interrupted"] is None
    assert [batch["batch"] for batch in report["batches"]] == [1, 2]
    assert report["not_run"] == {"batch 64": NO_TIME, "start-up": NO_TIME}


# Says "ran" after each run; the runs would go on for minutes.
STOPPED = """
import sys, time
from mge_runtime import bench, bench_subject
from mge_runtime.cli.bench import main
from mge_runtime.pipeline import Pipeline
bench._WARM_UP, bench_subject._SYNTHETIC = 1, 1
run_timed = Pipeline.run_timed
def slowly(self, frames):
    result = run_timed(self, frames)
    time.sleep(0.03)
    print("ran", file=sys.stderr, flush=True)
    return result
Pipeline.run_timed = slowly
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_run_that_is_stopped_writes_what_it_has(bundle_path, tmp_path, number):
    out = tmp_path / "report.txt"
    arguments = ["--engine", str(bundle_path), "--device", "cpu", "--threads", "1", "--json", "--out", str(out)]
    command = [sys.executable, "-c", STOPPED, *arguments, "--seconds", "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ran = 0
        for line in process.stderr:
            ran += line == "ran\n"
            if ran == 10:
                break
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    consequence = "the report is of what was measured before"
    assert stderr.splitlines()[-1] == f"error: the bench was interrupted ({number.name}): {consequence}"
    assert "Traceback" not in stderr
    report = json.loads(stdout)
    assert report["interrupted"] == "batch 1"
    (batch,) = report["batches"]
    assert batch["runs"] >= 1
    assert {len(row["runs_ms"]) for row in batch["rows"]} == {batch["runs"]}
    assert out.read_text().startswith("PARTIAL  it was interrupted during batch 1; what was found before is here\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]


def test_a_report_is_written_though_nobody_reads_what_is_printed(bundle_path, tmp_path):
    out = tmp_path / "report.txt"
    code = "from mge_runtime.cli.bench import main; main()"
    arguments = ["--engine", str(bundle_path), "--device", "cpu", "--seconds", "1", "--out", str(out)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert out.read_text().startswith("date ")


# --- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        *(("--seconds", text, "Invalid value for '--seconds'") for text in ("0", "nan", "1e3", "86401", "9" * 401, "")),
        ("--runs", "1", "Invalid value for '--runs'"),
        ("--runs", "9", "without --selfcheck nothing is checked, so it cannot use --runs; leave that out"),
        ("--selfcheck", "--no-mmap", "--selfcheck measures no speed, so it cannot use --seconds"),
        *(("--batch", text, "is no batch size") for text in ("0", "1,x", "-1", "", "1,,2", "5000", "9" * 5000)),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(bundle_path, option, value, said):
    result = run(bundle_path, option, value)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bad.jpg"], "bad.jpg"),
        (["missing.jpg"], "missing.jpg"),
        (["20.png", "--max-pixels", "19"], "expected at most 1.9e-05 megapixels"),
        (["--device", "cuda:99"], "cuda"),
        (["--engine", "missing.plan"], "missing.plan"),
    ],
)
def test_errors_are_one_line(bundle_path, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    Image.new("RGB", (5, 4)).save(tmp_path / "20.png")
    result = run(bundle_path, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said in line


def test_a_batch_above_what_engines_were_built_for_is_refused_before_anything_is_measured(bundle_path, monkeypatch):
    opened = Pipeline.open

    def as_engines(*arguments, **options):
        pipeline = opened(*arguments, **options)
        pipeline.max_batch = 2
        return pipeline

    monkeypatch.setattr(Pipeline, "open", as_engines)
    monkeypatch.setattr(Pipeline, "run_timed", lambda *_: pytest.fail("something was measured"))
    result = run(bundle_path, "--batch", "1,3")
    assert result.exit_code == 1
    assert "error: asked to measure batches of 3; the engines were built for at most 2" in result.stderr


@pytest.mark.parametrize("selfcheck", [[], ["--selfcheck"]])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(bundle_path, tmp_path, selfcheck):
    out = tmp_path / "missing" / "report.md"
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--out", str(out), *selfcheck])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: cannot write {out}: No such file or directory; expected a writable folder, name another place"
    ]
