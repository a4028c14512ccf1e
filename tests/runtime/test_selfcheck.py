"""The self-check, on the CPU and on the host as a device; and that each of its checks can fail."""

import json
import mmap
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime.backends.ort_segment import open_segments
from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.cli.bench import main
from mge_runtime.device import DeviceExecutor, Graph
from mge_runtime.device.host import HostDevice
from mge_runtime.errors import BackendError
from mge_runtime.machine import Gpu
from mge_runtime.selfcheck.answers import check_batches, check_graphs, check_parity
from mge_runtime.selfcheck.compare import compare, compared_tensors
from mge_runtime.selfcheck.copies import check_copies, check_graph_copies
from mge_runtime.selfcheck.engines import check_attested, check_refused
from mge_runtime.selfcheck.limits import LIMITS, Limits
from mge_runtime.selfcheck.memory import HOST_LIMIT, check_memory, host_memory
from mge_runtime.selfcheck.pictures import Frames, drawn_frames
from mge_runtime.selfcheck.run import run_checks
from mge_runtime.selfcheck.subject import open_subject, run_all
from mge_runtime.selfcheck.together import check_together
from mge_runtime.trt.batch import BatchRange
from mge_runtime.trt.engines import EngineDetails


def unchanged(tensors, _):
    return tensors


class GraphDevice(HostDevice):
    """The host with graphs: a launch does again what was enqueued; `stale` ones do nothing."""

    def __init__(self, *, nodes=None, refusal=None, stale=False):
        super().__init__()
        self.nodes, self.refusal, self.stale = nodes, refusal, stale

    def capture(self, stream, enqueue):
        if self.refusal:
            return super().capture(stream, enqueue)
        device = self

        class Replay(Graph):
            nodes = device.nodes

            def launch(self, stream):  # noqa: ARG002
                if not device.stale:
                    enqueue()

            def close(self):
                pass

        return Replay()


class OnDevice:
    """A chain on a device, opened as a check wants it; `change` may alter what a run puts out."""

    def __init__(self, path, device, graphs, change=unchanged):
        with Bundle.open(path) as bundle:
            self.manifest = bundle.manifest

            def open_units(device, stream):
                for unit in open_segments(onnxruntime, bundle, device, stream):
                    prepare = unit.prepare

                    def capturable(addresses, stream, prepare=prepare):
                        launch = prepare(addresses, stream)
                        launch.why_not_captured = lambda _: None
                        return launch

                    unit.prepare = capturable
                    yield unit

            self.chain = DeviceExecutor(bundle.manifest, device, open_units, graphs=graphs)
        self.max_batch, self.device, self.change = None, device, change

    def run(self, frames, *, outputs=None):
        outputs = compared_tensors(self.manifest) if outputs is None else outputs
        tensors = self.chain.run(frames, len(self.manifest.segments), set(outputs)).tensors
        return self.change(dict(tensors), frames)

    def report(self):
        return self.chain.report()

    def close(self):
        self.chain.close()


@pytest.fixture(scope="module")
def cpu(bundle_path):
    return open_subject(bundle_path, "cpu", threads=1)


@pytest.fixture
def on_device(cpu):
    """Make a subject that runs on the host as a device, checked against the CPU."""

    def make(change=unchanged, *, opened=OnDevice, **device):
        def open_it(graphs):
            return opened(cpu.path, GraphDevice(**device), graphs, change)

        return replace(cpu, backend="a device", device="host", open=open_it, reference=lambda: cpu.open(True))

    return make


@pytest.fixture(scope="module")
def frames(cpu):
    return drawn_frames(cpu.manifest.preprocess).frames


@pytest.fixture
def with_engines(cpu, tmp_path):
    """Make a subject whose bundle holds the descriptions of engines."""

    def make(precision, *, gpu=None, options=None):
        path = tmp_path / "mge.plan"
        shutil.copyfile(cpu.path, path)
        details = EngineDetails("1.7.1", gpu, BatchRange(), precision, options or {}, "mge test")
        plans = {stage.name: b"bytes" for stage in cpu.manifest.stages}
        target = "tensorrt-rtx-1.7-sm86-linux-x86_64"
        add_engine(path, target, plans, details.to_dict(), manifest_sha256=cpu.manifest_sha256)
        return replace(cpu, path=path)

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
        "no copy to or from the host between stages": "not run",
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


