"""mge-eval prints the same table for a checkpoint and for the bundle made of it, parts included."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mge.checkpoint import save_checkpoint
from mge.cli.evaluate import main as evaluate
from mge.evaluation import collect
from mge.model import MGENet
from mge.parts import write_parts
from mge_export.cli import main as export
from mge_runtime.bundle import add_calibration
from mge_runtime.pipeline import Pipeline
from tests.helpers.commands import fails, run_without, succeeds
from tests.helpers.tiny_models import save_noise, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images of two classes, with the box of a part that lies in the upper left quarter."""
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
    save_checkpoint(folder / "best.pt", MGENet(tiny_config(2, "ab", resize=68, box_thresholds=(0.6,))))
    succeeds(export, "--ckpt", folder / "best.pt", "--verify-images", 2)
    return folder


def figures(data, *arguments):
    return json.loads(succeeds(evaluate, "--data", data, "--workers", 0, "--json", *arguments).stdout)


def test_checkpoint_and_bundle_agree(data, files):
    first = figures(data, "--ckpt", files / "best.pt")
    second = figures(data, "--engine", files / "mge.plan")
    heads = {row["name"]: row for row in first["heads"]}
    assert [row["name"] for row in second["heads"]] == ["expert 1", "expert 2", "average", "mixture"]
    for row in second["heads"]:
        assert row["top1"] == heads[row["name"]]["top1"]
        assert row["nll"] == pytest.approx(heads[row["name"]]["nll"], rel=1e-4)
    for key in ("gate", "crop_areas", "view_areas", "part_kept", "part_enlargement"):
        assert second[key] == pytest.approx(first[key], rel=1e-4), key
    assert first["part_enlargement"][1] > first["part_enlargement"][0] == 1


def test_the_table_and_the_predictions_of_a_checkpoint(data, files, tmp_path):
    text = succeeds(evaluate, "--data", data, "--ckpt", files / "best.pt", "--workers", 0).output
    for name in ("expert 1 global", "expert 2 parts", "average", "mixture", "gate %", "crop area %", "part enlarged"):
        assert name in text
    result = figures(data, "--ckpt", files / "best.pt", "--predictions", tmp_path / "predictions.npz")
    assert result["images"] == 4
    assert sum(result["gate"]) == pytest.approx(1, abs=1e-5)
    with np.load(tmp_path / "predictions.npz") as stored:
        right = stored["logits/mixture"].argmax(1) == stored["labels"]
    assert result["heads"][-1]["top1"] == pytest.approx(right.mean())


def test_a_single_expert_has_no_mixture(data, tmp_path):
    save_checkpoint(tmp_path / "one.pt", MGENet(tiny_config(1, "ab")))
    heads = figures(data, "--ckpt", tmp_path / "one.pt")["heads"]
    assert [row["name"] for row in heads] == ["expert 1 global", "expert 1 parts", "expert 1"]


@pytest.mark.parametrize("model", [("--ckpt", "best.pt"), ("--engine", "mge.plan")], ids=["checkpoint", "bundle"])
def test_an_image_may_have_as_many_pixels_as_were_named(data, files, model):
    line = fails(evaluate, "--data", data, "--workers", 0, model[0], files / model[1], "--max-pixels", 10)
    assert "expected at most 1e-05 megapixels" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_evaluated_is_named_in_one_line(files, tmp_path, workers):
    start = ["--ckpt", files / "best.pt", "--workers", workers, "--data"]
    save_noise(tmp_path / "damaged/test", {"a": 2, "b": 2})
    (tmp_path / "damaged/test/a/0.png").write_text("not an image")
    assert "0.png" in fails(evaluate, *start, tmp_path / "damaged")
    save_noise(tmp_path / "foreign", {"c": 1})
    assert "class 'c'" in fails(evaluate, *start, tmp_path / "foreign")
    save_noise(tmp_path / "parts", {"a": 2})
    write_parts(tmp_path / "parts", {"a/0.png": (1.0, 1.0, 5.0, 5.0)})
    assert "no row for a/1.png" in fails(evaluate, *start, tmp_path / "parts")
    fails(evaluate, "--data", tmp_path, code=2)  # neither a checkpoint nor a bundle


