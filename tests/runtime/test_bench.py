"""The command `mge-bench` on the CPU: what it reports, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bench import deadline, fresh, inputs, measure, pipelined, rounds, run, toolchain
from mge_runtime.bench.deadline import NO_TIME, Deadline
from mge_runtime.bench.report import BenchReport
from mge_runtime.bench.run import run_bench
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.cli.bench import main
from mge_runtime.errors import BackendError, CheckpointError
from mge_runtime.pipeline import Pipeline

onnxruntime = load_onnxruntime()


@pytest.fixture(scope="module")
def quick(bundle_path, tmp_path_factory):
    """One quick run over two batch sizes: its JSON, its Markdown and its results."""
    out = tmp_path_factory.mktemp("report") / "report.md"
    arguments = [
        "--engine",
        str(bundle_path),
        "--device",
        "cpu",
        "--threads",
        "1",
        "--batch",
        "1,3",
        "--iterations",
        "12",
    ]
    arguments += ["--images", "5", "--warmup", "2", "--json", "--out", str(out)]
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "_MOST_ROUNDS", 1)
        patch.setattr(inputs, "_HEIGHT", 96)
        patch.setattr(inputs, "_WIDTH", 128)
        patch.setattr(run, "run_bench", lambda *given: kept.append(run_bench(*given)) or kept[-1])
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), out.read_text(), kept[0]


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_report_holds_every_measurement(quick, bundle_path):
    report = quick[0]
    assert [batch["batch"] for batch in report["batches"]] == [1, 3]
    for batch in report["batches"]:
        rows = {row["name"]: row for row in batch["rows"]}
        names = ["chain, compute alone", "JPEG to Prediction"]
        assert list(rows) == names
        for row in rows.values():
            times = row["times"]
            assert times["count"] == sum(map(len, row["rounds_ms"])) == batch["rounds"] * batch["runs"] >= 12
            assert 0 < times["least"] <= times["p50"] <= times["p90"] <= times["most"]
            assert times["p99"] is None, "twelve runs have no 99th percentile"
            assert row["images_per_s"] == pytest.approx(batch["batch"] / times["p50"] * 1e3)
        steps = {step["name"]: step for step in batch["steps"]}
        assert list(steps)[:-1] == ["expert_1", "expert_2", "expert_3"]
        for step in steps.values():
            times = step["times"]
            assert times["count"] == batch["rounds"] * batch["runs"]
            assert times["least"] <= times["p50"] <= times["p90"] <= times["most"]
        assert [ratio["name"] for ratio in batch["ratios"]] == [
            "JPEG to Prediction, not pipelined / chain",
        ]
        assert all(len(ratio["rounds"]) == batch["rounds"] for ratio in batch["ratios"])
        assert "nothing is copied" in batch["copies"]
    assert report["pipelined"]["images"] == 5
    assert len(report["pipelined"]["files_s"]) == len(report["pipelined"]["ratio"]["rounds"]) == 3
    starts = report["fresh"]
    assert len(starts["bundle"]) == len(starts["files"]) >= 1
    medians = [np.median([start["seconds"] for start in starts[key]]) for key in ("bundle", "files")]
    assert starts["start_ratio_of_medians"] == pytest.approx(medians[0] / medians[1])
    assert len(starts["start_ratio"]["rounds"]) == len(starts["files"])
    for section in (report["pipelined"], starts):
        assert section["noise"]["load"]
    with Bundle.open(bundle_path) as bundle:
        assert report["bundle"]["manifest_sha256"] == bundle.manifest_sha256
    assert (report["backend"], report["device"], report["threads"]) == ("onnxruntime", "cpu", 1)
    assert report["library"] == onnxruntime.__version__
    assert report["machine"]["libraries"]["onnxruntime"] == onnxruntime.__version__
    assert {"eager PyTorch, torch.compile"} <= {item["name"] for item in report["not_run"]}


def test_a_fresh_process_tells_its_own_peak(quick):
    peaks = [start["peak"] for start in quick[0]["fresh"]["bundle"]]
    if not os.path.exists("/proc/self/status"):  # noqa: PTH110
        assert peaks[0] is None
    else:
        assert all(20e6 < peak < 1e9 for peak in peaks)


def test_the_markdown_can_be_posted(quick, bundle_path):
    text = quick[1]
    assert text.startswith("### mge-bench: tiny, onnxruntime on cpu")
    assert str(bundle_path.parent) not in text, "a posted report names no folder"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.replace(r"\|", "").count("|") for row in rows} <= {3, 4, 5, 6}
    for wanted in ("p99 needs 100 runs", "exit never", "peak memory", "not run", "drawn"):
        assert wanted.lower() in text.lower()


def test_what_cannot_be_measured_is_listed_and_a_calibration_is_not_followed(copy, tmp_path, monkeypatch):
    """No fresh processes: the rest is measured all the same."""

    monkeypatch.setattr(run, "measure_fresh", unavailable)
    temperatures = {"mean_logits_1": 2.0, "mean_logits_2": 2.0, "logits": 2.0}
    add_calibration(copy, {"version": 1, "temperatures": temperatures, "exits": None, "data": {}})
    picture = tmp_path / "bird.jpg"
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(picture)
    arguments = ["--engine", str(copy), "--device", "cpu", "--threads", "1", "--iterations", "5"]
    result = CliRunner().invoke(main, [*arguments, "--images", "4", str(picture)])
    assert result.exit_code == 0, result.output
    assert "bare trunks: no graph of mge.plan has a trunk that can be told from its weights' names" in result.stdout
    assert "(exit never); the bundle is calibrated, exits are not taken" in result.stdout
    assert "1 named images" in result.stdout
    assert "chain / " not in result.stdout
    assert "process start to first answer, peak memory: this device has none" in result.stdout
    assert "share of the device's matrix rate: this device has none" in result.stdout


# --- the time it takes, and signals -------------------------------------------------------------------------------


def unavailable(*_given, **_options):
    raise BackendError("this device\nhas none")


class Clock:
    """Stands in for `time` in the bench: nobody waits for what the chain takes; a look at the clock takes 1 ms."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        self.now += 1e-3
        return self.now