def test_photographs_are_named_and_a_bad_one_is_an_error(bundle_path, tmp_path):
    for number, picture in enumerate(np.random.default_rng(0).integers(0, 256, (3, 50, 60, 3), np.uint8)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    arguments = ["--engine", str(bundle_path), "--selfcheck", "--device", "cpu", "--runs", "2", "--threads", "1"]
    result = CliRunner().invoke(main, [*arguments, str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "images   3 images that were named" in result.stdout
    (tmp_path / "bad.png").write_bytes(b"no picture")
    result = CliRunner().invoke(main, [*arguments, str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "bad.png" in result.stderr


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


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom mge_runtime.cli.bench import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "assert not {'numpy', 'PIL', 'onnxruntime', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_failed_check_is_reported_the_others_go_on_and_the_exit_code_is_1(bundle_path, cpu, frames, monkeypatch):
    class Failing:
        max_batch = None

        def run(self, *_, **__):
            raise BackendError("the GPU\nis on fire")

        def report(self):
            raise KeyError("programs")

        def close(self):
            pass

    broken = replace(cpu, open=lambda _: Failing())
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
    monkeypatch.setattr("mge_runtime.selfcheck.subject.open_subject", lambda *_: broken)
    result = CliRunner().invoke(main, ["--engine", str(bundle_path), "--selfcheck", "--runs", "2"])
    assert result.exit_code == 1
    assert "6 failed" in result.stdout


# --- answers ------------------------------------------------------------------------------------------------------


def test_a_device_that_answers_as_the_cpu_passes(on_device, frames):
    subject = on_device(nodes={"kernel": 12, "copy_device_to_device": 1})
    for check in (check_parity, check_batches, check_graphs, check_copies, check_graph_copies, check_together):
        result = check(subject, frames)
        assert result.outcome == "passed", result
        assert result.found
    parity = check_parity(subject, frames)
    assert parity.numbers["images"] == len(frames)
    assert parity.numbers["gate_relative"] <= 1e-4


def shifted(name, row, by):
    def change(tensors, _):
        tensors[name] = tensors[name].copy()
        tensors[name][row] += by
        return tensors

    return change


@pytest.mark.parametrize(
    ("name", "by", "said"),
    [
        ("logits", 0.1, "logits differs by"),
        ("logits", [100, 0, 0, 0, 0], "change their class"),
        ("logits_1", 0.1, "logits_1 differs by"),
        ("gate", [0.01, -0.01, 0], "gate differs by"),
        ("gate", np.nan, "gate holds numbers that are not finite"),
        ("box_1", [4, 4, 0, 0], "box_1: median IoU"),
        ("box_2", [4, 4, 0, 0], "box_2: median IoU"),
    ],
)
def test_answers_that_differ_from_the_cpu_fail(on_device, frames, name, by, said):
    assert failed(check_parity(on_device(shifted(name, slice(None), by)), frames), said)


def test_a_batch_whose_rows_are_mixed_up_fails(on_device, frames):
    def rolled(tensors, _):
        return {name: np.roll(array, 1, 0) for name, array in tensors.items()}

    assert failed(check_batches(on_device(rolled), frames), "differs by")


def test_the_last_row_of_a_remainder_counts(on_device, frames):
    def forgotten(tensors, frames):
        if 1 < len(frames) < 8:
            tensors["gate"][-1] = tensors["gate"][0][::-1]
        return tensors

    assert failed(check_batches(on_device(forgotten), frames[:3]), "gate differs by")
    assert check_batches(on_device(), frames[:3]).numbers["images"] == 12


def test_engines_for_one_image_have_no_batches(on_device, frames):
    class Single(OnDevice):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.max_batch = 1

    subject = on_device(opened=Single)
    assert check_batches(subject, frames).outcome == "not run"
    assert check_parity(subject, frames).outcome == "passed"


def test_graphs_that_replay_old_work_fail(on_device, frames):
    assert failed(check_graphs(on_device(stale=True), frames), "batch 1: ")


def test_graphs_that_were_refused_fail_with_the_reason(on_device, frames):
    assert failed(check_graphs(on_device(refusal=True), frames), "batch 8: no graph: the host has no graphs")


def test_a_switch_that_does_nothing_fails(on_device, frames):
    class Always(OnDevice):
        def __init__(self, path, device, graphs, change):  # noqa: ARG002
            super().__init__(path, device, True, change)

    assert failed(check_graphs(on_device(opened=Always), frames), "where graphs were turned off")


# --- copies -------------------------------------------------------------------------------------------------------


def test_one_copy_too_many_fails(on_device, frames):
    class Detour(OnDevice):
        def run(self, frames, *, outputs=None):
            tensors = super().run(frames, outputs=outputs)
            stream, memory = self.device.create_stream(), self.device.allocate(64)
            buffer = self.device.allocate_host(64)
            self.device.download(buffer, 0, memory, 64, stream)
            memory.close()
            buffer.close()
            return tensors

    assert failed(check_copies(on_device(opened=Detour), frames), "run 1 copied host_to_device 1, ")


@pytest.mark.parametrize(
    ("nodes", "outcome", "said"),
    [
        ({"kernel": 9}, "passed", "9 nodes, no copies"),
        ({"kernel": 9, "copy_device_to_host": 1}, "failed", "copy_device_to_host 1"),
        ({"copy_host_to_device": 2, "copy_unknown_to_device": 1}, "failed", "copy_host_to_device 2"),
        ({"kernel": 9, "copy_unknown_to_device": 1}, "not run", "copy_unknown_to_device 1"),
        ({"kernel": 9, "memcpy_batch": 1}, "not run", "memcpy_batch 1"),
        (None, "not run", "cuda-core 1.1"),
    ],
)
def test_copies_inside_a_graph_are_counted(on_device, frames, nodes, outcome, said):
    check = check_graph_copies(on_device(nodes=nodes), frames)
    assert check.outcome == outcome
    assert said in check.found


def test_without_a_graph_its_copies_are_not_known(on_device, frames):
    check = check_graph_copies(on_device(refusal=True), frames)
    assert (check.outcome, "the host has no graphs" in check.found) == ("not run", True)


# --- memory -------------------------------------------------------------------------------------------------------


def test_a_leak_on_the_host_fails(cpu, frames):
    if host_memory() is None:
        pytest.skip("this system does not tell how much memory is in use")
    kept = []

    def leaking(graphs):
        opened = cpu.open(graphs)
        run = opened.run

        def run_and_keep(*arguments, **options):
            kept.append(mmap.mmap(-1, 2**17))  # the heap may have room that earlier tests left
            kept[-1].write(bytes(2**17))
            return run(*arguments, **options)

        opened.run = run_and_keep
        return opened

    check = check_memory(replace(cpu, open=leaking), frames, 60)
    assert failed(check, "host memory grew by")
    assert check.numbers["host_growth"] > HOST_LIMIT
    kept.clear()
    check = check_memory(cpu, frames, 60)
    assert check.outcome == "passed", check


def test_a_leak_on_the_device_fails(on_device, frames):
    devices = []

    class Leaking(OnDevice):
        def run(self, frames, *, outputs=None):
            devices.append((self.device, self.device.allocate(1024)))
            return super().run(frames, outputs=outputs)

    def used():
        return devices[-1][0].allocated if devices else 0

    assert failed(
        check_memory(on_device(opened=Leaking), frames, 40, meters=[("device", used, 0)]), "device memory grew"
    )


def test_what_others_take_for_a_while_is_no_growth_and_what_nobody_tells_is_not_run(cpu, frames):
    values = iter([100, 900, 100, 900] * 100)
    assert check_memory(cpu, frames, 20, meters=[("device", lambda: next(values), 0)]).numbers["device_growth"] == 0
    assert check_memory(cpu, frames, 2, meters=[("host", lambda: None, 0)]).outcome == "not run"


def test_a_heap_that_settles_once_is_no_leak_and_one_that_grows_each_time_is(cpu, frames):
    samples = 21  # a period
    settling = iter([0] * 10 + [500] * (2 * samples))
    check = check_memory(cpu, frames, 20, meters=[("host", lambda: next(settling), 100)])
    assert (check.outcome, check.numbers["host_growth"], check.numbers["periods"]) == ("passed", 0, 2)
    growing = iter(range(0, 50 * 3 * samples, 50))
    check = check_memory(cpu, frames, 20, meters=[("host", lambda: next(growing), 400)])
    assert (check.outcome, check.numbers["host_growth"], check.numbers["periods"]) == ("failed", 500, 3)


# --- two pipelines ------------------------------------------------------------------------------------------------


def test_pipelines_that_share_their_answers_fail(on_device, frames):
    lock, last = threading.Lock(), {}

    def mixed(tensors, _):
        if threading.current_thread() is threading.main_thread():
            return tensors
        with lock:
            return last.setdefault(len(tensors["gate"]), tensors)

    assert failed(check_together(on_device(mixed), frames), "pipeline 1: ")


def test_a_pipeline_that_fails_beside_another_is_said(on_device, frames):
    def refused(tensors, _):
        if threading.current_thread().name.endswith("-1"):
            raise BackendError("in use by another thread")
        return tensors

    assert failed(check_together(on_device(refused), frames), "in use by another thread")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mge-selfcheck")]


# --- engines ------------------------------------------------------------------------------------------------------


def test_engines_that_do_not_fit_are_refused_and_the_bundle_stays_as_it_was(cpu):
    before = cpu.path.read_bytes()
    check = check_refused(cpu)
    assert check.outcome == "passed", check
    assert set(check.numbers) == {"another GPU", "another version", "another operating system"}
    assert all("mge-build mge.plan" in line for line in check.numbers.values())
    assert cpu.machine.gpus or "there is no GPU here" in check.found
    assert "is for sm87, this GPU is NVIDIA GeForce RTX 3060 (sm86)" in check.found
    assert cpu.path.read_bytes() == before


@pytest.mark.parametrize("place", ["mge_runtime.trt.found.why_not", "mge_runtime.trt.fit.why_not"])
def test_engines_that_are_not_refused_fail(cpu, monkeypatch, place):
    monkeypatch.setattr(place, lambda *_: None)
    assert failed(check_refused(cpu), "engines for another GPU: not refused")


def test_engines_that_are_read_before_they_are_refused_fail(cpu, monkeypatch):
    def reading(choice, _):
        choice.engines.plan("gate")
        raise BackendError("TensorRT does not accept its engine")

    monkeypatch.setattr("mge_runtime.selfcheck.engines.open_backend", reading)
    assert failed(check_refused(cpu), "not refused")


def test_precision_is_attested_for_every_stage(cpu, with_engines):
    stages = [stage.name for stage in cpu.manifest.stages]
    good = {name: {"type": "fp32", "attested": "network"} for name in stages}
    check = check_attested(with_engines(good))
    assert (check.outcome, check.numbers) == (
        "passed",
        {"tensorrt-rtx-1.7-sm86-linux-x86_64": {"engine": 0, "network": len(stages)}},
    )
    assert failed(check_attested(with_engines({**good, "gate": {"type": "fp32"}})), "stage gate is attested by None")
    wrong = {**good, "gate": {"type": "fp16", "attested": "network"}}
    assert failed(check_attested(with_engines(wrong)), "stage gate is recorded as fp16; the bundle says fp32")
    missing = {name: good[name] for name in stages[1:]}
    assert failed(check_attested(with_engines(missing)), f"stage {stages[0]} has no record")
    gpu = Gpu("NVIDIA GeForce RTX 3060", "sm86", 12 * 2**30, 28)
    assert failed(check_attested(with_engines(good, gpu=gpu)), "inspector was not asked")
    asked = {"scratch": dict.fromkeys(stages, 0)}
    assert check_attested(with_engines(good, gpu=gpu, options=asked)).outcome == "passed"


# --- limits -------------------------------------------------------------------------------------------------------


def test_the_limits_are_the_exports():
    tolerances = pytest.importorskip("mge_export.tolerances")
    for precision, theirs in tolerances.TOLERANCES.items():
        ours = LIMITS[precision.value]
        for name in ("relative", "classes", "classes_of_few", "box_iou_median", "box_iou_p1", "chain_boxes"):
            assert getattr(ours, name) == getattr(theirs, name), (precision, name)
        assert [ours.allowed_changes(n) for n in (1, 99, 100, 1000)] == [
            theirs.allowed_changes(n) for n in (1, 99, 100, 1000)
        ]


def test_a_bundle_brings_its_own_limits(cpu):
    stored = {"relative": 0.01, "classes": 0.1, "classes_of_few": 2, "box_iou_median": 0.9, "box_iou_p1": 0.5}
    whole = replace(cpu.manifest, parity={"tolerances": {**stored, "chain_boxes": False, "outliers": 0.1}})
    assert Limits.of(whole).relative == 0.01
    assert Limits.of(whole).allowed_changes(5) == 2
    for strange in (stored, {**stored, "chain_boxes": "no"}, {**stored, "chain_boxes": True, "relative": -1}, 7):
        assert Limits.of(replace(cpu.manifest, parity={"tolerances": strange})).relative == 1e-4
    half = {name: {"type": "fp16"} for name in cpu.manifest.precision}
    assert Limits.of(replace(cpu.manifest, precision=half)).relative == 5e-2
    assert Limits.of(replace(cpu.manifest, precision={**half, "expert_1": {"type": "int8"}})).relative == 1.0


def test_ties_are_excused_and_one_box_of_few(cpu, frames):
    with closing(cpu.open(True)) as opened:
        reference = run_all(opened, frames, compared_tensors(cpu.manifest), 8)
    limits = LIMITS["fp32"]
    found = {name: array.copy() for name, array in reference.items()}
    best, other = np.argsort(reference["logits"][0])[::-1][:2]
    reference["logits"][0, other] = reference["logits"][0, best] * (1 - 1e-5)
    found["logits"][0] = reference["logits"][0]
    found["logits"][0, other] = reference["logits"][0, best] * (1 + 1e-5)
    compared = compare(found, reference, cpu.manifest, limits)
    assert (compared.failures, compared.numbers["class_changes_on_ties"]) == ([], 1)
    for image, expected in ((0, 0), (1, 1)):
        found["box_1"][image] = [0, 0, 4, 4]
        failures = [line for line in compare(found, reference, cpu.manifest, limits).failures if "box_1" in line]
        assert len(failures) == expected, failures


def test_boxes_are_compared_in_pixels_of_the_frame(cpu):
    names = compared_tensors(cpu.manifest)
    shapes = {"gate": 3, "box_1": 4, "box_2": 4}
    reference = {name: np.ones((1, shapes.get(name, 5)), np.float32) for name in names}
    reference["box_1"][0], reference["box_2"][0] = [0, 0, 16, 16], [0, 0, 32, 32]
    found = {name: array.copy() for name, array in reference.items()}
    found["box_1"][0] = [0, 0, 16, 8]
    numbers = compare(found, reference, cpu.manifest, LIMITS["fp32"]).numbers
    assert numbers["box_1_iou_median"] == pytest.approx(0.5)
    # The second box covers all that the first left; what it saw reaches from the first pixel's centre to the last's.
    assert numbers["box_2_iou_median"] == pytest.approx((8 - 1) / (16 - 1))
    assert numbers["same_crops"] == 0
    assert "logits_relative" not in numbers


def test_drawn_pictures_are_the_same_every_time_and_differ(cpu):
    first, second = (drawn_frames(cpu.manifest.preprocess).frames for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len({frame.tobytes() for frame in first}) == len(first)
