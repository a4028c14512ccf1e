import json
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from mge_runtime.bundle import add_calibration
from mge_runtime.cli.common import reports_errors
from mge_runtime.cli.info import main
from mge_runtime.cli.info_text import parity_lines
from mge_runtime.files import format_bytes
from mge_runtime.machine import Gpu, Machine, describe_machine
from mge_runtime.trt.engines import EngineDetails, store_engines
from mge_runtime.trt.target import BatchRange, Target
from tests.helpers.bundles import TARGET, add_engines, change_byte, write_changed

MACHINES = Path(__file__).with_name("machines")
ORIN = MACHINES / "jetson-agx-orin-jetpack-6.2.json"
TEMPERATURES = {"mean_logits_1": 1.3125, "mean_logits_2": 1.5, "logits": 1}
PARITY = {
    "source": "12 photographs",
    "reference": "the checkpoint",
    "checks": {
        "onnx": {
            "label": "ONNX Runtime",
            "graphs": {
                "expert_1": {
                    "absolute": {"logits_1": 0.25, "box_1": 0.5},
                    "relative": {"logits_1": 0.001},
                    "class_changes": 2,
                    "box_iou": {"median": 1.0, "p1": 0.9512},
                },
                "gate": {"absolute": {"gate": "inf"}, "relative": {"gate": 1e-6}},
            },
            "chain": {"class_changes": 1, "logits_relative": 0.002, "box_iou": {"box_1": {"median": 0.99, "p1": 0.75}}},
        }
    },
    "failures": ["box_1: too small"],
    "warnings": [],
}


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def shown(*arguments):
    """The output without its line breaks."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def as_json(*arguments):
    return json.loads(run(*arguments, "--json").output)


def refused(*arguments):
    """The one line of an error."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr[:-1].isprintable()
    return result.stderr


def add_orin(path):
    """Add engines for a Jetson Orin; nobody looks inside them."""
    precision = {"expert_3": {"type": "fp32", "attested": "engine"}}
    precision |= {"expert_1": {"type": "fp16", "attested": "network"}, "expert_2": {"type": "fp16"}}
    gpu = Machine.from_json(ORIN.read_bytes()).gpus[0]
    add_engines(path, details=EngineDetails("10.3.0", gpu, BatchRange(1, 1, 8), precision, {}, "mge test").to_dict())


def test_all_shows_what_is_inside_and_what_runs(bundle_path):
    result = run(bundle_path, "--all")
    assert result.exit_code == 0
    for text in (
        "5: bird 0, bird 1",
        "shorter side to 36, center crop 32 x 32",
        "expert_1: fp32",
        "attested: written by hand",
        "box_1 float32 [batch, 4]",
        "graphs     expert_1: fp32, 1e-06 GMACs,",
        "parity     not measured",
        "engines    none",
        "runs here  onnxruntime on cpu",
        "machine    linux ",
    ):
        assert text in result.output
    assert all(len(line) <= 110 for line in result.output.splitlines()[1:])


def test_it_is_ten_lines(tiny, bundle_path, tmp_path):
    path, names = tmp_path / "mge.plan", tuple(f"a species with a long name {index}" for index in range(5))
    write_changed(tiny, path, class_names=names, parity=PARITY, model={"arch": "tiny" * 50})
    add_calibration(path, {"temperatures": TEMPERATURES})
    add_orin(path)
    bare = ("parity     not measured", "engines    none", "classes    5: bird 0", "fp32 in 3 graphs")
    full = ("parity     out of tolerance: box_1", f"engines    {TARGET}", "mean_logits_1 1.312")
    for bundle, texts in ((bundle_path, bare), (path, full)):
        output = run(bundle).output
        assert len(output.splitlines()) == 10
        assert all(len(line) <= 110 for line in output.splitlines()[1:])
        assert all(text in output for text in ("runs here  onnxruntime on cpu", *texts))


def test_json_holds_the_whole_manifest(bundle):
    values = as_json(bundle.path)
    assert values["manifest"] == json.loads(bundle.manifest.to_json())
    assert (values["manifest_sha256"], values["entries"]) == (bundle.manifest_sha256, bundle.sizes)
    assert values["here"]["backend"] == "onnxruntime"
    assert values["size"] == bundle.path.stat().st_size


