import json
import shutil
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from mge_runtime.bundle import Bundle, add_calibration, add_engine
from mge_runtime.cli.common import reports_errors
from mge_runtime.cli.info import main
from mge_runtime.cli.info_text import parity_lines
from mge_runtime.files import format_bytes
from mge_runtime.machine import Gpu, Machine, describe_machine
from mge_runtime.trt.engines import EngineDetails, store_engines
from mge_runtime.trt.target import BatchRange, Target

MACHINES = Path(__file__).with_name("machines")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def flat(result):
    """The output without its line breaks."""
    return " ".join(result.output.split())


def test_it_shows_what_is_inside_and_what_runs(bundle_path):
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
    from dataclasses import replace

    from mge_runtime.bundle import write_bundle

    graphs = tiny.make_graphs()
    names = tuple(f"a species with a long name {index}" for index in range(5))
    manifest = replace(tiny.make_manifest(graphs), class_names=names, parity=PARITY, model={"arch": "tiny" * 50})
    write_bundle(tmp_path / "mge.plan", manifest, {g.spec.name: g.model() for g in graphs})
    add_calibration(tmp_path / "mge.plan", {"temperatures": {"mean_logits_1": 1.5, "mean_logits_2": 1.25, "logits": 1}})
    target = add(tmp_path / "mge.plan")
    for path, texts in (
        (
            bundle_path,
            ["parity     not measured", "engines    none", "classes    5: bird 0", "fp32 in 3 graphs"],
        ),
        (
            tmp_path / "mge.plan",
            ["parity     out of tolerance: box_1", f"engines    {target}", "mean_logits_1 1.5"],
        ),
    ):
        lines = run(path).output.splitlines()
        assert len(lines) == 10
        assert all(len(line) <= 110 for line in lines[1:])
        for text in ["runs here  onnxruntime on cpu", *texts]:
            assert text in "\n".join(lines)


def test_json_holds_the_whole_manifest(bundle_path):
    values = json.loads(run(bundle_path, "--json").output)
    with Bundle.open(bundle_path) as bundle:
        assert values["manifest"] == json.loads(bundle.manifest.to_json())
        assert values["manifest_sha256"] == bundle.manifest_sha256
        assert values["entries"] == bundle.sizes
    assert values["here"]["backend"] == "onnxruntime"
    assert values["size"] == bundle_path.stat().st_size


def test_it_shows_temperatures_and_exits_in_words(bundle_path, tmp_path):
    assert "calibrated no: probabilities are the model's own and there are no calibrated exits" in flat(
        run(bundle_path)
    )
    path = shutil.copy(bundle_path, tmp_path / "mge.plan")
    values = {
        "temperatures": {"mean_logits_1": 1.3125, "mean_logits_2": 1.5, "logits": 1.07},
        "exits": {"epsilon": 0.01, "delta": 0.05, "thresholds": {"mean_logits_1": 0.93, "mean_logits_2": 0.99997}},
        "data": {"temperatures": {"images": 500, "sha256": "0" * 64}, "exits": {"images": 2000, "sha256": "1" * 64}},
    }
    add_calibration(path, values)
    output = flat(run("--all", path))
    for text in (
        "calibrated temperatures: mean_logits_1 1.312, mean_logits_2 1.5, logits 1.07 (from 500 images)",
        "exits (--exit calibrated): after graph 1 where mean_logits_1 has a confidence of at least 0.93, "
        "after graph 2 where mean_logits_2 has a confidence of at least 0.99997 (from 2000 images)",
        "with probability 95% at most 1% of predictions differ from the whole chain's",
    ):
        assert text in output
    assert json.loads(run(path, "--json").output)["calibration"] == values
    values["exits"]["thresholds"]["mean_logits_1"] = None
    values["runs_on"] = {"backend": "tensorrt", "device": "cuda:0"}
    add_calibration(path, values)
    assert "on images like those, with tensorrt on cuda:0" in flat(run("--all", path))
    assert "exits (--exit calibrated): after graph 2 where mean_logits_2" in flat(run("--all", path))
    add_calibration(path, {**values, "temperatures": {}})
    assert "calibrated cannot be read: calibration.json: temperatures.mean_logits_1 is null; expected" in flat(
        run("--all", path)
    )


