"""`mge VERB` is `mge-VERB`, and --config gives the verbs their options."""

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import click
import pytest
import tomllib

from mge_runtime.bundle import add_calibration
from mge_runtime.cli.verbs import main
from tests.helpers.commands import fails, run_without, succeeds
from tests.helpers.images import write_clip
from tests.helpers.tiny_models import save_noise
from tests.runtime.tiny_chain import write_tiny_bundle

SCRIPTS = [point for point in distribution("mge").entry_points if point.name.startswith("mge-")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_each_command_is_a_verb(script):
    verb = script.name.removeprefix("mge-")
    assert main.get_command(click.Context(main), verb) is script.load()
    assert f"  {verb} " in succeeds(main, "-h").output


def test_nothing_but_the_verb_asked_for_is_imported():
    code = "import sys; from mge_runtime.cli.verbs import main; main(['info', '-h'], standalone_mode=False); "
    code += "assert not {'mge.cli.train', 'mge_export.cli', 'torch'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: ")
    assert "No such command 'walk'" in fails(main, "walk", code=2)


@pytest.mark.parametrize(
    ("words", "found"), [("mge ru", "run"), ("mge run --vid", "--video"), ("mge --conf", "--config")]
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_verbs_and_options_complete(shell, words, found):
    """As the script of `mge` asks, which the shell evaluates."""
    code = "from mge_runtime.cli.verbs import main; main(prog_name='mge')"

    def run(instruction, **environment):
        environment = os.environ | {"_MGE_COMPLETE": f"{shell}_{instruction}"} | environment
        words = [sys.executable, "-c", code]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    assert f"_MGE_COMPLETE={shell}_complete" in run("source")
    last = words.split()[-1]
    at = last if shell == "fish" else str(len(words.split()) - 1)
    assert found in run("complete", COMP_WORDS=words, COMP_CWORD=at).replace(",", " ").split()


@pytest.mark.parametrize(("verb", "missing"), [("train", "torch"), ("calibrate", "scipy"), ("calibrate", "onnx")])
def test_a_verb_whose_packages_are_missing_says_what_to_install(verb, missing, tmp_path):
    data = save_noise(tmp_path / "data/train", {"a": 4, "b": 4}).parent
    done = run_without([missing], "mge_runtime.cli.verbs", verb, "--data", data)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        f"{missing}, which is not installed; install mge again, with its extra {verb}"
    )


def test_the_base_install_lists_the_verbs():
    absent = ["torch", "torchvision", "timm", "lightning", "scipy", "matplotlib", "onnx", "onnxruntime", "av"]
    assert run_without(absent, "mge_runtime.cli.verbs", "-h").returncode == 0


def test_a_file_gives_options_and_the_command_line_goes_before_them(tmp_path):
    write_tiny_bundle(tmp_path / "mge.plan")
    photo = Path(__file__).parents[1] / "models/photographs/Granny-Smith.jpg"
    config = tmp_path / "mge.toml"
    config.write_text(f'[run]\nengine = "{tmp_path / "mge.plan"}"\ncsv = "-"\ntop-k = 2\n[info]\njson = true\n')
    start = ["--config", config, "run", photo]
    assert "class_name_2" in succeeds(main, *start).output
    assert "class_name_2" not in succeeds(main, *start, "--top-k", 1).output


def test_a_file_serves_images_and_videos(tmp_path):
    """What the command line alone may not combine, a file may hold for several uses; an exit that it names is kept."""
    write_tiny_bundle(tmp_path / "mge.plan")
    thresholds = {"mean_logits_1": 0.0, "mean_logits_2": None}  # all stop after the first graph
    temperatures = dict.fromkeys(("mean_logits_1", "mean_logits_2", "logits"), 1.0)
    exits = {"epsilon": 0.01, "delta": 0.05, "thresholds": thresholds}
    add_calibration(tmp_path / "mge.plan", {"temperatures": temperatures, "exits": exits})
    write_clip(tmp_path / "clip.mp4")
    photo = Path(__file__).parents[1] / "models/photographs/Granny-Smith.jpg"
    config = tmp_path / "mge.toml"
    words = f'[run]\nengine = "{tmp_path / "mge.plan"}"\njson = true\nsmooth = 0.5\nbatch = 2\ntop-k = 2\n'
    for exit, experts in (("", 1), ('exit = "never"\n', 3)):
        config.write_text(words + exit)
        lines = succeeds(main, "--config", config, "run", "--video", tmp_path / "clip.mp4").stdout.splitlines()
        assert [json.loads(line)["experts_used"] for line in lines] == [experts] * 5
        assert json.loads(succeeds(main, "--config", config, "run", photo).stdout)["experts_used"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[walk]\n", "'walk' is no table of a verb of mge"),
        ("threads = 2\n", "'threads' is no table of a verb of mge"),
        ("[run]\nthreds = 2\n", "'threds' is no option of mge run; mge run -h lists them"),
        ("[run]\nthreads = 1.5\n", "threads is 1.5: '1.5' is not a valid integer"),
        ("[run]\n[run.engine]\nfile = 1\n", "engine is a table; expected a value of the option --engine"),
        ("[run\n", "expected a TOML file"),
    ],
)
def test_a_file_with_a_mistake_is_one_line(tmp_path, content, message):
    (tmp_path / "mge.toml").write_text(content)
    assert message in fails(main, "--config", tmp_path / "mge.toml", "run", "x.jpg")


def test_options_of_a_file_go_before_those_of_a_recipe(tmp_path):
    data = save_noise(tmp_path / "data/train", {"a": 4, "b": 4}).parent
    tiny = f'init = "none"\narch = "test_resnet"\nimage-size = 64\nexperts = 2\ndata = "{data}"\nworkers = 0\n'
    (tmp_path / "mge.toml").write_text(f'[train]\nrecipe = "paper"\nbatch-size = 4\nepochs = 1\n{tiny}')
    succeeds(main, "--config", tmp_path / "mge.toml", "train", "--accelerator", "cpu", "--out", tmp_path / "run")
    kept = tomllib.loads((tmp_path / "run/options.toml").read_text())
    assert (kept["batch-size"], kept["epochs"], kept["optimizer"]) == (4, 1, "sgd")
