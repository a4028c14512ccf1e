"""Training on data as it is downloaded: splits, problems that are found before the first epoch, dry runs."""

import csv
import re
import shutil
import signal

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from benchmarks import worth
from benchmarks.scenes import compose
from benchmarks.scenes import main as scenes
from mge.backbones import create_backbone
from mge.checkpoint import load_checkpoint
from mge.cli.evaluate import main as evaluate
from mge.cli.train import main as train
from mge.data.check import FEW, check_images
from mge.data.splits import training_splits
from mge.training.record import write_curves
from mge_runtime.decode import MAX_PIXELS
from mge_runtime.errors import InputError
from tests.helpers import layouts
from tests.helpers.commands import fails, succeeds
from tests.helpers.tiny_models import save_noise

TINY = ["--arch", "test_resnet", "--image-size", "64", "--experts", "2", "--init", "none", "--accelerator", "cpu"]
QUICK = [*TINY, "--batch-size", "4", "--epochs", "1", "--workers", "0"]


def test_cub_is_trained_on_and_evaluated_as_it_is_downloaded(tmp_path):
    layouts.save_cub(tmp_path / "CUB_200_2011")
    start = ["--data", tmp_path / "CUB_200_2011", "--out", tmp_path / "run"]
    text = succeeds(train, *start, *QUICK).output
    assert "CUB_200_2011 is CUB-200-2011: 2 classes, 10 train, 6 test images" in text
    assert "has no validation split: 2 of the training images are held out for it" in text
    assert "8 training and 2 validation images of 2 classes; 2 x test_resnet at 64, 32 px" in text
    best = tmp_path / "run/best.pt"
    assert load_checkpoint(best).config.classes == ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    saved = tmp_path / "test.npz"
    text = succeeds(evaluate, "--ckpt", best, "--data", start[1], "--workers", "0", "--predictions", saved).output
    assert "6 images" in text
    names = np.load(saved)["names"]
    assert names[0] == "images/001.Black_footed_Albatross/Black_footed_Albatross_0005_796105.jpg"
    assert "without val images; expected a split that it has" in fails(
        evaluate, "--ckpt", best, "--data", start[1], "--split", "val"
    )
    layouts.save_csv(tmp_path / "other.csv", layouts.table_rows(tmp_path))
    assert "class 'cock', which is not among the model's 2" in fails(
        evaluate, "--ckpt", best, "--data", tmp_path / "other.csv"
    )


def test_images_held_out_of_a_table_stay_so_wherever_it_lies(tmp_path):
    rows = [{"path": row["path"], "label": row["label"]} for row in layouts.table_rows(tmp_path)]
    layouts.save_csv(tmp_path / "images.csv", rows)
    classes, samples, held = training_splits(tmp_path / "images.csv", 0)
    assert (classes, len(samples), len(held)) == (("cock", "tench"), 10, 2)
    shutil.copytree(tmp_path, tmp_path / "moved")
    again = training_splits(tmp_path / "moved/images.csv", 0)[2]
    assert [path.name for path, _ in again] == [path.name for path, _ in held]


@pytest.fixture
def noise(tmp_path):
    for split, (count, seed) in {"train": (4, 0), "val": (2, 1)}.items():
        save_noise(tmp_path / split, {"a": count, "b": count}, seed=seed)
    return tmp_path


def checked(data):
    """What is said of a data set, and the error that it ends with."""
    said = []
    classes, *samples = training_splits(data, 0)
    try:
        check_images(dict(zip(("train", "val"), samples, strict=True)), classes, MAX_PIXELS, said.append)
    except InputError as error:
        return said, str(error)
    return said, None