@pytest.fixture
def slow(monkeypatch):
    """A chain that takes 2 s a picture by the bench's own clock."""
    clock = Clock()
    for module in (deadline, rounds, pipelined):
        monkeypatch.setattr(module, "time", clock)
    timed = rounds.timed
    for module in (rounds, measure):
        monkeypatch.setattr(module, "timed", lambda contender, _clock=None: timed(contender, clock.perf_counter))
    run_timed = Pipeline.run_timed

    def slowly(self, frames, **options):
        clock.now += 2.0 * len(frames)
        return run_timed(self, frames, **options)

    monkeypatch.setattr(Pipeline, "run_timed", slowly)
    monkeypatch.setattr(run, "measure_fresh", lambda *_: None)
    monkeypatch.setattr(run, "find_meter", lambda _: "not asked")
    monkeypatch.setattr(inputs, "_HEIGHT", 96)
    monkeypatch.setattr(inputs, "_WIDTH", 128)
    return clock


@pytest.mark.parametrize("options", [[], ["--iterations", "1000", "--images", "1000", "--warmup", "1000"]])
def test_a_run_keeps_to_its_time_and_lists_what_that_left_no_time_for(bundle_path, slow, options):
    arguments = ["--engine", str(bundle_path), "--device", "cpu", "--threads", "1", "--seconds", "100", "-b", "1,2,64"]
    result = CliRunner().invoke(main, [*arguments, *options, "--json"])
    assert result.exit_code == 0, result.output
    assert slow.now - 1000 <= 100 + 2 * 64, "soft to within one measurement"
    assert result.stderr.splitlines()[0] == "this takes 100 s at most; --seconds names another time"
    report = json.loads(result.stdout)
    assert report["interrupted"] is None
    assert [batch["batch"] for batch in report["batches"]] == [1, 2]
    assert {"name": "batch 64", "reason": NO_TIME, "command": None} in report["not_run"]


