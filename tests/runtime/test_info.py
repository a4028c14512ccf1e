import json
import shutil

import pytest
from click.testing import CliRunner

from mge_runtime.bundle import Bundle, add_calibration, add_engine
from mge_runtime.cli.common import format_bytes, reports_errors
from mge_runtime.cli.info import main
from mge_runtime.cli.info_parity import parity_lines


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_it_shows_what_is_inside_and_what_runs(bundle_path):
    result = run(bundle_path)
    assert result.exit_code == 0
    for text in (
        "5: bird 0, bird 1",
        "shorter side to 36, centre crop 32 x 32",
        "expert_1: fp32",
        "attested: written by hand",
        "box_1 float32 [batch, 4]",
        "1: ingest, expert_1 -> answer_1",
        "parity     not measured",
        "engines    none",
        "runs here  onnxruntime on cpu",
        "machine    linux ",
    ):
        assert text in result.output
    assert all(len(line) <= 110 for line in result.output.splitlines()[1:])


def test_json_holds_the_whole_manifest(bundle_path):
    values = json.loads(run(bundle_path, "--json").output)
    with Bundle.open(bundle_path) as bundle:
        assert values["manifest"] == json.loads(bundle.manifest.to_json())
        assert values["manifest_sha256"] == bundle.manifest_sha256
        assert values["entries"] == bundle.sizes
    assert values["here"]["backend"] == "onnxruntime"
    assert values["size"] == bundle_path.stat().st_size


def test_it_shows_additions(bundle_path, tmp_path):
    path = shutil.copy(bundle_path, tmp_path / "mge.plan")
    with Bundle.open(path) as bundle:
        digest = bundle.manifest_sha256
    add_calibration(path, {"temperature": 1.5})
    add_engine(path, "tensorrt-10.3-sm87-linux-aarch64", {"gate": b"g"}, {}, manifest_sha256=digest)
    result = run(path)
    assert "tensorrt-10.3-sm87-linux-aarch64: 1 stages, 1 B, experimental: not yet run" in result.output
    assert "temperature 1.5" in result.output


def test_extract_and_verify(bundle_path, tmp_path):
    result = run(bundle_path, "--verify", "--extract", tmp_path / "out")
    assert result.exit_code == 0
    assert "every entry matches its hash" in result.output
    assert "extracted  11 files" in result.output
    assert (tmp_path / "out" / "onnx" / "expert_1.weights").is_file()
    values = json.loads(run(bundle_path, "--json", "--extract", tmp_path / "more").output)
    assert len(values["extracted"]) == 11


PARITY = {
    "source": "12 photographs",
    "reference": "the checkpoint",
    "checks": {
        "onnx": {
            "label": "ONNX Runtime",
            "stages": {
                "expert_1": {
                    "absolute": {"logits_1": 0.25, "box_1": 0.5},
                    "relative": {"logits_1": 0.001},
                    "class_changes": 2,
                    "box_iou": {"median": 1.0, "p1": 0.9512},
                },
                "gate": {"absolute": {"gate": None}, "relative": {"gate": 1e-6}},
            },
            "chain": {"class_changes": 1, "answer_relative": 0.002, "box_iou": {"box_1": {"median": 0.99, "p1": 0.75}}},
        }
    },
    "largest_activation": {"expert_1": {"value": 12.5}},
    "crop_area_median": {"box_1": 0.42},
    "failures": ["box_1: too small"],
    "warnings": [],
}


def test_the_parity_report_is_a_table():
    lines = list(parity_lines(PARITY))
    assert lines[0] == "on 12 photographs; reference: the checkpoint"
    assert [line.split() for line in lines[3:6]] == [
        ["expert_1", "5.0e-01", "1.0e-03", "2", "1.0000", "0.9512"],
        ["gate", "1.0e-06"],
        ["whole", "chain", "2.0e-03", "1", "0.9900", "0.7500"],
    ]
    assert lines[6:] == [
        "largest activations: expert_1 12.5",
        "crops keep a median of: box_1 42%",
        "out of tolerance: box_1: too small",
    ]


@pytest.mark.parametrize(
    "parity", [{}, {"checks": 3}, {"checks": {"a": []}}, {"checks": {"a": {"stages": {"b": None}}}, "warnings": "x"}]
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
        data[bundle.region("onnx/gate.weights").offset] ^= 1
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

    graphs = tiny.make_stages()
    names = ("\x1b[31mred", "b", "c", "d", "e")
    manifest = replace(tiny.make_manifest(graphs), class_names=names)
    write_bundle(tmp_path / "mge.plan", manifest, {g.spec.name: g.model() for g in graphs})
    output = run(tmp_path / "mge.plan").output
    assert "?[31mred" in output
    assert "\x1b" not in output


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
                        (98_000_000, "98.0 MB"), (2_340_000_000, "2.34 GB")]
)  # fmt: skip
def test_sizes_are_written_for_people(count, text):
    assert format_bytes(count) == text
