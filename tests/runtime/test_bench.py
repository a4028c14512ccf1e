"""`mge-bench` on the CPU: what it reports, what it refuses, and that its arithmetic is right."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime.backends.onnxruntime_cuda import open_ort_chain
from mge_runtime.bench import fresh, noise, run, toolchain
from mge_runtime.bench.contenders import PartsContender
from mge_runtime.bench.energy import find_meter, measure_energy
from mge_runtime.bench.inputs import drawn_inputs
from mge_runtime.bench.measure import _steps, measure_batch
from mge_runtime.bench.noise import Watch
from mge_runtime.bench.parts import HeadBundle, TrunkBundle, TrunkChainBundle
from mge_runtime.bench.pipelined import measure_pipelined
from mge_runtime.bench.report import BenchReport
from mge_runtime.bench.report_tables import _batch, _numbers
from mge_runtime.bench.rounds import Plan, Series, Stepped, interleave, plan_rounds, warm_up
from mge_runtime.bench.run import run_bench
from mge_runtime.bench.shares import derived_shares
from mge_runtime.bench.stats import Percentiles, Ratio, median_interval, percentile
from mge_runtime.bundle import Bundle, add_calibration, write_bundle
from mge_runtime.cache import cache_folder
from mge_runtime.cli.bench import main
from mge_runtime.device.host import HostDevice
from mge_runtime.errors import BackendError, CheckpointError, OutputError
from mge_runtime.pipeline import Pipeline


def make_trunked(tiny, path):
    """The tiny chain with its convolutions named as those of a trunk, so that they can be cut out."""
    graphs = tiny.make_stages()
    for graph in graphs:
        for tensor in graph.initializers:
            tensor.name = tensor.name.replace("conv.weight", "expert.trunk.layers.conv.weight")
        for node in graph.nodes:
            node.input[:] = [name.replace("conv.weight", "expert.trunk.layers.conv.weight") for name in node.input]
    write_bundle(path, tiny.make_manifest(graphs), {g.spec.name: g.model() for g in graphs})
    return path


@pytest.fixture(scope="module")
def trunked(tiny, tmp_path_factory):
    return make_trunked(tiny, tmp_path_factory.mktemp("trunked") / "mge.plan")


@pytest.fixture(scope="module")
def quick(trunked, tmp_path_factory):
    """One quick run over two batch sizes: its JSON, its Markdown and its results."""
    out = tmp_path_factory.mktemp("report") / "report.md"
    arguments = ["--engine", str(trunked), "--device", "cpu", "--threads", "1", "--batch", "1,3", "--iterations", "12"]
    arguments += ["--images", "5", "--warmup", "2", "--quick", "--json", "--out", str(out)]
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_bench", lambda *given: kept.append(run_bench(*given)) or kept[-1])
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), out.read_text(), kept[0]


class Fake(Stepped):
    """Writes down when it ran; each run takes a millisecond of the clock below."""

    unit = "ms"

    def __init__(self, name, log, ms=1.0):
        self.name, self.log, self.ms = name, log, ms
        self.steps_ms = {}

    def run(self):
        self.log.append(self.name)
        self.steps_ms = {"step": self.ms}

    def close(self):
        pass


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_report_holds_every_measurement(quick, trunked):
    report = quick[0]
    assert [batch["batch"] for batch in report["batches"]] == [1, 3]
    for batch in report["batches"]:
        rows = {row["name"]: row for row in batch["rows"]}
        names = ["chain, compute alone", "3 bare trunks", "experts up to their logits", "JPEG to Prediction"]
        assert list(rows) == names
        assert batch["trunk_convolutions"] == {"expert_1": 1, "expert_2": 1, "expert_3": 1}
        for row in rows.values():
            times = row["times"]
            assert times["count"] == sum(map(len, row["rounds_ms"])) == batch["rounds"] * batch["runs"] >= 12
            assert 0 < times["least"] <= times["p50"] <= times["p90"] <= times["most"]
            assert times["p99"] is None, "twelve runs have no 99th percentile"
            assert row["images_per_s"] == pytest.approx(batch["batch"] / times["p50"] * 1e3)
        steps = {step["name"]: step for step in batch["steps"]}
        assert list(steps)[:-1] == ["ingest", "expert_1", "expert_2", "expert_3", "gate", "mixture"]
        assert [ratio["name"] for ratio in batch["ratios"]] == [
            "chain / 3 bare trunks",
            "JPEG to Prediction, not pipelined / chain",
        ]
        assert all(len(ratio["rounds"]) == batch["rounds"] for ratio in batch["ratios"])
        assert "nothing is copied" in batch["copies"]
    assert report["pipelined"]["images"] == 5
    assert len(report["pipelined"]["files_s"]) == len(report["pipelined"]["ratio"]["rounds"]) == 3
    starts = report["fresh"]
    assert len(starts["first"]) == len(starts["later"]) == len(starts["files"]) >= 3
    for way, key in (("first_start", "first"), ("later_starts", "later")):
        medians = [np.median([start["seconds"] for start in starts[k]]) for k in (key, "files")]
        assert starts[f"{way}_ratio_of_medians"] == pytest.approx(medians[0] / medians[1])
        assert len(starts[f"{way}_ratio"]["rounds"]) == len(starts["files"])
    for section in (report["pipelined"], starts):
        assert section["noise"]["load"]
    with Bundle.open(trunked) as bundle:
        assert report["bundle"]["manifest_sha256"] == bundle.manifest_sha256
    assert report["memory"]["weights_fp32"] > report["memory"]["weights_stored"], "stored in half and INT8"
    assert (report["backend"], report["device"], report["threads"]) == ("onnxruntime", "cpu", 1)
    assert report["library"] == onnxruntime.__version__
    assert report["machine"]["libraries"]["onnxruntime"] == onnxruntime.__version__
    assert {"eager PyTorch, torch.compile"} <= {item["name"] for item in report["not_run"]}


def test_a_fresh_process_tells_its_own_peak(quick):
    peaks = [start["peak"] for start in quick[0]["fresh"]["first"]]
    if not os.path.exists("/proc/self/status"):  # noqa: PTH110
        assert peaks[0] is None
    else:
        assert all(20e6 < peak < 1e9 for peak in peaks)


def test_the_markdown_can_be_posted(quick, trunked):
    text = quick[1]
    assert text.startswith("### mge-bench: tiny, onnxruntime on cpu")
    assert str(trunked.parent) not in text, "a posted report names no folder"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.replace(r"\|", "").count("|") for row in rows} <= {3, 4, 5, 6}
    for wanted in ("chain / 3 bare trunks", "p99 needs 100 runs", "exit never", "peak memory", "not run", "drawn"):
        assert wanted.lower() in text.lower()


def test_without_trunks_the_rest_is_measured_and_a_calibration_is_not_followed(copy, tmp_path):
    temperatures = {"answer_1": 2.0, "answer_2": 2.0, "logits": 2.0}
    add_calibration(copy, {"version": 1, "temperatures": temperatures, "exits": None, "data": {}})
    picture = tmp_path / "bird.jpg"
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(picture)
    arguments = ["--engine", str(copy), "--device", "cpu", "--threads", "1", "--iterations", "5", "--quick"]
    result = CliRunner().invoke(main, [*arguments, "--images", "4", str(picture)])
    assert result.exit_code == 0, result.output
    assert "bare trunks: no stage of mge.plan has a trunk that can be told from its weights' names" in result.stdout
    assert "(exit never); the bundle is calibrated, exits are not taken" in result.stdout
    assert "1 named images" in result.stdout
    assert "chain / " not in result.stdout


# --- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["0", "1,x", "-1", "", "1,,2", "5000"])
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


def test_pytorch_gets_the_chains_threads_and_the_report_says_how_many_it_used(trunked, monkeypatch):
    asked = []

    class Way(Fake):
        threads = 3

    def make(_ckpt, _frames, threads, _device):
        asked.append(threads)
        return [Way("PyTorch eager", [])]

    monkeypatch.setattr(toolchain, "_imported", lambda _: SimpleNamespace(eager_contenders=make))
    monkeypatch.setattr(toolchain, "cpu_count", lambda: 3)
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        inputs = drawn_inputs(pipeline.manifest.preprocess)
        kind = {"ckpt": trunked, "iterations": 5, "warmup": 1, "seconds": 1.0, "say": lambda _line: None}
        found = measure_batch(pipeline, trunked, inputs, 1, threads=None, **kind)
        measure_batch(pipeline, trunked, inputs, 1, threads=1, **kind)
    assert asked == [3, 1]
    assert found.pytorch_threads == {"PyTorch eager": 3}
    assert "PyTorch computes with 3 threads" in next(iter(_batch(found))).notes


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


# --- its parts ----------------------------------------------------------------------------------------------------


def test_percentiles_are_numpys_and_rare_ones_need_many_runs():
    values = np.random.default_rng(0).exponential(1, 101).tolist()
    for percent in (0, 10, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert Percentiles.of(values).p99 == pytest.approx(np.percentile(values, 99))
    assert (Percentiles.of(values[:99]).p99, Percentiles.of(values[:9]).p90) == (None, None)


def test_a_ratio_is_taken_within_a_round():
    ratio = Ratio.of("x", [2, 20, 200], [1, 10, 50])  # medians apart would give 20 / 10, too; the rounds tell
    assert (ratio.median, ratio.rounds) == (2, (2, 2, 4))


def test_nothing_follows_itself_and_blocks_start_with_a_run_that_does_not_count():
    log = []
    contenders = [Fake(name, log) for name in "abc"]
    series = interleave(contenders, Plan(60, 1))
    rounds = ["".join(log[n : n + 3]) for n in range(0, len(log), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) == 6, "every order comes"
    assert all(before != after for before, after in pairwise(log))
    again = []
    interleave([Fake(name, again) for name in "abc"], Plan(60, 1))
    assert again == log, "the orders are drawn with a seed"
    log.clear()
    series = interleave(contenders[:2], Plan(2, 2))
    assert "".join(log) in ("aaabbbaaabbb", "bbbaaabbbaaa")
    assert [len(block) for block in series["a"].rounds] == [2, 2]
    assert series["a"].step_medians("step") == [1.0, 1.0]
    log.clear()
    interleave(contenders[:1], Plan(3, 1))
    assert log == ["a"] * 3


def test_a_median_has_an_interval_that_narrows_with_the_rounds():
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for _ in range(200):
        values = rng.normal(1, 0.1, 25).tolist()
        low, high = median_interval(values, resamples=500)
        held += low <= 1 <= high
        widths.append(high - low)
    assert 0.89 <= held / 200 <= 0.99  # 95 %, with the noise of 200 draws; p10 to p90 would hold all of them
    few = Ratio.of("x", rng.normal(1, 0.1, 6).tolist(), [1] * 6)
    many = Ratio.of("x", rng.normal(1, 0.1, 600).tolist(), [1] * 600)
    assert few.interval[1] - few.interval[0] > np.mean(widths) > 3 * (many.interval[1] - many.interval[0])
    assert many.p10 < many.interval[0] < many.median < many.interval[1] < many.p90
    five = Ratio.of("x", [1, 2, 3, 4, 5], [1] * 5)
    assert five.interval is None
    assert "rounds from 1.000 to 5.000 (too few for a 95 % interval)" in _numbers(five)


def test_steps_are_medians_and_what_lies_between_them_is_left_over():
    blocks = [{"ingest": 1.0, "expert_1": 6.0}], [{"ingest": 2.0, "expert_1": 12.0}], [{"ingest": 1.0, "expert_1": 6.0}]
    steps = _steps(Series(None, [[10.0], [20.0], [10.0]], list(blocks)))
    assert [(step.name, step.ms, step.share) for step in steps] == [
        ("ingest", 1.0, pytest.approx(0.1)),
        ("expert_1", 6.0, pytest.approx(0.6)),
        ("between the steps (derived)", 3.0, pytest.approx(0.3)),
    ]


def test_a_plan_keeps_to_its_time_or_to_its_iterations():
    assert plan_rounds([1000, 1100], None, 40) == Plan(19, 1)
    assert plan_rounds([9000, 8000], None, 40) == Plan(6, 1), "never fewer than six rounds"
    assert plan_rounds([1, 2], None, 40).runs == 10
    plan = plan_rounds([1, 2], 100, 40)
    assert plan.rounds * plan.runs >= 100
    assert plan_rounds([1, 2], 3, 40) == Plan(3, 1)


def test_warming_up_ends_when_nothing_gets_faster():
    log = []
    assert warm_up([Fake("a", log)], 7)[0] == len(log) == 7
    count, estimates = warm_up([Fake("a", log)], None)
    assert 4 <= count <= 20
    assert set(estimates) == {"a"}


def test_shares_are_differences_within_a_round(bundle_path):
    with Bundle.open(bundle_path) as bundle:
        manifest = bundle.manifest

    def series(rounds, steps):
        return Series(None, [[ms] for ms in rounds], [[step] for step in steps])

    whole = {"ingest": 1.0, "expert_1": 30.0, "expert_2": 30.0, "expert_3": 30.0, "gate": 21.0, "mixture": 2.0}
    chain = series([120, 240], [whole, {k: 2 * v for k, v in whole.items()}])
    bare = {"expert_1": 20.0, "expert_2": 20.0, "expert_3": 20.0, "gate": 20.0}
    trunks = series([80, 160], [bare, {k: 2 * v for k, v in bare.items()}])
    cut = {"expert_1": 25.0, "expert_2": 25.0, "expert_3": 25.0}
    heads = series([75, 150], [cut, {k: 2 * v for k, v in cut.items()}])
    found = [share.rounds for share in derived_shares(manifest, chain, trunks, heads)]
    assert found[0] == pytest.approx((80 / 120, 80 / 120))
    assert found[1] == pytest.approx((16 / 120, 16 / 120))  # 3 x 5 and the gate's 1
    assert found[2] == pytest.approx((16 / 120, 16 / 120))  # 3 x 5 and ingest's 1


def test_parts_are_opened_by_the_backend_itself(trunked):
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        frames = np.zeros((2, 32, 32, 3), np.uint8)
        images = pipeline.run(frames, outputs=["image_1", "image_2", "image_3"])
        parts = PartsContender("trunks", TrunkBundle, pipeline.choice, str(trunked), images, 1)
        parts.run()
        assert list(parts.steps_ms) == ["expert_1", "expert_2", "expert_3"]
        parts.close()
        heads = PartsContender("heads", HeadBundle, pipeline.choice, str(trunked), images, 1)
        heads.run()
        assert list(heads.steps_ms) == list(parts.steps_ms)
        heads.close()


def test_on_a_device_the_trunks_are_one_chain_on_the_first_image(trunked):
    device = HostDevice()
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with ExitStack() as stack:
        bundle = stack.enter_context(TrunkChainBundle.open(trunked))
        assert [stage.name for stage in bundle.manifest.stages] == ["ingest", "expert_1", "expert_2", "expert_3"]
        assert {stage.inputs[0].name for stage in bundle.manifest.stages[1:]} == {"image_1"}
        chain = open_ort_chain(onnxruntime, bundle, device)
        stack.callback(chain.close)
        assert dict(chain.run(frames, 1, ()).tensors) == {}
        found = chain.run(frames, 1, ["c5_expert_1"]).tensors["c5_expert_1"]
        assert {"upload", "chain", "download"} <= chain.run(frames, 1, ()).times_ms.keys()
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        heatmap = pipeline.run(frames)["heatmap_1"]
    np.testing.assert_allclose(found.mean(1), heatmap, rtol=1e-5, atol=1e-6)
    assert (device.allocated, device.allocated_host) == (0, 0)


def test_pictures_in_a_row_are_answered_both_ways(trunked):
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        inputs = drawn_inputs(pipeline.manifest.preprocess)
        found = measure_pipelined(pipeline, inputs, [], 2, 9, chain_ms=1.0, seconds=1.0)
    assert (found.images, found.distinct, len(found.frames_s)) == (9, 8, 3)
    assert found.ratio.median == pytest.approx(
        sorted(a / b for a, b in zip(found.files_s, found.frames_s, strict=True))[1]
    )


def test_a_fresh_process_that_fails_says_why(trunked, tmp_path):
    (tmp_path / "mge.plan").write_bytes(trunked.read_bytes()[:-100])
    with pytest.raises(BackendError, match=r"a fresh process did not answer: error: .*cut short"):
        fresh._start(
            [sys.executable, "-m", "mge_runtime.bench.child", str(tmp_path / "mge.plan"), "f", "cpu", "auto", "1"]
        )


def test_noise_counts_others_on_our_processors_alone(monkeypatch):
    ours = sorted(os.sched_getaffinity(0))[0]
    ticks = os.sysconf("SC_CLK_TCK")
    lines = iter([0, 3 * ticks])
    busy = {"ticks": 0}

    def read(path):
        if path == noise._STAT:
            busy["ticks"] = next(lines)
            used = busy["ticks"]
            return f"cpu 0\ncpu{ours} {used} 0 0 {used} 0 0 0 {used // 2}\ncpu999 {9 * used} 0 0 0 0 0 0 0"
        return "0.5 0.4 0.3"

    monkeypatch.setattr(noise, "_read", read)
    moments = iter([(10.0, 5.0), (13.0, 6.0)])

    def now():
        wall, own = next(moments)
        monkeypatch.setattr(noise.time, "perf_counter", lambda: wall)
        monkeypatch.setattr(noise.os, "times", lambda: os.times_result((own, 0.0, 0.0, 0.0, 0.0)))
        return real()

    real = noise._now
    monkeypatch.setattr(noise, "_now", now)
    found = Watch().stop("x", [1.0, 1.0, 2.0])
    assert found.others == pytest.approx((3 - 1) / 3)
    assert found.steal == pytest.approx(0.2)
    assert found.spread == pytest.approx(0.8)
    assert found.warning.startswith("too noisy to trust: the rounds of 'x' lie 80% apart, other processes kept 0.7")


def test_energy_is_read_from_the_packages_and_a_counter_may_wrap(tmp_path):
    assert "no energy counters" in find_meter("cpu", tmp_path)
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("9000000\n")
    (zone / "max_energy_range_uj").write_text("10000000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()
    (tmp_path / "intel-rapl:0:0" / "name").write_text("core\n")
    meter = find_meter("cpu", tmp_path)

    class Chain(Fake):
        def run(self):
            (zone / "energy_uj").write_text("1000000\n")

    energy = measure_energy(meter, Chain("chain", []), 4, seconds=0)
    assert (energy.joules, energy.images, energy.joules_per_image) == (pytest.approx(2.0), 4, pytest.approx(0.5))
    (zone / "energy_uj").unlink()
    assert "cannot be read" in find_meter("cpu", tmp_path)


def test_each_noisy_section_warns_in_one_line(quick):
    results = quick[2]

    def with_warnings(batch, pipelined, fresh_ones):
        def noisy(section, warning):
            return replace(section, noise=replace(section.noise, warning=warning))

        return BenchReport(
            replace(
                results,
                batches=(results.batches[0], noisy(results.batches[1], batch)),
                pipelined=noisy(results.pipelined, pipelined),
                fresh=noisy(results.fresh, fresh_ones),
            )
        )

    results = replace(results, batches=tuple(replace(b, noise=replace(b.noise, warning=None)) for b in results.batches))
    quiet = with_warnings(None, None, None)
    assert quiet.warnings == json.loads(quiet.to_json())["warnings"] == []
    assert "WARNING" not in quiet.to_text()
    noisy = with_warnings("too loud", "too wild", "too busy")
    assert noisy.warnings == ["batch 3: too loud", "pipelined: too wild", "fresh processes: too busy"]
    for warning in noisy.warnings:
        assert f"**{warning}**" in noisy.to_markdown()
        assert f"WARNING: {warning}" in noisy.to_text().splitlines()


def test_first_starts_hash_and_later_ones_do_not(trunked, monkeypatch):
    """What the children find in their caches before they start, as `bundle.untouched` left it there."""
    found = {"hashed": [], "before": []}
    start = fresh._start

    def watched(command, variables=None):
        if variables is None:
            return start(command)
        cache = Path(variables["MGE_CACHE_DIR"])
        assert cache != cache_folder()
        before = dict(fresh._stamps(cache))
        took = start(command, variables)
        found["before"].append(len(before))
        found["hashed"].append(fresh._stamps(cache) != before)
        return took

    monkeypatch.setattr(fresh, "_start", watched)
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        choice, frame = pipeline.choice, drawn_inputs(pipeline.manifest.preprocess).frames[0]
    os.utime(trunked)  # a file that was just written is never remembered
    measured = fresh.measure_fresh(trunked, choice, 1, frame, 0.0)
    assert len(measured.first) == len(measured.later) == len(measured.files) == 3
    assert found["before"][:2] == [0, 0], "one of each that does not count"
    assert sorted(found["before"][2:]) == [0, 0, 0, 1, 1, 1]
    assert [not before for before in found["before"]] == found["hashed"]


def test_a_temporary_folder_that_cannot_be_used_is_one_line(trunked, monkeypatch, tmp_path):
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        choice = pipeline.choice
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"^cannot use the temporary folder: No such file.*set TMPDIR") as error:
        fresh.measure_fresh(trunked, choice, 1, np.zeros((32, 32, 3), np.uint8), 0.0)
    assert "\n" not in str(error.value)


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
