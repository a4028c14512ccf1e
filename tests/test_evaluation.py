"""mge-eval prints the same table for a checkpoint and for the bundle made of it, parts included."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mge.checkpoint import save_checkpoint
from mge.cli.evaluate import main as evaluate
from mge.config import MGEConfig
from mge.evaluation import collect
from mge.model import MGENet
from mge.parts import write_parts
from mge_export.cli import main as export
from mge_runtime.bundle import add_calibration
from mge_runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four pictures of two classes, with the box of a part that lies in the upper left quarter."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    parts = {}
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(2):
            coarse = Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8))
            coarse.resize((88, 72), Image.Resampling.BICUBIC).save(folder / name / f"{i}.png")
            parts[f"{name}/{i}.png"] = (10.0, 8.0, 24.0, 20.0)
    write_parts(folder, parts)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = MGEConfig("test_resnet", ("a", "b"), image_size=64, resize=68, box_thresholds=(0.6, 0.6))
    save_checkpoint(folder / "best.pt", MGENet(config).eval())
    done = CliRunner().invoke(export, ["--ckpt", str(folder / "best.pt"), "--verify-images", "2"])
    assert done.exit_code == 0, done.output
    return folder


def figures(data, *arguments):
    done = CliRunner().invoke(evaluate, ["--data", str(data), "--workers", "0", "--json", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_checkpoint_and_bundle_agree(data, files):
    first = figures(data, "--ckpt", files / "best.pt")
    second = figures(data, "--engine", files / "mge.plan")
    heads = {row["name"]: row for row in first["heads"]}
    assert [row["name"] for row in second["heads"]] == ["expert 1", "expert 2", "expert 3", "average", "mixture"]
    for row in second["heads"]:
        assert row["top1"] == heads[row["name"]]["top1"]
        assert row["nll"] == pytest.approx(heads[row["name"]]["nll"], rel=1e-4)
    for key in ("gate", "crop_areas", "view_areas", "part_kept", "part_enlargement"):
        assert second[key] == pytest.approx(first[key], rel=1e-4), key
    assert first["part_enlargement"][0] == 1
    assert first["part_enlargement"][2] > first["part_enlargement"][1] > 1


@pytest.mark.parametrize("name", ["best.pt", "mge.plan"])
def test_an_image_may_have_as_many_pixels_as_were_named(data, files, name):
    model = "--ckpt" if name == "best.pt" else "--engine"
    options = ["--data", str(data), "--workers", "0", model, str(files / name), "--max-pixels", "10"]
    done = CliRunner().invoke(evaluate, options)
    assert done.exit_code == 1
    assert "expected at most 1e-05 megapixels" in done.stderr.splitlines()[-1]


def test_how_a_bundle_runs_is_asked_for_as_in_mge_run(data, files):
    options = ["--device", "cpu", "--backend", "onnxruntime", "-j", 1, "-b", 1, "--no-mmap"]
    plain, asked = (figures(data, "--engine", files / "mge.plan", *more) for more in ([], options))
    assert [row["nll"] for row in asked["heads"]] == pytest.approx([row["nll"] for row in plain["heads"]], rel=1e-4)
    done = CliRunner().invoke(evaluate, ["--data", str(data), "--ckpt", str(files / "best.pt"), *map(str, options)])
    assert done.exit_code == 2
    assert "cannot use --device, --backend, --threads, --no-mmap; leave that out" in done.stderr


def test_attention_is_computed_outside_inference_mode():
    """Inside it the gradient is zero with torch 2.11, so that no crop means anything."""
    model = MGENet(MGEConfig("test_resnet", ("a", "b"), image_size=64, resize=64)).train()
    seen = []
    model.experts[1].global_head.register_forward_hook(
        lambda *_: seen.append((torch.is_inference_mode_enabled(), model.training))
    )
    viewport = torch.tensor([[0, 0, 64, 64, 64, 64]], dtype=torch.float64)
    collect(model, [(torch.rand(1, 3, 64, 64), torch.tensor([0]), viewport)])
    assert seen
    assert set(seen) == {(False, False)}
    assert model.training


def test_a_calibrated_bundle_shows_what_it_answers(data, files, tmp_path):
    path = tmp_path / "mge.plan"
    shutil.copy(files / "mge.plan", path)
    plain = figures(data, "--engine", path)
    add_calibration(path, {"temperatures": {"mean_logits_1": 3.0, "mean_logits_2": 2.0, "logits": 0.25}, "exits": None})
    found = figures(data, "--engine", path)
    assert (plain["temperature"], found["temperature"]) == (None, 0.25)
    assert plain["heads"][-1]["calibrated_nll"] is None
    with Pipeline.open(path) as pipeline:
        answers = [pipeline.predict(image) for image in sorted(data.glob("*/*.png"))]
    shown = [next(t.probability for t in a.top if t.name == name) for a, name in zip(answers, "aabb", strict=True)]
    row = found["heads"][-1]
    assert row["calibrated_nll"] == pytest.approx(-np.log(shown).mean(), rel=1e-4)
    assert row["nll"] == pytest.approx(plain["heads"][-1]["nll"], rel=1e-4)
    right = [a.class_name == name for a, name in zip(answers, "aabb", strict=True)]
    error = np.abs(np.array([a.probability for a in answers]) - right).mean()  # four images are a bin each
    assert row["calibrated_ece"] == pytest.approx(error, rel=1e-4)
    assert row["calibrated_ece"] != pytest.approx(row["ece"], rel=1e-3)
    text = CliRunner().invoke(evaluate, ["--data", str(data), "--workers", "0", "--engine", str(path)]).stdout
    assert f"temperature 0.250, as mge-run predicts: NLL {row['calibrated_nll']:.3f}" in text
    assert "the rows above are before any temperature" in text
    assert "15 bins of equal mass" in text


def without(modules, command, *arguments):
    """The end of a command where these modules are not installed."""
    program = f"import sys; sys.modules.update(dict.fromkeys({modules!r})); from {command} import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=200
    )


TORCH = ["torch", "torchvision", "timm", "lightning", "safetensors", "matplotlib", "tqdm", "onnx", "scipy"]


def test_a_bundle_is_evaluated_without_torch(data, files):
    arguments = ["--engine", files / "mge.plan", "--data", data, "--json"]
    done = without(TORCH, "mge.cli.evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == figures(data, *arguments)


@pytest.mark.parametrize(
    ("command", "arguments", "extra"),
    [
        ("mge.cli.train", ["--data", "DATA", "--out", "OUT"], "train"),
        ("mge.cli.evaluate", ["--data", "DATA", "--ckpt", "CKPT"], "train"),
        ("mge_export.cli", ["--ckpt", "CKPT"], "export"),
        ("mge_calibration.cli", ["PLAN", "--data", "DATA"], "calibrate"),
    ],
)
def test_a_missing_extra_is_one_line(data, files, tmp_path, command, arguments, extra):
    (tmp_path / "train").symlink_to(data)
    places = {"DATA": tmp_path if extra == "train" and "OUT" in arguments else data, "OUT": tmp_path / "run"}
    places |= {"CKPT": files / "best.pt", "PLAN": files / "mge.plan"}
    done = without(TORCH, command, *(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # below a note on parts.csv
    assert line.startswith("error: this command needs ")
    assert line.endswith(f'is not installed; install it: pip install "mge[{extra}]"')


def test_a_wrong_folder_is_refused_before_torch_is_loaded(tmp_path):
    done = without(TORCH, "mge.cli.train", "--data", tmp_path / "nosuch")
    assert done.returncode == 1
    assert "no folder" in done.stderr


def test_an_image_without_a_part_is_named(files, tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(2):
        Image.new("RGB", (80, 80), (i * 90, 40, 90)).save(tmp_path / "a" / f"{i}.png")
    write_parts(tmp_path, {"a/0.png": (1.0, 1.0, 5.0, 5.0)})
    done = CliRunner().invoke(evaluate, ["--data", str(tmp_path), "--ckpt", str(files / "best.pt"), "--workers", "0"])
    assert done.exit_code == 1
    assert "no row for a/1.png" in done.stderr