def test_it_shows_temperatures_and_exits_in_words(copy):
    assert "calibrated no: probabilities are the model's own and there are no calibrated exits" in shown(copy)
    values = {
        "temperatures": TEMPERATURES,
        "exits": {"epsilon": 0.01, "delta": 0.05, "thresholds": {"mean_logits_1": 0.93, "mean_logits_2": 0.99997}},
        "data": {"temperatures": {"images": 500, "sha256": "0" * 64}, "exits": {"images": 2000, "sha256": "1" * 64}},
    }
    add_calibration(copy, values)
    assert as_json(copy)["calibration"] == values
    output = shown("--all", copy)
    for text in (
        "calibrated temperatures: mean_logits_1 1.312, mean_logits_2 1.5, logits 1 (from 500 images)",
        "exits (--exit calibrated): after graph 1 where mean_logits_1 has a confidence of at least 0.93, "
        "after graph 2 where mean_logits_2 has a confidence of at least 0.99997 (from 2000 images)",
        "with probability 95% at most 1% of predictions differ from the whole chain's",
    ):
        assert text in output
    values["exits"]["thresholds"]["mean_logits_1"] = None
    add_calibration(copy, {**values, "runs_on": {"backend": "tensorrt", "device": "cuda:0"}})
    output = shown("--all", copy)
    assert "on images like those, with tensorrt on cuda:0" in output
    assert "exits (--exit calibrated): after graph 2 where mean_logits_2" in output
    add_calibration(copy, {**values, "temperatures": {}})
    wrong = "calibrated cannot be read: calibration.json: temperatures.mean_logits_1 is null; expected"
    assert wrong in shown("--all", copy)


def test_it_shows_additions(copy):
    report = {"exits": {"none_because": "too few images for the guarantee"}}
    add_calibration(copy, {"temperatures": TEMPERATURES, "report": report})
    add_orin(copy)
    output = shown("--all", copy)
    for text in (
        "mean_logits_2 1.5, logits 1 no early exits: too few images for",
        f"engines {TARGET} {TARGET}: 3 graphs, 18 B, experimental: not yet run",
        "built by version 10.3.0, on Orin (sm87), for batch 1 to 8",
        "fp32 (attested: engine): expert_3; fp16 (attested: network): expert_1; fp16 (not attested): expert_2",
        "does not fit: is for linux aarch64, this machine is ",
    ):
        assert text in output
    # Engines of something else are shown as far as they can be read.
    add_engines(copy, "foreign", {"expert_3": b"g"}, {"batch": 3, "precision": [], "version": 1})
    output = shown("--all", copy)
    assert (
        "foreign: 1 graphs, 1 B, experimental: not yet run not as this version of mge writes it: see --json" in output
    )
    assert "does not fit: cannot be read: the bundle has engines for 'foreign'" in output


def test_it_says_what_would_run_on_a_recorded_machine(copy, bundle_path):
    add_orin(copy)
    output = shown("--all", copy, "--as-machine", ORIN)
    for text in (
        "machine NVIDIA Jetson AGX Orin Developer Kit, linux aarch64, Python 3.10.12, cuda:0 Orin (sm87, 16",
        "65.89 GB shared with the CPU, driver for CUDA 12.6, tensorrt 10.3.0",
        f"runs there tensorrt on cuda:0 (experimental: not yet run): the engines {TARGET} in the bundle",
        "engine): expert_3; fp16 (attested: network): expert_1; fp16 (not attested): expert_2 fits the machine",
    ):
        assert text in output
    values = as_json(copy, "--as-machine", ORIN)
    assert values["machine"] == json.loads(ORIN.read_bytes())
    assert (values["here"]["backend"], values["engines"][TARGET]["misfit"]) == ("tensorrt", None)
    here = as_json(copy, "--as-machine", MACHINES / "h100-onnxruntime-gpu.json")["here"]
    assert (here["backend"], here["status"]) == (
        "onnxruntime",
        "experimental: ran once, on an H100, before its last changes",
    )
    assert [other["backend"] for other in here["passed_over"]] == ["tensorrt", "tensorrt-rtx"]
    assert "does not serve sm90 (Hopper)" in here["passed_over"][1]["reason"]
    bare = shown("--all", bundle_path, "--as-machine", MACHINES / "bare-cpu-x86_64.json")
    assert "not tensorrt, tensorrt-rtx, onnxruntime on cuda:0: no NVIDIA driver is installed" in bare
    assert "x86_64, Python 3.11.7, no GPU, tensorrt-rtx 1.7.1.116" in bare


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="POSIX")
def test_a_description_that_never_ends_is_not_read(bundle_path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", Path("/dev/zero")):
        assert "it is no regular file; expected a machine's description" in refused(
            bundle_path, "--as-machine", endless
        )


def test_engines_in_this_machines_cache_are_shown(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path))
    (tmp_path / "plan").write_bytes(b"abc")
    details = EngineDetails("10.3.0", None, BatchRange(2, 2, 2), {}, {}, "mge test")
    plans, gpu = {"gate": tmp_path / "plan"}, Gpu("Orin", "sm87", 1, 16)
    store_engines(bundle.manifest_sha256, Target.parse(TARGET), gpu, plans, details)
    output = shown("--all", bundle.path)
    assert f"engines {TARGET} in the cache, {tmp_path}" in output
    assert "1 graphs, 3 B, experimental: not yet run built by version 10.3.0, ahead of time" in output
    assert "cache" not in shown("--all", bundle.path, "--as-machine", MACHINES / "bare-cpu-x86_64.json")