def test_it_shows_additions(bundle_path, tmp_path):
    path = shutil.copy(bundle_path, tmp_path / "mge.plan")
    temperatures = {"mean_logits_1": 1.5, "mean_logits_2": 1.25, "logits": 1}
    add_calibration(path, {"temperatures": temperatures})
    target = add(path)
    output = flat(run("--all", path))
    for text in (
        "calibrated temperatures: mean_logits_1 1.5, mean_logits_2 1.25, logits 1 no early exits: none was found that",
        f"engines {target} {target}: 3 graphs, 6 B, experimental: not yet run",
        "built by version 10.3.0, on Orin (sm87), for batch 1 to 8",
        "fp32 (attested: engine): expert_3; fp16 (attested: network): expert_1; fp16 (not attested): expert_2",
        "does not fit: is for linux aarch64, this machine is ",
    ):
        assert text in output
    # Engines of something else are shown as far as they can be read.
    with Bundle.open(path) as bundle:
        digest = bundle.manifest_sha256
    add_engine(path, "foreign", {"expert_3": b"g"}, {"batch": 3, "precision": [], "version": 1}, manifest_sha256=digest)
    assert "foreign: 1 graphs, 1 B, experimental: not yet run not as this version of mge writes it: see --json" in flat(
        run("--all", path)
    )
    assert "does not fit: cannot be read: the bundle has engines for 'foreign'" in flat(run("--all", path))


def add(path):
    """Add engines for a Jetson Orin; nobody looks inside them."""
    orin = Machine.from_json((MACHINES / "jetson-agx-orin-jetpack-6.2.json").read_bytes())
    with Bundle.open(path) as bundle:
        digest, graphs = bundle.manifest_sha256, [graph.name for graph in bundle.manifest.graphs]
    precision = {graph: {"type": "fp32", "attested": "engine"} for graph in ("expert_3",)}
    precision |= {"expert_1": {"type": "fp16", "attested": "network"}, "expert_2": {"type": "fp16"}}
    details = EngineDetails("10.3.0", orin.gpus[0], BatchRange(1, 1, 8), precision, {}, "mge test").to_dict()
    target = "tensorrt-10.3-sm87-linux-aarch64"
    add_engine(path, target, dict.fromkeys(graphs, b"ab"), details, manifest_sha256=digest)
    return target


def test_it_says_what_would_run_on_a_recorded_machine(bundle_path, tmp_path):
    path = shutil.copy(bundle_path, tmp_path / "mge.plan")
    target = add(path)
    orin = MACHINES / "jetson-agx-orin-jetpack-6.2.json"
    output = flat(run("--all", path, "--as-machine", orin))
    for text in (
        "machine NVIDIA Jetson AGX Orin Developer Kit, linux aarch64, Python 3.10.12, cuda:0 Orin (sm87, 16",
        "65.89 GB shared with the CPU, driver for CUDA 12.6, tensorrt 10.3.0",
        f"runs there tensorrt on cuda:0 (experimental: not yet run): the engines {target} in the bundle",
        "engine): expert_3; fp16 (attested: network): expert_1; fp16 (not attested): expert_2 fits the machine",
    ):
        assert text in output
    values = json.loads(run(path, "--as-machine", orin, "--json").output)
    assert values["machine"] == json.loads(orin.read_bytes())
    assert values["here"]["backend"] == "tensorrt"
    assert values["engines"][target]["misfit"] is None
    h100 = json.loads(run(path, "--as-machine", MACHINES / "h100-onnxruntime-gpu.json", "--json").output)
    assert h100["here"]["backend"] == "onnxruntime"
    assert h100["here"]["status"] == "experimental: ran once, on an H100, before its last changes"
    assert [other["backend"] for other in h100["here"]["passed_over"]] == ["tensorrt", "tensorrt-rtx"]
    assert "does not serve sm90 (Hopper)" in h100["here"]["passed_over"][1]["reason"]
    bare = flat(run("--all", bundle_path, "--as-machine", MACHINES / "bare-cpu-x86_64.json"))
    assert "not tensorrt, tensorrt-rtx, onnxruntime on cuda:0: no NVIDIA driver is installed" in bare
    assert "x86_64, Python 3.11.7, no GPU, tensorrt-rtx 1.7.1.116" in bare


def test_engines_in_this_machines_cache_are_shown(bundle_path, tmp_path, monkeypatch):
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path))
    target = Target.parse("tensorrt-10.3-sm87-linux-aarch64")
    (tmp_path / "plan").write_bytes(b"abc")
    details = EngineDetails("10.3.0", None, BatchRange(2, 2, 2), {}, {}, "mge test")
    with Bundle.open(bundle_path) as bundle:
        plans = {"gate": tmp_path / "plan"}
        store_engines(bundle.manifest_sha256, target, Gpu("Orin", "sm87", 1, 16), plans, details)
    output = flat(run("--all", bundle_path))
    assert f"engines {target} in the cache, {tmp_path}" in output
    assert "1 graphs, 3 B, experimental: not yet run built by version 10.3.0, ahead of time" in output
    assert "cache" not in flat(run("--all", bundle_path, "--as-machine", MACHINES / "bare-cpu-x86_64.json"))


