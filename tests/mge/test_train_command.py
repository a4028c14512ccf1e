"""mge-train and mge-eval as a user types them."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from mge.backbones import create_backbone
from mge.checkpoint import load_checkpoint, read_checkpoint
from mge.cli.evaluate import main as evaluate
from mge.cli.field_guide import main as field_guide
from mge.cli.train import main as train

TINY = ["--arch", "test_resnet", "--image-size", "64", "--batch-size", "4", "--epochs", "1", "--accelerator", "cpu",
        "--workers", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(
                    folder / split / name / f"{i}.png"
                )
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = CliRunner().invoke(train, ["--data", str(data), "--out", str(out), "--init", "none", *TINY])
    assert done.exit_code == 0, done.output
    return out, done.output


def fails(command, *arguments):
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize("command", [train, evaluate, field_guide])
def test_every_command_has_a_short_help_and_a_version(command):
    assert CliRunner().invoke(command, ["-h"]).output.startswith("Usage: ")
    assert version("mge") in CliRunner().invoke(command, ["--version"]).output


def test_training_says_what_it_does_and_what_comes_next(trained):
    out, text = trained
    assert "8 training and 4 validation images of 2 classes; 3 x test_resnet at 64 px" in text
    assert f"mge-export --ckpt {out / 'best.pt'}" in text
    config = load_checkpoint(out / "best.pt").config
    assert (config.classes, config.resize) == (("a", "b"), 73)
    assert "kept in best.pt: the latest epoch within one standard error" in text
    assert " s  kept\n" in text
    assert read_checkpoint(out / "last.pt").training["options"]["crop_area"] == 0.5


def test_the_paper_s_recipe_keeps_its_threshold(data, tmp_path):
    start = ["--data", str(data), "--init", "none", *TINY]
    for name, options in (("paper", ["--recipe", "paper"]), ("fixed", ["--box-threshold", "0.3"])):
        done = CliRunner().invoke(train, [*start, "--out", str(tmp_path / name), *options])
        assert done.exit_code == 0, done.output
        stored = read_checkpoint(tmp_path / name / "last.pt")
        assert stored.training["options"]["crop_area"] is None
        assert stored.model.config.box_thresholds == ((0.2, 0.2) if name == "paper" else (0.3, 0.3))
    both = CliRunner().invoke(train, [*start, "--box-threshold", "0.3", "--crop-area", "0.5"])
    assert (both.exit_code, "give one of them" in both.stderr) == (2, True)


def test_resume_alone_goes_on(trained, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    last = out / "last.pt"
    assert CliRunner().invoke(train, ["--resume", str(last)]).exit_code == 0  # it is finished: nothing to do
    done = CliRunner().invoke(train, ["--resume", str(last), "--epochs", "2", "--image-size", "64", "--init", "none"])
    assert done.exit_code == 0, done.output
    assert (out / "metrics.csv").read_text().count("\n") == 3
    assert "2 epochs instead of 1" in done.output
    assert "--image-size 64, now it is 96" in fails(train, "--resume", last, "--image-size", "96")
    assert "--head-lr 0.01, now it is 0.5" in fails(train, "--resume", last, "--head-lr", "0.5")
    assert "epochs = 2 (now 1)" in fails(train, "--resume", last, "--epochs", "1")
    assert "no training state" in fails(train, "--resume", out / "best.pt")
    shutil.copytree(data, tmp_path / "fewer")
    (tmp_path / "fewer/train/a/0.png").unlink()
    done = CliRunner().invoke(train, ["--resume", str(last), "--data", str(tmp_path / "fewer"), "--epochs", "3"])
    assert done.exit_code == 0, done.output
    assert "was trained on 8 images" in done.output


def test_a_run_goes_on_in_another_folder_with_the_model_that_it_kept(trained, tmp_path):
    last, out = trained[0] / "last.pt", tmp_path / "elsewhere"
    done = CliRunner().invoke(train, ["--resume", str(last), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert (out / "best.pt").read_bytes() == (trained[0] / "best.pt").read_bytes()
    (out / "last.pt").write_text("another run's")
    assert f"{out} holds a run already" in fails(train, "--resume", last, "--out", out)
    assert (out / "last.pt").read_text() == "another run's"


def test_a_model_is_fine_tuned_for_other_classes(trained, data, tmp_path):
    best = trained[0] / "best.pt"
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        shutil.copytree(data / split, tmp_path / "data" / split)
        shutil.copytree(data / split / "b", tmp_path / "data" / split / "c")
    rates = ["--backbone-lr", "1e-12", "--head-lr", "1e-12", "--weight-decay", "0"]
    here = ["--batch-size", "4", "--epochs", "1", "--accelerator", "cpu", "--workers", "0"]
    for name, folder, said in (
        ("other", tmp_path / "data", "heads anew for 3 classes (it knows 2)"),
        ("same", data, "all weights from"),
    ):
        out = tmp_path / name
        arguments = ["--data", str(folder), "--out", str(out), "--init", str(best), *rates, *here]
        done = CliRunner().invoke(train, arguments)
        assert done.exit_code == 0, done.output
        (line,) = (line for line in done.output.splitlines() if "validation images of" in line)
        assert said in line
        assert "3 x test_resnet at 64 px" in line
        mine, theirs = (dict(load_checkpoint(path).named_parameters()) for path in (out / "best.pt", best))
        kept = {key for key in mine if mine[key].shape == theirs[key].shape and torch.allclose(mine[key], theirs[key])}
        heads = {key for key in mine if any(f".{head}" in key for head in ("global_head", "part_", "concat_head"))}
        assert kept == (set(mine) - heads if name == "other" else set(mine))
    done = CliRunner().invoke(train, ["--resume", str(tmp_path / "other/last.pt"), "--arch", "test_resnet"])
    assert done.exit_code == 0, done.output
    start = ["--data", data, "--out", tmp_path / "x", "--init", best, *here]
    assert "has experts 3, not 2" in fails(train, *start, "--experts", "2")
    paper = ["--data", data, "--out", tmp_path / "paper", "--init", best, *rates, *here, "--recipe", "paper"]
    assert CliRunner().invoke(train, [str(argument) for argument in paper]).exit_code == 0
    assert load_checkpoint(tmp_path / "paper/best.pt").config.box_thresholds == (0.2, 0.2)


def test_two_trainings_never_share_a_folder(data, tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    start = ["--data", data, "--out", tmp_path, "--init", "none", *TINY]
    assert "another training is writing" in fails(train, *start)
    os.close(handle)
    (tmp_path / "probe").write_text("the user's")
    assert CliRunner().invoke(train, [str(argument) for argument in start]).exit_code == 0
    assert (tmp_path / "probe").read_text() == "the user's"


@pytest.mark.timeout(100)
def test_a_pipe_is_no_checkpoint(data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    start = ["--data", data, "--out", tmp_path / "x"]
    for option in ("--resume", "--init"):
        assert "is a pipe, a socket or a device" in fails(train, *start, option, tmp_path / "pipe")
        assert "is a directory" in fails(train, *start, option, tmp_path)


def test_the_table_of_a_checkpoint(trained, data, tmp_path):
    out, _ = trained
    arguments = ["--ckpt", str(out / "best.pt"), "--data", str(data), "--workers", "0"]
    text = CliRunner().invoke(evaluate, arguments).output
    for name in ("expert 1 global", "expert 2 parts", "expert 3", "average", "mixture", "gate %", "crop area %"):
        assert name in text
    file = tmp_path / "predictions.npz"
    result = json.loads(CliRunner().invoke(evaluate, [*arguments, "--json", "--predictions", str(file)]).output)
    assert result["images"] == 6
    assert sum(result["gate"]) == pytest.approx(1, abs=1e-5)
    with np.load(file) as stored:
        right = stored["logits/mixture"].argmax(1) == stored["labels"]
    assert result["heads"][-1]["top1"] == pytest.approx(right.mean())


def test_a_single_expert_has_no_mixture(data, tmp_path):
    done = CliRunner().invoke(
        train, ["--data", str(data), "--out", str(tmp_path), "--init", "none", "--experts", "1", *TINY]
    )
    assert done.exit_code == 0, done.output
    result = CliRunner().invoke(
        evaluate, ["--ckpt", str(tmp_path / "best.pt"), "--data", str(data), "--json", "--workers", "0"]
    )
    assert [row["name"] for row in json.loads(result.output)["heads"]] == [
        "expert 1 global",
        "expert 1 parts",
        "expert 1",
    ]


def test_every_backbone_starts_from_the_file(data, tmp_path):
    torch.manual_seed(5)
    backbone, _, _ = create_backbone("test_resnet")
    save_file(
        {name: tensor.half().contiguous() for name, tensor in backbone.state_dict().items()}, tmp_path / "w.safetensors"
    )
    done = CliRunner().invoke(
        train,
        ["--data", str(data), "--out", str(tmp_path / "run"), "--init", str(tmp_path / "w.safetensors"), *TINY,
         "--backbone-lr", "0", "--weight-decay", "0"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    state = load_checkpoint(tmp_path / "run/best.pt").state_dict()
    first = next(name for name, _ in backbone.named_parameters())
    for place in ("experts.0", "experts.1", "experts.2", "gate"):
        assert torch.equal(state[f"{place}.backbone.{first}"], backbone.state_dict()[first].half().float())


def test_bad_input_gets_one_line(data, tmp_path):
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
    assert "resize is 40" in fails(train, *start, "--resize", "40")
    (tmp_path / "file").touch()
    assert "cannot make folder" in fails(train, *start, "--out", tmp_path / "file/run")
    assert "does not exist" in fails(train, "--data", data, "--accelerator", "cpu", "--resume", tmp_path / "absent.pt")
    assert "cannot train with --accelerator tpux" in fails(train, *start, "--accelerator", "tpux")
    assert "cannot train with --accelerator cpu --devices abc" in fails(train, *start, "--devices", "abc")
    assert "expected at most 1e-05 megapixels" in fails(train, *start, "--max-pixels", "10")
    assert "image_size is 50" in fails(train, *start, "--image-size", "50")
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


def test_bad_options_are_refused_before_pytorch_is_loaded(trained, data, tmp_path):
    content = torch.load(trained[0] / "last.pt")
    content["training"]["options"]["epochs"] = content["training"]["command"]["epochs"] = 3
    torch.save(content, tmp_path / "last.pt")
    (tmp_path / "text.pt").write_text("text")
    start = ["train", "--data", data, "--out", tmp_path / "x", *TINY, "--init", "none"]
    resume = ["train", "--resume", tmp_path / "last.pt"]
    best, thresholds = (
        trained[0] / "best.pt",
        ["--box-threshold", "0.1", "--box-threshold", "0.2", "--box-threshold", "0.3"],
    )
    expected = {
        "arch is 'hf-hub:x/y'; expected a CNN of timm itself": [*start, "--arch", "hf-hub:x/y"],
        "resize is 40; expected at least image_size": [*start, "--resize", "40"],
        "image_size is 50; expected a multiple of 16": [*start, "--image-size", "50"],
        "box_thresholds is (0.1, 0.2, 0.3); expected 2": [*start, *thresholds],
        "text.pt is a text file": [*start, "--init", tmp_path / "text.pt"],
        "epochs = 3 (now 2); expected no fewer": [*resume, "--epochs", "2"],
        "with --head-lr 0.01, now it is 0.5": [*resume, "--head-lr", "0.5"],
        "holds a model but no training state": ["train", "--resume", best],
        "data folder has 2 others": [*resume, "--data", tmp_path / "other"],
        "no folder": ["export", "--ckpt", best, "-o", tmp_path / "none/x.plan"],
        "--verify-images 0 takes all images": ["export", "--ckpt", best, "--verify-images", "0"],
    }
    shutil.copytree(data, tmp_path / "other")
    for split in ("train", "val"):
        (tmp_path / "other" / split / "b").rename(tmp_path / "other" / split / "c")
    lines = json.dumps([[str(word) for word in words] for words in expected.values()])
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, lines], capture_output=True, text=True, check=True)
    for message, said in zip(expected, json.loads(done.stdout), strict=True):
        assert message in said.strip().splitlines()[-1]
        assert said.startswith(("error: ", "Usage: "))


def test_a_finished_run_is_not_overwritten_by_mistake(trained, data):
    out, _ = trained
    before = (out / "best.pt").read_bytes()
    assert "holds a run already" in fails(train, "--data", data, "--out", out, "--init", "none", *TINY)
    assert (out / "best.pt").read_bytes() == before


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read_is_named_in_one_line(trained, data, tmp_path, workers):
    shutil.copytree(data / "test", tmp_path / "test")
    (tmp_path / "test/a/0.png").write_text("not an image")
    line = fails(evaluate, "--ckpt", trained[0] / "best.pt", "--data", tmp_path, "--workers", workers)
    assert "0.png" in line
    assert "Traceback" not in line


def test_evaluation_refuses_foreign_classes_and_both_kinds(trained, data, tmp_path):
    out, _ = trained
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.png").touch()
    assert "class 'c'" in fails(evaluate, "--ckpt", out / "best.pt", "--data", tmp_path)
    assert CliRunner().invoke(evaluate, ["--data", str(data)]).exit_code == 2
