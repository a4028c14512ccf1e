"""mge-train as a user types it."""

import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import tomllib
import torch
from safetensors.torch import save_file

from mge.backbones import create_backbone
from mge.checkpoint import load_checkpoint, read_training, save_checkpoint
from mge.cli.train import main as train
from mge.model import MGENet
from tests.helpers.commands import fails, run_without, succeeds
from tests.helpers.tiny_models import save_noise, tiny_config

QUICK = ["--batch-size", "4", "--epochs", "1", "--accelerator", "cpu", "--workers", "0"]
TINY = ["--arch", "test_resnet", "--image-size", "64", "--experts", "2", *QUICK]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    for split, count in (("train", 4), ("val", 2)):
        save_noise(folder / split, {"a": count, "b": count})
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, succeeds(train, "--data", data, "--out", out, "--init", "none", *TINY).output


def test_training_says_what_it_does_and_what_comes_next(trained):
    out, text = trained
    assert "8 training and 4 validation images of 2 classes; 2 x test_resnet at 64, 32 px" in text
    assert f"mge-export --ckpt {out / 'best.pt'}" in text
    config = load_checkpoint(out / "best.pt").config
    assert (config.classes, config.resize) == (("a", "b"), 73)
    assert "kept in best.pt: the latest epoch within one standard error" in text
    assert " s  kept\n" in text
    assert read_training(out / "last.pt")["options"]["crop_area"] == (0.5,)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (("command",), None, "cannot be taken up (KeyError: 'command')"),
        (("options",), [], "cannot be taken up"),
        (("options", "epochs"), "x", "cannot be taken up"),
        (("progress", "foo"), 1, "cannot be taken up"),
        (("optimizer", "param_groups"), [], "different number of parameter groups"),
        (("command", "workers"), -3, "with a --workers that is none: -3 is not in the range"),
        (("command", "data"), 5, "with a --data that is none"),
    ],
)
def test_a_training_state_that_does_not_fit_is_refused_in_one_line(trained, tmp_path, key, value, named):
    last = trained[0] / "last.pt"
    training = read_training(last)
    at = training
    for name in key[:-1]:
        at = at[name]
    at[key[-1]] = value
    if value is None:
        del at[key[-1]]
    save_checkpoint(tmp_path / "last.pt", load_checkpoint(last), training=training)
    assert named in fails(train, "--resume", tmp_path / "last.pt", "--epochs", "2")


def test_a_threshold_is_fixed_or_follows_an_area_not_both(data):
    start = ["--data", data, "--init", "none", *TINY, "--crop-area", "0.5"]
    assert "give one of them" in fails(train, *start, "--box-threshold", "0.3", code=2)