def test_this_machine_is_printed_for_whoever_records_it(tmp_path):
    result = run("--machine", tmp_path / "no.plan")
    assert result.exit_code == 0
    machine = Machine.from_json(result.output.encode())
    assert machine == describe_machine(always=True)
    assert "CPUExecutionProvider" in machine.providers


def test_extract_and_verify(bundle_path, tmp_path):
    output = shown(bundle_path, "--verify", "--extract", tmp_path / "out")
    assert "every entry matches its hash" in output
    assert "extracted 8 files" in output
    assert (tmp_path / "out" / "onnx" / "expert_1.weights").is_file()
    assert len(as_json(bundle_path, "--extract", tmp_path / "more")["extracted"]) == 8


def test_the_parity_report_is_a_line_for_each_check():
    assert parity_lines(PARITY) == [
        "out of tolerance: box_1: too small",
        "on 12 photographs; reference: the checkpoint",
        "ONNX Runtime: each graph within 1.0e-03 of its tensors' largest value, the chain's logits within 2.0e-03; "
        "1 images change their class; 1st percentile of box IoU 0.750",
    ]


@pytest.mark.parametrize(
    "parity", [{}, {"checks": 3}, {"checks": {"a": []}}, {"checks": {"a": {"graphs": {"b": None}}}, "warnings": "x"}]
)
def test_a_report_of_another_shape_does_no_harm(parity):
    assert all(isinstance(line, str) for line in parity_lines(parity))


def test_errors_are_one_line_and_exit_1(copy, tmp_path):
    assert "no bundle at " in refused(tmp_path / "none.plan")
    for name in ("\x1b[31mred\x9b.plan", "\udcff.plan"):
        assert "no bundle at ?" in refused(name)
    missing = "none.json: No such file or directory; expected a machine's description: mge-info"
    assert missing in refused(copy, "--as-machine", tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"system": 1}')
    wrong = "bad.json: arch is null; expected this field, which is missing: record the machine again"
    assert wrong in refused(copy, "--as-machine", tmp_path / "bad.json")
    assert "cannot write" in refused(copy, "--extract", tmp_path / "bad.json")
    change_byte(copy, "onnx/expert_3.weights")
    assert run(copy).exit_code == 0  # nothing of it was opened
    assert "do not match their hash" in refused(copy, "--verify")


def test_an_interrupted_extraction_is_one_line(bundle_path, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert "the extraction was interrupted (SIGTERM): " in refused(bundle_path, "--extract", tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_defects_keep_their_traceback():
    @reports_errors
    def defect():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        defect()


def test_control_characters_of_a_file_do_not_reach_the_terminal(tiny, tmp_path):
    write_changed(tiny, tmp_path / "mge.plan", model={"arch": "\x1b[31mred"})
    for options in ([], ["--all"], ["--json"]):
        output = run(tmp_path / "mge.plan", *options).output
        assert "[31mred" in output
        assert "\x1b" not in output


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
                        (98_000_000, "98.0 MB"), (2_340_000_000, "2.34 GB")]
)  # fmt: skip
def test_sizes_are_written_for_people(count, text):
    assert format_bytes(count) == text