def test_pytorch_is_left_out_where_it_does_not_open_in_time(bundle_path, monkeypatch):
    """A compiler asks nobody whether to go on."""

    def make(*_given):
        yield SimpleNamespace(name="eager")
        time.sleep(30)

    monkeypatch.setattr(toolchain, "_imported", lambda _: SimpleNamespace(eager_contenders=make))
    begin = time.perf_counter()
    found, missing = toolchain.eager_contenders(bundle_path, np.zeros((1, 32, 32, 3)), 1, "cpu", Deadline.after(0.2))
    assert time.perf_counter() - begin < 10
    assert ([way.name for way in found], list(missing.values())) == (["eager"], [NO_TIME])


# Says "begun" when the first round is over; a round takes 0.1 s, and there are a million of them.
STOPPED = """
import sys, time
from mge_runtime.bench import inputs, run
from mge_runtime.bench.contenders import ChainContender
from mge_runtime.cli.bench import main
inputs._HEIGHT, inputs._WIDTH = 96, 128
run.measure_fresh = lambda *given: None
runs = ChainContender.run
def slowly(self):
    runs(self)
    time.sleep(0.03)
    print("ran", file=sys.stderr, flush=True)
ChainContender.run = slowly
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_run_that_is_stopped_writes_what_it_has(bundle_path, tmp_path, number):
    out = tmp_path / "report.md"
    arguments = ["--engine", str(bundle_path), "--device", "cpu", "--threads", "1", "--json", "--out", str(out)]
    arguments += ["--iterations", "1000000", "--warmup", "1"]
    command = [sys.executable, "-c", STOPPED, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ran = 0
        for line in process.stderr:
            ran += line == "ran\n"
            if ran == 30:
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
    assert batch["rounds"] >= 1
    assert {row["times"]["count"] for row in batch["rows"]} == {batch["rounds"] * batch["runs"]}
    assert "| PARTIAL | it was interrupted during batch 1; what was measured before is here |" in out.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_a_batch_that_fails_takes_nothing_from_the_others(bundle_path, quick, monkeypatch):
    def measured(_pipeline, _pictures, batch, *, keep, **_options):
        if batch == 2:
            raise BackendError("out of memory")
        keep(quick[2].batches[0])

    monkeypatch.setattr(run, "measure_batch", measured)
    for name in ("measure_fresh", "measure_pipelined"):
        monkeypatch.setattr(run, name, unavailable)
    arguments = ["--engine", str(bundle_path), "--device", "cpu", "--seconds", "600", "--json"]
    result = CliRunner().invoke(main, [*arguments, "-b", "1,2"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [batch["batch"] for batch in report["batches"]] == [1]
    assert {"name": "batch 2", "reason": "out of memory", "command": None} in report["not_run"]
    result = CliRunner().invoke(main, [*arguments, "-b", "2"])
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "error: out of memory")


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


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e3", "86401", "9" * 401, ""])
def test_seconds_are_a_number_of_them(bundle_path, seconds):
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--seconds", seconds])
    assert result.exit_code == 2
    assert "Invalid value for '--seconds'" in result.stderr


# --- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["0", "1,x", "-1", "", "1,,2", "5000", "1,8,1e9", "9" * 5000])
def test_an_unknown_batch_size_is_a_usage_error(bundle_path, batch):
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--batch", batch])
    assert result.exit_code == 2
    assert "is no batch size" in result.stderr


def test_errors_are_one_line(bundle_path, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    for arguments, text in (
        ([str(bad)], "bad.jpg"),
        ([str(tmp_path / "missing.jpg")], "missing.jpg"),
        (["--device", "cuda:99"], "cuda"),
        (["--ckpt", str(tmp_path / "missing.pt")], "missing.pt" if find_spec("torch") else "--ckpt needs PyTorch"),
    ):
        result = CliRunner().invoke(main, ["--engine", str(bundle_path), *arguments])
        assert result.exit_code == 1, result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert text in line


def test_a_batch_above_what_engines_were_built_for_is_refused():
    from mge_runtime.bench.run import _check_batches

    _check_batches((1, 8), 8)
    _check_batches((1, 99), None)
    with pytest.raises(BackendError, match="batches of 9; the engines were built for at most 8"):
        _check_batches((1, 9), 8)


def test_a_checkpoint_of_another_model_is_refused(bundle_path, tmp_path, monkeypatch):
    """The toolchain's reader stands in as an object with a config; the comparison is the runtime's own."""
    with Bundle.open(bundle_path) as bundle:
        manifest = bundle.manifest
    costly = {"parts_per_class": 10, "gate_width": 512, "normalize_features": False, "attention_head": "own"}
    manifest = replace(manifest, model={**manifest.model, **costly})
    right = costly | {
        "arch": "tiny",
        "image_size": manifest.preprocess.size,
        "experts": 3,
        "num_classes": 5,
        "classes": manifest.class_names,
    }
    ckpt = tmp_path / "best.pt"
    ckpt.write_bytes(b"weights")

    def check(**changes):
        config = SimpleNamespace(**(right | changes))
        reader = SimpleNamespace(load_checkpoint=lambda _: SimpleNamespace(config=config))
        monkeypatch.setattr(toolchain, "_imported", lambda _: reader)
        toolchain.check_checkpoint(ckpt, manifest)

    check()
    for changes, text in (
        ({"arch": "resnet50"}, "another trunk: resnet50, not tiny"),
        ({"image_size": 64}, "pixels: 64, not 32"),
        ({"num_classes": 6, "classes": tuple("abcdef")}, "number of classes: 6, not 5"),
        ({"classes": tuple("abcde")}, "another list of classes;"),
        ({"parts_per_class": 4}, "parts_per_class in its config: 4, not 10"),
        ({"gate_width": 64}, "gate_width in its config: 64, not 512"),
        ({"normalize_features": True}, "normalize_features in its config: True, not False"),
        ({"attention_head": "first"}, "attention_head in its config: first, not own"),
    ):
        with pytest.raises(CheckpointError, match=text):
            check(**changes)


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from mge_runtime.cli.bench import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "numpy", "PIL", "onnxruntime", "mge"} & set(out.splitlines()[-1].split())


def test_each_noisy_section_warns_in_one_line(quick):
    results = quick[2]

    def with_warnings(batch, pipelined, fresh_ones):
        def noisy(section, warning):
            return replace(section, noise=replace(section.noise, warning=warning))

        return BenchReport(
            replace(
                results,
                batches=[results.batches[0], noisy(results.batches[1], batch)],
                pipelined=noisy(results.pipelined, pipelined),
                fresh=noisy(results.fresh, fresh_ones),
            )
        )

    results = replace(results, batches=[replace(b, noise=replace(b.noise, warning=None)) for b in results.batches])
    quiet = with_warnings(None, None, None)
    assert quiet.warnings == json.loads(quiet.to_json())["warnings"] == []
    assert "WARNING" not in quiet.to_text()
    noisy = with_warnings("too loud", "too wild", "too busy")
    assert noisy.warnings == ["batch 3: too loud", "pipelined: too wild", "fresh processes: too busy"]
    for warning in noisy.warnings:
        assert f"**{warning}**" in noisy.to_markdown()
        assert f"WARNING: {warning}" in noisy.to_text().splitlines()


@pytest.mark.parametrize("selfcheck", [[], ["--selfcheck"]])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(bundle_path, tmp_path, selfcheck):
    out = tmp_path / "missing" / "report.md"
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--out", str(out), *selfcheck])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: cannot write {out}: No such file or directory; expected a writable folder, name another place"
    ]


def test_a_batch_too_large_is_refused_before_processes_are_started(bundle_path, monkeypatch):
    monkeypatch.setattr(run, "measure_fresh", lambda *_: pytest.fail("processes were started"))
    check = run._check_batches
    monkeypatch.setattr(run, "_check_batches", lambda batches, _most: check(batches, 2))  # as if engines ran it
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--device", "cpu", "--batch", "1,3"])
    assert "error: asked to measure batches of 3; the engines were built for at most 2" in result.stderr
