"""Every benchmark says how it is called, and those that hold a figure exit with 1 where it is not met."""

import ast
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"mge_benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments_of(script):
    """What a script takes, as it is written in it: options with their dashes, arguments without."""
    takes = {"option", "argument", "add_argument"}
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    first = [call.args[0] for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in takes]
    return [name.value.partition("/")[0] for name in first]


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_every_script_says_how_it_is_called(script, monkeypatch, capsys):
    names = arguments_of(script)
    assert names
    monkeypatch.syspath_prepend(BENCHMARKS)  # they lean on each other
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in names:
        shown = name if name.startswith("-") else f"({name}|{name.upper()})"
        assert re.search(rf"^ *{shown}\b|[ \[]{shown}\b", out, re.MULTILINE), name


@pytest.fixture
def answers():
    """What `mge-eval --predictions` writes for 100 images: one of three classes, a crop of a quarter."""
    classes = np.arange(100) % 3
    views = np.tile(np.array([[0, 0, 100, 100], [10, 10, 60, 60]], np.float32), (100, 1, 1))
    logits = np.eye(3, dtype=np.float32)[classes]
    names = np.array([f"{index}.jpg" for index in range(100)])
    return {"names": names, "logits/mixture": logits, "views": views, "gate": np.full((100, 2), 0.5, np.float32)}


def same_classes(found, count):
    found["logits/mixture"][:count] = np.roll(found["logits/mixture"][:count], 1, 1)


def moved_boxes(found, count):
    found["views"][:count, 1] += 30


@pytest.mark.parametrize(
    ("change", "count", "met"),
    [(same_classes, 0, True), (same_classes, 1, True), (same_classes, 2, False), (moved_boxes, 5, False)],
)
def test_checkpoint_and_bundle(answers, tmp_path, monkeypatch, capsys, change, count, met):
    other = {name: value.copy() for name, value in answers.items()}
    change(other, count)
    np.savez(tmp_path / "checkpoint.npz", **answers)
    np.savez(tmp_path / "bundle.npz", **other)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "checkpoint.npz"), str(tmp_path / "bundle.npz")])
    assert load("bundle_parity").main() == (0 if met else 1)
    assert ("not met: " in capsys.readouterr().out) != met


def test_crops_that_keep_nearly_all_prove_little(answers):
    answers["views"][:, 1] = (0, 0, 90, 90)
    assert "keeps 81 %" in load("bundle_parity").compare(answers, answers)[0]


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize(("seconds", "peak", "met"), [(1.4, 290, True), (1.6, 290, False), (1.4, 400, False)])
def test_opening_is_judged(exported, monkeypatch, options, seconds, peak, met):
    module = load("open_bundle")

    def measure(program, *_):
        bundle = "Pipeline.open" in program
        return {"seconds": seconds if bundle else 1.0, "cpu_seconds": 1.0, "peak_mb": peak if bundle else 1.0}

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "MEMORY_FACTOR", 0)  # 300 MB are left
    result = CliRunner().invoke(module.main, [str(exported.path), "--repeats", "1", *options])
    assert result.exit_code == (0 if met else 1), result.output
    if seconds > 1.5:
        assert CliRunner().invoke(module.main, [str(exported.path), "--limit", "2"]).exit_code == 0