def test_command_line_before_file_before_recipe_and_the_options_of_a_run_repeat_it(data, tmp_path):
    (tmp_path / "mine.toml").write_text(
        f'data = "{data}"\nrecipe = "modern"\ninit = "none"\narch = "test_resnet"\nexperts = 2\n'
        'image_sizes = [96, 64]\nbatch-size = 4\nepochs = 2\naccelerator = "cpu"\nworkers = 0\n'
        "head-lr = 0.003\nweight_decay = 0.02\nmean = [0.4, 0.5, 0.6]\nflip = false\nbox_threshold = 0.3\ndistill = 1\n"
    )
    succeeds(train, "--config", tmp_path / "mine.toml", "--out", tmp_path / "a", "--weight-decay", "0.03", *QUICK[:2])
    kept = tomllib.loads((tmp_path / "a/options.toml").read_text())
    assert (kept["weight-decay"], kept["head-lr"], kept["optimizer"], kept["epochs"]) == (0.03, 0.003, "adamw", 2)
    assert (kept["image-sizes"], kept["mean"], kept["flip"]) == ([96, 64], [0.4, 0.5, 0.6], False)
    assert (kept["box-threshold"], kept["crop-area"]) == ([0.3], [])  # one decides for both
    assert not {"out", "resume", "overwrite", "config"} & kept.keys()
    succeeds(train, "--config", tmp_path / "a/options.toml", "--out", tmp_path / "b")
    for name in ("options.toml", "best.pt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (tmp_path / "c.toml").write_text("head-lr = 0.5\n")
    again = ["--resume", tmp_path / "b/last.pt", "--config"]
    assert "--head-lr 0.003, now it is 0.5" in fails(train, *again, tmp_path / "c.toml")
    succeeds(train, *again, tmp_path / "a/options.toml", "--epochs", "3")


def test_one_of_the_options_about_sizes_decides(data, tmp_path):
    start = ["--data", data, "--init", "none", *TINY]
    line = fails(train, *start, "--image-sizes", "96,64", code=2)
    assert "--image-size 64 is not the first of --image-sizes 96,64; give one of them" in line
    mine = tmp_path / "mine.toml"
    mine.write_text("image-sizes = [96, 64]\n")
    succeeds(train, *start, "--config", mine, "--out", tmp_path / "a")
    assert load_checkpoint(tmp_path / "a/last.pt").config.sizes == (64, 32)
    succeeds(train, "--config", tmp_path / "a/options.toml", "--image-sizes", "96,64", "--out", tmp_path / "b")
    assert load_checkpoint(tmp_path / "b/last.pt").config.sizes == (96, 64)
    again = ["--config", tmp_path / "b/options.toml", "--image-size", "96", "--epochs", "2"]
    succeeds(train, "--resume", tmp_path / "b/last.pt", *again)  # as the run has it, whatever the file says beside it
    mine.write_text("image-size = 64\nimage-sizes = [96, 64]\n")
    assert "give one of them" in fails(train, "--data", data, "--config", mine, code=2)


def test_no_recipe_beside_a_file_of_another(data, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('recipe = "modern"\n')
    start = ["--data", data, "--config", mine, "--out", tmp_path / "run", "--init", "none", *TINY, "--recipe"]
    assert "of recipe modern; leave --recipe out" in fails(train, *start, "paper", code=2)
    assert not (tmp_path / "run").exists()
    succeeds(train, *start, "modern", "--dry-run")


def test_an_option_overrides_a_recipe(data, tmp_path):
    start = ["--data", data, "--init", "none", *TINY, "--recipe", "paper", "--crop-area", "0.4", "--out", tmp_path]
    succeeds(train, *start)
    assert read_training(tmp_path / "last.pt")["options"]["crop_area"] == (0.4,)
    assert load_checkpoint(tmp_path / "last.pt").config.sizes == (64, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("head_rate = 1", "'head_rate' is no option of "),
        ("version = true", "'version' is no option of "),
        ("config = 'other.toml'", "'config' is no option of "),
        ("[model]\nexperts = 2", "'model' is no option of "),
        ("epochs = 1.5", "epochs is 1.5: '1.5' is not a valid integer"),
        ("epochs = true", "epochs is true: 'True' is not a valid integer"),
        ("flip = 'never'", "flip is \"never\": 'never' is not a valid boolean"),
        ("gate = 'none of these'", 'gate is "none of these": '),
        ("mean = [0.5, 0.5]", "mean is [0.5, 0.5]: "),
        ("mean = 0.5", "mean is 0.5: "),
        ("ema = 1", "ema is 1: 1.0 is not in the range 0<=x<1"),
        ("image-sizes = '448,half'", "expected pixels separated by commas"),
        ("epochs = 1\nepochs = 2", "expected a TOML file"),
        ("\xff", "expected a TOML file"),
        (None, "expected a TOML file"),
    ],
)
def test_a_bad_file_of_options_is_named_with_its_key(data, tmp_path, content, message):
    file = tmp_path / "mine.toml"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    line = fails(train, "--data", data, "--config", file)
    assert str(file) in line
    assert message in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((f"--{name}", "nan") for name in ("crop-area", "clip-norm", "box-threshold", "label-smoothing")),
        *((f"--{name}", value) for name in ("head-lr", "backbone-lr", "weight-decay") for value in ("nan", "inf")),
    ],
)
def test_what_is_no_finite_number_is_a_usage_error(data, tmp_path, option, value):
    start = ["--data", data, "--out", tmp_path / "run", "--init", "none", *TINY]
    assert f"'{option}': '{value}' is no finite number" in fails(train, *start, option, value, code=2)