def test_problems_are_found_before_the_first_epoch_and_listed_together(noise):
    assert checked(noise) == ([], None)
    (noise / "train/a/0.png").write_bytes(b"")
    said, error = checked(noise)
    assert said == []
    assert "cannot decode" in error
    assert "train/a/0.png" in error
    for number in range(11):
        (noise / f"train/a/{number}.png").write_text("no image")
    (noise / "val/b/1.png").unlink()
    (noise / "val/b/1.png").symlink_to(noise / "val/b/0.png")
    (noise / "val/b/0.png").write_text("no image")
    said, error = checked(noise)
    assert len(said) == 11
    assert "train/a/10.png" in said[2]
    assert said[-1] == "... and 3 more"
    assert error.startswith(f"found 13 problems in 19 images; expected none: cannot decode {noise}/train/a/0.png")


def test_copies_across_splits_and_lonely_classes_are_doubtful_not_wrong(noise):
    shutil.copy(noise / "train/a/3.png", noise / "train/a/4.png")  # a copy in its own class is none of our business
    shutil.copy(noise / "train/a/3.png", noise / "val/a/9.png")
    shutil.copy(noise / "train/a/2.png", noise / "train/b/9.png")
    save_noise(noise / "train", {"c": 1}, seed=3)
    said, error = checked(noise)
    assert error is None
    assert said == [
        f"{noise}/train/a/2.png and {noise}/train/b/9.png are the same image, of class 'a' and of 'b'",
        f"{noise}/train/a/3.png and {noise}/val/a/9.png are the same image, in train and in val",
        "1 of 3 classes have one image to train on: c",
    ]


def test_a_class_without_training_images_is_a_problem(tmp_path):
    rows = layouts.table_rows(tmp_path)
    layouts.save_csv(tmp_path / "images.csv", [*rows, {"path": "hen.png", "label": "hen", "split": "test"}])
    assert checked(tmp_path / "images.csv")[1] == "1 of 3 classes have no image to train on: hen"


def test_many_images_are_looked_at_by_several_processes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "y.png").touch()
    samples = [(tmp_path / "x.png", 0)] * FEW + [(tmp_path / "y.png", 1)]
    with pytest.raises(InputError, match=r"cannot decode .*y\.png"):
        check_images({"train": samples, "val": []}, ["a", "b"], MAX_PIXELS, print)


@pytest.mark.parametrize("more", [[], ["--experts", "1", "--schedule", "onecycle"]], ids=["chain", "single"])
def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(noise, monkeypatch, more):
    monkeypatch.setattr("mge.training.dry_run.SECONDS", 0.0)
    monkeypatch.chdir(noise)
    before = {path: path.stat().st_mtime_ns for path in noise.rglob("*")}
    text = succeeds(train, "--data", noise, "--out", noise / "run", *QUICK, *more, "--dry-run").output
    assert {path: path.stat().st_mtime_ns for path in noise.rglob("*")} == before
    assert "8 training and 4 validation images of 2 classes" in text
    assert "images of a class to train on: 4 to 4, median 4" in text
    assert " s a step of 4 images, " in text
    assert 0 <= int(re.search(r"(\d+)% of it waiting for images", text)[1]) < 100
    assert " for 1 epochs" in text
    assert "GB at most, cpu" in text or "MB at most, cpu" in text
    assert "dry run: nothing was written" in text


@pytest.mark.parametrize("out", ["run", "elsewhere"])
def test_a_dry_run_of_a_run_that_goes_on_writes_nothing(noise, monkeypatch, out):
    succeeds(train, "--data", noise, "--out", noise / "run", *QUICK)
    monkeypatch.setattr("mge.training.loop.write_curves", write_curves)
    before = {path: path.stat().st_mtime_ns for path in noise.rglob("*")}
    last = noise / "run/last.pt"
    text = succeeds(train, "--resume", last, "--out", noise / out, "--epochs", "2", "--dry-run").output
    assert "dry run: nothing was written" in text
    assert {path: path.stat().st_mtime_ns for path in noise.rglob("*")} == before


def test_a_dry_run_counts_what_the_model_computes(noise):
    def gmacs(*options):
        text = succeeds(
            train, "--data", noise, *QUICK, "--recipe", "paper", "--gate", "none", *options, "--dry-run"
        ).output
        return float(text.partition("model: ")[2].split()[0])

    one, two, large = gmacs("--experts", "1"), gmacs(), gmacs("--image-size", "128")
    assert two == pytest.approx(2 * one, rel=0.1)
    assert large == pytest.approx(4 * two, rel=0.1)