def test_how_a_bundle_runs_is_asked_for_as_in_mge_run(data, files):
    options = ["--device", "cpu", "--backend", "onnxruntime", "-j", 1, "-b", 1, "--no-mmap"]
    plain, asked = (figures(data, "--engine", files / "mge.plan", *more) for more in ([], options))
    assert [row["nll"] for row in asked["heads"]] == pytest.approx([row["nll"] for row in plain["heads"]], rel=1e-4)
    line = fails(evaluate, "--data", data, "--ckpt", files / "best.pt", *options, code=2)
    assert "cannot use --device, --backend, --threads, --no-mmap; leave that out" in line


def test_attention_is_computed_outside_inference_mode():
    """Inside it the gradient is zero with torch 2.11, so that no crop means anything."""
    model = MGENet(tiny_config(2, "ab")).train()
    seen = []
    model.experts[1].global_head.register_forward_hook(
        lambda *_: seen.append((torch.is_inference_mode_enabled(), model.training))
    )
    viewport = torch.tensor([[0, 0, 64, 64, 64, 64]], dtype=torch.float64)
    collect(model, [(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), torch.tensor([0]), viewport)])
    assert seen
    assert set(seen) == {(False, False)}
    assert model.training


def test_a_calibrated_bundle_shows_what_it_predicts(data, files, tmp_path):
    path = tmp_path / "mge.plan"
    shutil.copy(files / "mge.plan", path)
    plain = figures(data, "--engine", path)
    add_calibration(path, {"temperatures": {"mean_logits_1": 3.0, "logits": 0.25}, "exits": None})
    found = figures(data, "--engine", path)
    assert (plain["temperature"], found["temperature"]) == (None, 0.25)
    assert plain["heads"][-1]["calibrated_nll"] is None
    with Pipeline.open(path) as pipeline:
        predictions = [pipeline.predict(image) for image in sorted(data.glob("*/*.png"))]
    shown = [{t.name: t.probability for t in p.top}[name] for p, name in zip(predictions, "aabb", strict=True)]
    row = found["heads"][-1]
    assert row["calibrated_nll"] == pytest.approx(-np.log(shown).mean(), rel=1e-4)
    assert row["nll"] == pytest.approx(plain["heads"][-1]["nll"], rel=1e-4)
    right = [p.class_name == name for p, name in zip(predictions, "aabb", strict=True)]
    error = np.abs(np.array([p.probability for p in predictions]) - right).mean()  # four images are a bin each
    assert row["calibrated_ece"] == pytest.approx(error, rel=1e-4)
    assert row["calibrated_ece"] != pytest.approx(row["ece"], rel=1e-3)
    text = succeeds(evaluate, "--data", data, "--workers", 0, "--engine", path).stdout
    assert f"temperature 0.250, as mge-run predicts: NLL {row['calibrated_nll']:.3f}" in text
    assert "the rows above are before any temperature" in text
    assert "15 bins of equal mass" in text


TORCH = ["torch", "torchvision", "timm", "lightning", "safetensors", "matplotlib", "tqdm", "onnx", "scipy"]


def test_a_bundle_is_evaluated_without_torch(data, files):
    arguments = ["--engine", files / "mge.plan", "--data", data, "--json"]
    done = run_without(TORCH, "mge.cli.evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == figures(data, *arguments)


@pytest.mark.parametrize(
    ("command", "arguments", "extra"),
    [
        ("mge.cli.train", "--data TRAIN --out OUT", "train"),
        ("mge.cli.evaluate", "--data DATA --ckpt CKPT", "train"),
        ("mge_export.cli", "--ckpt CKPT", "export"),
        ("mge_calibration.cli", "PLAN --data DATA", "calibrate"),
    ],
)
def test_a_missing_extra_is_one_line(data, files, tmp_path, command, arguments, extra):
    (tmp_path / "train").symlink_to(data)
    places = {"TRAIN": tmp_path, "DATA": data, "OUT": tmp_path / "run"}
    places |= {"CKPT": files / "best.pt", "PLAN": files / "mge.plan"}
    done = run_without(TORCH, command, *(places.get(word, word) for word in arguments.split()))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # below a note on parts.csv
    assert line.startswith("error: this command needs ")
    assert line.endswith(f"is not installed; install mge again, with its extra {extra}")