def test_resume_alone_goes_on(trained, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    last = out / "last.pt"
    succeeds(train, "--resume", last)  # it is finished: nothing to do
    done = succeeds(train, "--resume", last, "--epochs", "2", "--image-size", "64", "--init", "none")
    assert (out / "metrics.csv").read_text().count("\n") == 3
    assert "2 epochs instead of 1" in done.output
    assert "--image-size 64, now it is 96" in fails(train, "--resume", last, "--image-size", "96")
    assert "--head-lr 0.004, now it is 0.5" in fails(train, "--resume", last, "--head-lr", "0.5")
    assert "epochs = 2 (now 1)" in fails(train, "--resume", last, "--epochs", "1")
    assert "no training state" in fails(train, "--resume", out / "best.pt")
    shutil.copytree(data, tmp_path / "fewer")
    (tmp_path / "fewer/train/a/0.png").unlink()
    done = succeeds(train, "--resume", last, "--data", tmp_path / "fewer", "--epochs", "3")
    assert "was trained on 8 images" in done.output


def test_a_run_goes_on_in_another_folder_with_the_model_that_it_kept_and_replaces_none(trained, data, tmp_path):
    last, out = trained[0] / "last.pt", tmp_path / "elsewhere"
    succeeds(train, "--resume", last, "--out", out)
    assert (out / "best.pt").read_bytes() == (trained[0] / "best.pt").read_bytes()
    (out / "last.pt").write_text("another run's")
    assert f"{out} holds a run already" in fails(train, "--resume", last, "--out", out)
    assert "holds a run already" in fails(train, "--data", data, "--out", out, "--init", "none", *TINY)
    assert (out / "last.pt").read_text() == "another run's"
    succeeds(train, "--resume", last, "--out", out, "--overwrite")  # it is finished: only what it kept is there
    assert {path.name for path in out.iterdir() if path.is_file()} == {"best.pt", "options.toml"}


def test_what_a_run_replaces_is_gone_before_it_begins(trained, data, tmp_path):
    out, folder = tmp_path / "run", shutil.copytree(data, tmp_path / "data")
    image = folder / "val/a/0.png"
    image.write_bytes(image.read_bytes()[:-100])  # found when it is decoded, in the first validation
    out.mkdir()
    shutil.copy(trained[0] / "best.pt", out)
    start = ["--data", folder, "--out", out, "--init", "none", *TINY]
    assert f"{out} holds a run already; replace it (--overwrite)" in fails(train, *start)
    assert [path.name for path in out.iterdir()] == ["best.pt"]
    shutil.copytree(trained[0], out, dirs_exist_ok=True)
    assert "cannot decode" in fails(train, *start, "--overwrite")
    assert not {"best.pt", "last.pt", "metrics.csv", "curves.png"} & {path.name for path in out.iterdir()}


@pytest.mark.parametrize("other", [True, False], ids=["other classes", "the same classes"])
def test_a_model_is_fine_tuned(trained, data, tmp_path, other):
    best, folder = trained[0] / "best.pt", shutil.copytree(data, tmp_path / "data")
    if other:
        for split in ("train", "val"):
            shutil.copytree(folder / split / "b", folder / split / "c")
    start = ["--data", folder, "--init", best, *QUICK, "--recipe", "paper"]
    still = ["--backbone-lr", "1e-12", "--head-lr", "1e-12", "--weight-decay", "0"]
    done = succeeds(train, *start, *still, "--out", tmp_path / "run")
    (line,) = (line for line in done.output.splitlines() if "validation images of" in line)
    assert ("heads anew for 3 classes (it knows 2)" if other else "all weights from") in line
    assert "2 x test_resnet at 64, 32 px" in line
    tuned, source = load_checkpoint(tmp_path / "run/best.pt"), load_checkpoint(best)
    assert tuned.config.box_thresholds == (0.2,)
    mine, theirs = (dict(model.named_parameters()) for model in (tuned, source))
    kept = {key for key in mine if mine[key].shape == theirs[key].shape and torch.allclose(mine[key], theirs[key])}
    heads = {key for key in mine if any(f".{head}" in key for head in ("global_head", "part_", "concat_head"))}
    assert kept == (set(mine) - heads if other else set(mine))
    succeeds(train, "--resume", tmp_path / "run/last.pt", "--arch", "test_resnet")
    assert "has experts 2, not 3" in fails(train, *start, "--out", tmp_path / "x", "--experts", "3")
    if not other:
        assert "all weights but the gate from" in succeeds(train, *start, "--gate", "network", "--dry-run").output
    assert "experts at 128, 64 px" in succeeds(train, *start, "--image-size", "128", "--dry-run").output


def test_areas_are_counted_by_the_experts_of_the_model_that_is_fine_tuned(data, trained, tmp_path):
    (tmp_path / "run").mkdir()
    start = ["--data", data, "--out", tmp_path / "run", *QUICK, "--crop-area", "0.3", "--crop-area", "0.5"]
    two = ["--init", trained[0] / "best.pt"]
    assert "2 x --crop-area; expected one, or one for each of the 1 crops" in fails(train, *start, *two, code=2)
    assert not list((tmp_path / "run").iterdir())
    start += ["--crop-area", "0.6"]
    assert "each of the 2 crops" in fails(train, *start, "--arch", "test_resnet", "--init", "none", code=2)
    save_checkpoint(tmp_path / "four.pt", MGENet(tiny_config(4, "ab")))
    succeeds(train, *start, "--init", tmp_path / "four.pt", "--dry-run")


@pytest.mark.parametrize("gate", ["network", "none"])
def test_a_chain_starts_from_a_single_network(data, tmp_path, gate):
    start = ["--data", data, *QUICK, "--head-lr", "1e-12", "--backbone-lr", "0"]
    single = ["--arch", "test_resnet", "--image-size", "64", "--experts", "1", "--init", "none"]
    succeeds(train, *start, *single, "--out", tmp_path / "one")
    chain = ["--init", tmp_path / "one/best.pt", "--experts", "3", "--gate", gate, "--source-size", "128"]
    done = succeeds(train, *start, *chain, "--image-sizes", "64,32,32", "--out", tmp_path / "three")
    assert "each begins as the single network" in done.output
    one, three = (load_checkpoint(tmp_path / run / "best.pt") for run in ("one", "three"))
    assert (three.config.sizes, three.config.source_size, three.config.resize) == ((64, 32, 32), 128, 146)
    assert len(three.config.box_thresholds) == 2
    backbone = dict(one.experts[0].backbone.named_parameters())
    for part in (*three.experts, *([three.gate] if gate == "network" else [])):
        assert all(torch.equal(value, backbone[name]) for name, value in part.backbone.named_parameters())
    heads = [expert.concat_head.weight for expert in (*one.experts, *three.experts)]
    assert all(torch.allclose(head, heads[0], atol=1e-9) for head in heads)


def test_the_sizes_of_a_chain_are_not_those_of_its_single_network(data, tmp_path):
    config = tiny_config(1, "ab", image_sizes=(64,))
    save_checkpoint(tmp_path / "one.pt", MGENet(config))
    start = ["--data", data, *QUICK, "--init", tmp_path / "one.pt", "--dry-run"]
    for more, sizes in (
        ([], "64, 64, 64"),
        (["--image-size", "96"], "96, 96, 96"),
        (["--image-sizes", "96,64,64"], "96, 64, 64"),
    ):
        assert f"experts at {sizes} px" in succeeds(train, *start, "--experts", "3", *more).output
    assert "one.pt is a single network" in (line := fails(train, *start, "--image-sizes", "96,64,64"))
    assert "add --experts 3" in line


def test_what_balances_no_gate_is_said(data):
    start = ["--data", data, "--init", "none", *TINY, "--gate-balance", "1", "--dry-run"]
    assert "note: --gate-balance does nothing without a gate to train" in succeeds(train, *start).stderr
    assert "--gate-balance" not in succeeds(train, *start, "--gate", "shared").stderr


@pytest.mark.parametrize("option", [["--distill", "1"], ["--sharing", "backbone"]])
def test_what_does_nothing_to_a_single_network_is_said(data, option):
    start = ["--data", data, "--init", "none", *TINY, *option, "--dry-run"]
    assert f"{option[0]} does nothing" not in succeeds(train, *start).stderr
    assert f"note: {option[0]} does nothing for a single network" in succeeds(train, *start, "--experts", "1").stderr


def test_frozen_layers_keep_their_weights_and_statistics(data, tmp_path):
    start = ["--data", data, *TINY, "--init", "none", "--out", tmp_path / "run", "--freeze"]
    assert "--freeze 3: expected a stride of its features, 2, 4, 8, 16, 32" in fails(train, *start, 3)
    assert not (tmp_path / "run").exists()
    succeeds(train, *start, 4)
    last = tmp_path / "run/last.pt"
    before = load_checkpoint(last).state_dict()
    succeeds(train, "--resume", last, "--epochs", 2)
    after = load_checkpoint(last).state_dict()
    changed = {
        name.partition("backbone.")[2].partition(".")[0] for name in after if not after[name].equal(before[name])
    }
    assert changed == {"", "layer2", "layer3", "layer4"}  # "": heads and gate
    assert {"conv1", "bn1", "layer1"} < {name for name, _ in load_checkpoint(last).experts[0].backbone.named_children()}


def test_two_trainings_never_share_a_folder(data, tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    start = ["--data", data, "--out", tmp_path, "--init", "none", "--recipe", "paper", *TINY]
    assert "another training is writing" in fails(train, *start)
    os.close(handle)
    (tmp_path / "probe").write_text("the user's")
    succeeds(train, *start)
    assert (tmp_path / "probe").read_text() == "the user's"
    assert read_training(tmp_path / "last.pt")["options"]["crop_area"] == ()
    assert load_checkpoint(tmp_path / "last.pt").config.box_thresholds == (0.2,)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("option", ["--resume", "--init"])
def test_a_pipe_is_no_checkpoint(data, tmp_path, option):
    os.mkfifo(tmp_path / "pipe")
    start = ["--data", data, "--out", tmp_path / "x", option]
    assert "is a pipe, a socket or a device" in fails(train, *start, tmp_path / "pipe")
    assert "is a directory" in fails(train, *start, tmp_path)


def test_every_backbone_starts_from_the_file(data, tmp_path):
    torch.manual_seed(5)
    weights = create_backbone("test_resnet")[0].state_dict()
    file = tmp_path / "w.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, file)
    start = ["--data", data, "--out", tmp_path / "run", "--init", file, *TINY, "--box-threshold", "0.3"]
    succeeds(train, *start, "--recipe", "paper", "--backbone-lr", "0", "--weight-decay", "0")
    model = load_checkpoint(tmp_path / "run/best.pt")
    assert model.config.box_thresholds == (0.3,)
    for part in (*model.experts, model.gate):
        for name, parameter in part.backbone.named_parameters():
            assert torch.equal(parameter, weights[name].half().float())


def test_bad_input_gets_one_line(data, tmp_path, monkeypatch):
    weights = tmp_path / "foreign.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, weights)
    start = ["--data", data, "--out", tmp_path / "x", *TINY, "--init"]
    assert "weights of another architecture" in fails(train, *start, weights)
    assert "is no file" in fails(train, *start, tmp_path / "absent.safetensors")
    weights.write_text("not weights")
    assert "not a safetensors file" in fails(train, *start, weights)
    start.append("none")
    assert "no folder" in fails(train, *start, "--data", tmp_path / "nothing")
    shutil.copytree(data, tmp_path / "spoiled")
    (tmp_path / "spoiled/train/New Folder").mkdir()
    (tmp_path / "spoiled/train/._x.jpg").touch()
    assert "New Folder holds no image" in fails(train, *start, "--data", tmp_path / "spoiled")
    assert "arch is 'nonsense'" in fails(train, *start, "--arch", "nonsense")
    assert "expected features at 16 and 32" in fails(train, *start, "--arch", "vit_tiny_patch16_224")
    (tmp_path / "file").touch()
    assert "file/run: Not a directory" in fails(train, *start, "--out", tmp_path / "file/run")
    assert "does not exist" in fails(train, "--data", data, "--accelerator", "cpu", "--resume", tmp_path / "absent.pt")
    assert "cannot train with --accelerator tpux" in fails(train, *start, "--accelerator", "tpux")
    assert "cannot train with --accelerator cpu --devices abc" in fails(train, *start, "--devices", "abc")
    assert "expected at most 1e-05 megapixels" in fails(train, *start, "--max-pixels", "10")
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "2"), ("GROUP_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)  # as torchrun does
    assert "torchrun started 2 processes on this machine, --devices asks for 3" in fails(
        train, *start, "--devices", "3"
    )
    assert not (tmp_path / "x/best.pt").exists()


WITHOUT_TORCH = """
import json, sys
sys.modules |= dict.fromkeys(["torch", "torchvision", "timm", "lightning"])  # importing them fails
from click.testing import CliRunner
from mge.cli.train import main as train
from mge_export.cli import main as export
lines = json.loads(sys.argv[1])
print(json.dumps([CliRunner().invoke({"train": train, "export": export}[line[0]], line[1:]).stderr for line in lines]))
"""


def test_a_python_of_devices_says_what_it_cannot_read():
    run = functools.partial(run_without, ["tomllib"], "mge.cli.train")
    assert run("-h").returncode == 0
    done = run("--config", "mine.toml")
    assert done.stderr == "error: cannot read --config: this Python has no tomllib; it needs 3.11 or newer\n"
    assert done.returncode == 1


def test_bad_options_are_refused_before_pytorch_is_loaded(trained, data, tmp_path):
    content = torch.load(trained[0] / "last.pt")
    content["training"]["options"]["epochs"] = content["training"]["command"]["epochs"] = 3
    torch.save(content, tmp_path / "last.pt")
    (tmp_path / "text.pt").write_text("text")
    shutil.copytree(data, tmp_path / "other")
    for split in ("train", "val"):
        (tmp_path / "other" / split / "b").rename(tmp_path / "other" / split / "c")
    start = ["train", "--data", data, "--out", tmp_path / "x", *TINY, "--init", "none"]
    resume = ["train", "--resume", tmp_path / "last.pt"]
    export = ["export", "--ckpt", trained[0] / "best.pt"]
    expected = {
        "arch is 'hf-hub:x/y'; expected a CNN of timm itself": [*start, "--arch", "hf-hub:x/y"],
        "resize is 40; expected at least image_size": [*start, "--resize", "40"],
        "image_size is 50; expected a multiple of 16": [*start, "--image-size", "50"],
        "box_thresholds is (0.1, 0.2); expected 1": [*start, "--box-threshold", "0.1", "--box-threshold", "0.2"],
        "text.pt is a text file": [*start, "--init", tmp_path / "text.pt"],
        "epochs = 3 (now 2); expected no fewer": [*resume, "--epochs", "2"],
        "with --head-lr 0.004, now it is 0.5": [*resume, "--head-lr", "0.5"],
        "holds a model but no training state": ["train", "--resume", trained[0] / "best.pt"],
        "data folder has 2 others": [*resume, "--data", tmp_path / "other"],
        "does not exist; make it or name another place": [*export, "-o", tmp_path / "none/x.plan"],
        "--verify-images 0 takes all images": [*export, "--verify-images", "0"],
    }
    lines = json.dumps([[str(word) for word in words] for words in expected.values()])
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, lines], capture_output=True, text=True, check=True)
    for message, said in zip(expected, json.loads(done.stdout), strict=True):
        assert message in said.strip().splitlines()[-1]
        assert said.startswith(("error: ", "Usage: "))
