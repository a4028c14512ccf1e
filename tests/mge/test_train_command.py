"""mge-train and mge-eval as a user types them."""

import json
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from mge.checkpoint import load_checkpoint
from mge.cli.evaluate import main as evaluate
from mge.cli.field_guide import main as field_guide
from mge.cli.train import main as train
from mge.model import create_trunk

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
    assert (config.classes, config.resize, config.box_thresholds) == (("a", "b"), 73, (0.2, 0.2))


def test_the_table_of_a_checkpoint(trained, data, tmp_path):
    out, _ = trained
    arguments = ["--ckpt", str(out / "best.pt"), "--data", str(data), "--workers", "0"]
    text = CliRunner().invoke(evaluate, arguments).output
    for name in ("expert 1 global", "expert 2 parts", "expert 3", "average", "mixture", "gate %", "crop area %"):
        assert name in text
    file = tmp_path / "answers.npz"
    result = json.loads(CliRunner().invoke(evaluate, [*arguments, "--json", "--predictions", str(file)]).output)
    assert result["images"] == 6
    assert sum(result["gate"]) == pytest.approx(1, abs=1e-5)
    with np.load(file) as answers:
        right = answers["logits/mixture"].argmax(1) == answers["labels"]
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


def test_every_trunk_starts_from_the_file(data, tmp_path):
    torch.manual_seed(5)
    trunk, _, _ = create_trunk("test_resnet")
    save_file(
        {name: tensor.half().contiguous() for name, tensor in trunk.state_dict().items()}, tmp_path / "w.safetensors"
    )
    done = CliRunner().invoke(
        train,
        ["--data", str(data), "--out", str(tmp_path / "run"), "--init", str(tmp_path / "w.safetensors"), *TINY,
         "--trunk-lr", "0", "--weight-decay", "0"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    state = load_checkpoint(tmp_path / "run/best.pt").state_dict()
    first = next(name for name, _ in trunk.named_parameters())
    for place in ("experts.0", "experts.1", "experts.2", "gate"):
        assert torch.equal(state[f"{place}.trunk.{first}"], trunk.state_dict()[first].half().float())


def test_bad_input_gets_one_line(data, tmp_path):
    weights = tmp_path / "foreign.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, weights)
    start = ["--data", data, "--out", tmp_path / "x", *TINY, "--init"]
    assert "weights of another architecture" in fails(train, *start, weights)
    assert "no file" in fails(train, *start, tmp_path / "absent.safetensors")
    weights.write_text("not weights")
    assert "not a safetensors file" in fails(train, *start, weights)
    start.append("none")
    assert "no folder" in fails(train, *start, "--data", tmp_path / "nothing")
    assert "arch is 'nonsense'" in fails(train, *start, "--arch", "nonsense")
    assert "expected a trunk with features" in fails(train, *start, "--arch", "vit_tiny_patch16_224")
    assert "resize is 40" in fails(train, *start, "--resize", "40")
    (tmp_path / "file").touch()
    assert "cannot make folder" in fails(train, *start, "--out", tmp_path / "file/run")
    assert "does not exist" in fails(train, "--data", data, "--accelerator", "cpu", "--resume", tmp_path / "absent.pt")
    assert "cannot train with --accelerator tpux" in fails(train, *start, "--accelerator", "tpux")
    assert "cannot train with --accelerator cpu --devices abc" in fails(train, *start, "--devices", "abc")
    assert "image_size is 50" in fails(train, *start, "--image-size", "50")
    assert not (tmp_path / "x/best.pt").exists()


def test_a_finished_run_is_not_overwritten_by_mistake(trained, data):
    out, _ = trained
    before = (out / "best.pt").read_bytes()
    assert "holds a run already" in fails(train, "--data", data, "--out", out, "--init", "none", *TINY)
    assert "leave out --image-size" in fails(train, "--data", data, "--resume", out / "last.pt", *TINY[2:])
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