def test_a_dry_run_finds_problems_too(noise):
    (noise / "train/a/0.png").write_bytes(b"")
    assert "train/a/0.png" in fails(train, "--data", noise, "--out", noise / "run", *QUICK, "--dry-run")
    assert not (noise / "run").exists()


def save_products(folder):
    """Photographs as `benchmarks.scenes` expects them."""
    for place in ("groceries/train", "groceries/val", "groceries/test"):
        save_noise(folder / place, {"milk": 4, "juice": 4}, size=(340, 320))
    for split in ("train", "test"):
        (folder / "distractors" / split).mkdir(parents=True)
    for path in (folder / "groceries").rglob("*.png"):  # scenes are made of JPEGs
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    paint(folder, 30, "train", "val", "test")


def paint(folder, blue, *splits):
    """Make the distractors of training, those of training that it leaves to validation, or those of the test."""
    for split in splits:
        for number in range(9) if split == "test" else (0, 8) if split == "val" else range(1, 8):
            place = folder / "distractors" / ("test" if split == "test" else "train") / f"{number}.jpg"
            Image.new("RGB", (320, 340), (number * 20, 90, blue)).save(place)


def test_scenes_are_trained_on_by_the_command_itself(tmp_path):
    save_products(tmp_path)

    def run(name, *more):
        """What the command says, and the losses of its training."""
        start = [tmp_path, tmp_path / "scenes", "--kind", "shelf2", "--train", tmp_path / name]
        text = succeeds(scenes, *start, *QUICK, "--batch-size", "8", *more).output
        (row,) = csv.DictReader((tmp_path / name / "metrics.csv").read_text().splitlines())
        return text, row["loss/total"]

    text, loss = run("first")
    assert "8 training and 16 validation images" in text
    assert "validation sees no whole scenes" in text
    paint(tmp_path, 230, "val", "test")
    text, same = run("again", "--resize", "64")
    assert "no whole scenes" not in text
    assert same == loss
    paint(tmp_path, 230, "train")
    assert run("other")[1] != loss  # training sees what lies around the products


def test_scenes_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    save_products(tmp_path)
    first = iter([True])

    def interrupted(*arguments):
        return compose(*arguments) if next(first, False) else signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("benchmarks.scenes.compose", interrupted)
    assert CliRunner().invoke(scenes, [str(tmp_path), str(tmp_path / "out/scenes"), "--kind", "shelf2"]).exit_code == 1
    assert next(first, None) is None
    assert not list((tmp_path / "out").iterdir())


def test_runs_of_a_comparison_follow_each_other_and_go_on(tmp_path, monkeypatch):
    save_products(tmp_path / "data")
    (tmp_path / "weights").mkdir()
    weights = create_backbone("test_resnet")[0].state_dict()
    save_file(weights, tmp_path / "weights/tf_efficientnet_lite0.fp16.safetensors")
    monkeypatch.setattr(worth, "COMMON", "--arch test_resnet --workers 0 --accelerator cpu --batch-size 8 --epochs 1")
    single, chain = "--experts 1 --image-size 64", "--experts 2 --gate none --source-size 128 --image-sizes 64,32"
    monkeypatch.setattr(worth, "RUNS", {"close": ("", {"": single}), "shelf2": ("", {"chain": chain, "64": single})})
    monkeypatch.setitem(worth.WHOLE, "shelf2", 128)
    monkeypatch.setattr(worth.torch, "set_num_threads", lambda _: None)  # of the whole process
    runs = ("close", "shelf2-chain", "shelf2-64")
    succeeds(worth.main, tmp_path, tmp_path / "out", *runs)
    assert {run.parent.name for run in (tmp_path / "out").glob("*/best.pt")} == {f"{run}-s0" for run in runs}
    succeeds(worth.main, tmp_path, tmp_path / "out", *runs)  # nothing is left to do