def test_this_machine_is_printed_for_whoever_records_it(tmp_path):
    result = run("--machine", tmp_path / "no.plan")
    assert result.exit_code == 0
    machine = Machine.from_json(result.output.encode())
    assert machine == describe_machine(always=True)
    assert "CPUExecutionProvider" in machine.providers


def test_a_recorded_machine_that_cannot_be_read_is_one_line(bundle_path, tmp_path):
    missing = run(bundle_path, "--as-machine", tmp_path / "none.json")
    assert missing.exit_code == 1
    assert "none.json: No such file or directory; expected a machine's description: mge-info" in missing.stderr
    (tmp_path / "bad.json").write_text('{"system": 1}')
    bad = run(bundle_path, "--as-machine", tmp_path / "bad.json")
    assert bad.exit_code == 1
    assert bad.stderr.count("\n") == 1
    assert "bad.json: arch is null; expected this field, which is missing: record the machine again" in bad.stderr


def test_extract_and_verify(bundle_path, tmp_path):
    result = run(bundle_path, "--verify", "--extract", tmp_path / "out")
    assert result.exit_code == 0
    assert "every entry matches its hash" in result.output
    assert "extracted  9 files" in result.output
    assert (tmp_path / "out" / "onnx" / "expert_1.weights").is_file()
    values = json.loads(run(bundle_path, "--json", "--extract", tmp_path / "more").output)
    assert len(values["extracted"]) == 9


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
            "chain": {"class_changes": 1, "answer_relative": 0.002, "box_iou": {"box_1": {"median": 0.99, "p1": 0.75}}},
        }
    },
    "failures": ["box_1: too small"],
    "warnings": [],
}


def test_the_parity_report_is_a_line_for_each_check():
    assert parity_lines(PARITY) == [
        "out of tolerance: box_1: too small",
        "on 12 photographs; reference: the checkpoint",
        "ONNX Runtime: each graph within 1.0e-03 of its tensors' largest value, the chain's logits within 2.0e-03; "
        "1 images change their class; 1st percentile of box IoU 0.750",
    ]
    assert parity_lines(None) == ["not measured"]


@pytest.mark.parametrize(
    "parity", [{}, {"checks": 3}, {"checks": {"a": []}}, {"checks": {"a": {"graphs": {"b": None}}}, "warnings": "x"}]
)
def test_a_report_of_another_shape_does_no_harm(parity):
    assert all(isinstance(line, str) for line in parity_lines(parity))


def test_errors_are_one_line_and_exit_1(bundle_path, tmp_path):
    result = run(tmp_path / "none.plan")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no bundle at ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    damaged = tmp_path / "damaged.plan"
    data = bytearray(bundle_path.read_bytes())
    with Bundle.open(bundle_path) as bundle:
        data[bundle.entry("onnx/expert_3.weights").offset] ^= 1
    damaged.write_bytes(data)
    assert run(damaged).exit_code == 0  # nothing of it was opened
    assert run(damaged, "--verify").exit_code == 1
    (tmp_path / "file").touch()
    assert run(bundle_path, "--extract", tmp_path / "file").exit_code == 1
    assert run(bundle_path, "--no-such-option").exit_code == 2


def test_defects_keep_their_traceback():
    @reports_errors
    def defect():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        defect()


def test_control_characters_of_a_file_do_not_reach_the_terminal(tiny, tmp_path):
    from dataclasses import replace

    from mge_runtime.bundle import write_bundle

    graphs = tiny.make_graphs()
    manifest = replace(tiny.make_manifest(graphs), model={"arch": "\x1b[31mred"})
    write_bundle(tmp_path / "mge.plan", manifest, {g.spec.name: g.model() for g in graphs})
    for options in ([], ["--all"], ["--json"]):
        output = run(tmp_path / "mge.plan", *options).output
        assert "[31mred" in output
        assert "\x1b" not in output
    for bundle in ("\x1b[31mred\x9b.plan", "\udcff.plan"):
        result = run(bundle)
        assert result.stderr.startswith("error: no bundle at ?")
        assert result.stderr[:-1].isprintable()


def test_an_interrupted_extraction_is_one_line(bundle_path, tmp_path, monkeypatch):
    def stop(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("os.fsync", stop)
    result = run(bundle_path, "--extract", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the extraction was interrupted (SIGTERM): ")
    assert result.stderr.count("\n") == 1
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
                        (98_000_000, "98.0 MB"), (2_340_000_000, "2.34 GB")]
)  # fmt: skip
def test_sizes_are_written_for_people(count, text):
    assert format_bytes(count) == text
