"""mge-eval prints the same table for a checkpoint and for the bundle made of it; its page; two models compared."""

import base64
import io
import itertools
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mge.checkpoint import save_checkpoint
from mge.cli.evaluate import main as evaluate
from mge.cost import Cost
from mge.evaluation import Evaluation, Predictions, collect, with_stops, write_predictions
from mge.figures import figures as make_figures
from mge.model import MGENet
from mge.parts import write_parts
from mge.report import write_report
from mge_export.cli import main as export
from mge_runtime.bundle import add_calibration
from mge_runtime.pipeline import Pipeline
from tests.helpers.commands import fails, run_without, succeeds
from tests.helpers.layouts import save_csv
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


def without_times(result):
    for part in (result["cost"], *result["heads"]):
        assert part.pop("ms")
    return result


def test_checkpoint_and_bundle_agree(data, files):
    first = figures(data, "--ckpt", files / "best.pt")
    second = figures(data, "--engine", files / "mge.plan")
    heads = {row["name"]: row for row in first["heads"]}
    assert [row["name"] for row in second["heads"]] == ["expert 1", "expert 2", "average", "mixture"]
    for row in second["heads"]:
        assert row["top1"] == heads[row["name"]]["top1"]
        assert row["nll"] == pytest.approx(heads[row["name"]]["nll"], rel=1e-4)
    costs = [result["cost"]["gmacs"] for result in (first, second)]
    assert costs[0][::2] == pytest.approx(costs[1][::2])  # the bundle's last expert has the gate with it
    assert costs[1][1] == costs[1][2] > costs[0][1] > costs[0][0] > 0
    assert first["classes"] == second["classes"]
    assert first["confusions"] == second["confusions"]
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


def test_classes_and_confusions_are_those_of_the_images(data, files, tmp_path):
    result = figures(data, "--ckpt", files / "best.pt", "--predictions", tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as stored:
        labels, predicted = stored["labels"], stored["logits/mixture"].argmax(1)
    for row in result["classes"]:
        own = labels == "ab".index(row["class"])
        assert row["images"] == own.sum()
        assert row["top1"] == (predicted == labels)[own].mean()
        assert row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1]
    wrong = {(row["class"], row["predicted"]): row["images"] for row in result["confusions"]}
    assert sum(wrong.values()) == (predicted != labels).sum()
    for (true, other), images in wrong.items():
        assert images == ((labels == "ab".index(true)) & (predicted == "ab".index(other))).sum()


def test_what_goes_wrong_most_comes_first(data, tmp_path):
    """Of six images of "a" three are taken for "b" and one for "c", of three of "c" none is wrong."""
    labels, predicted = [0] * 6 + [2] * 3, [0, 0, 1, 1, 1, 2, 2, 2, 2]
    logits = np.eye(3)[predicted] * np.arange(1, 10)[:, None]
    images = [(path, label) for label, path in zip(labels, itertools.cycle(sorted(data.glob("*/*.png"))))]
    found = Predictions(
        np.array(labels),
        {"expert 1": logits},
        np.ones((9, 1)),
        np.tile([[[0, 0, 8, 8]]], (9, 1, 1)),
        classes=tuple("abc"),
        heatmaps=(np.ones((9, 2, 2)),),
    )
    evaluation = Evaluation(found, images, tmp_path, data, "best.pt", {})
    result = make_figures(evaluation)
    assert [(row["class"], row["top1"]) for row in result["classes"]] == [("a", 1 / 3), ("c", 1)]
    assert [(row["class"], row["predicted"], row["images"]) for row in result["confusions"]] == [
        ("a", "b", 3),
        ("a", "c", 1),
    ]
    write_report(tmp_path / "r.html", result, evaluation)
    pair = re.search(r"<b>a \u2192 b</b> (\d+)%", (tmp_path / "r.html").read_text())
    assert pair[1] == "99"  # of three images the most confident


def test_a_chain_that_stops_early_gives_the_average_of_its_first_experts():
    heads = {f"expert {k}": np.full((2, 3), float(k)) for k in (1, 2, 3, 4)} | {"average": 0, "mixture": 1}
    found = with_stops(Predictions(np.zeros(2), heads, np.ones((2, 4)), np.zeros((2, 4, 4)))).heads
    assert list(found)[4:] == ["average 1-2", "average 1-3", "average", "mixture"]
    assert (found["average 1-2"] == 1.5).all()
    assert (found["average 1-3"] == 2).all()
    cost = Cost((1, 2, 3, 4, 5), (1, 2, 3, 4, 5), "here")
    assert [cost.gmacs[cost.place(name)] for name in found] == [1, 2, 3, 4, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def with_exits(files, tmp_path_factory):
    """A bundle in which some images stop after the first expert."""
    path = tmp_path_factory.mktemp("exits") / "mge.plan"
    shutil.copy(files / "mge.plan", path)
    exits = {"epsilon": 0.1, "delta": 0.1, "thresholds": {"mean_logits_1": 0.0}}
    add_calibration(path, {"temperatures": {"mean_logits_1": 1.0, "logits": 1.0}, "exits": exits})
    return path


def test_early_exits_have_their_mean_cost(data, with_exits):
    result = figures(data, "--engine", with_exits)
    first = result["heads"][0]
    assert result["exits"]["stopped"] == [1, 0]
    assert [result["exits"][key] for key in ("top1", "gmacs", "ms")] == [first[key] for key in ("top1", "gmacs", "ms")]
    text = succeeds(evaluate, "--data", data, "--workers", 0, "--engine", with_exits).stdout
    assert "images that stop after expert 1: 100 %, 2: 0 %" in text


# --- the page -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would load, show and run."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.images, self.texts = Counter(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.images += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, text):
        self.texts.append(text)


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_the_page_holds_all_it_shows(kind, data, files, with_exits, tmp_path):
    model = ("--ckpt", files / "best.pt") if kind == "checkpoint" else ("--engine", with_exits)
    result = figures(data, *model, "--report", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags["img"] == len(page.images) == 4  # every image is one of the examples
    assert page.tags["script"] == page.tags["link"] == 0
    for image in page.images:
        kind, _, content = image.partition(",")
        assert kind == "data:image/jpeg;base64"
        width, height = Image.open(io.BytesIO(base64.b64decode(content))).size
        assert width > 2 * (8 + 120)  # the image, and beside it what two experts saw,
        assert height == 120 + 8 + 120  # above their attention
    for row in result["heads"]:
        assert row["name"] in page.texts
        assert f"{row['gmacs']:.3g}" in page.texts
    assert ("with early exits" in page.texts) is (result["exits"] is not None)


def test_names_of_any_characters_are_text(tmp_path):
    names = ["<script>alert(1)</script>", '"&amp; \u00e5\u3042']
    for name in names:
        save_noise(tmp_path / "data", {name.replace("/", "\u2044"): 2})
    classes = sorted(path.name for path in (tmp_path / "data").iterdir())
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "one.pt", MGENet(tiny_config(1, classes)))
    figures(tmp_path / "data", "--ckpt", tmp_path / "one.pt", "--report", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags["script"] == 0
    assert set(classes) <= set(page.texts)


def test_a_page_that_cannot_be_written_is_refused_before_the_work(data, files, tmp_path):
    line = fails(evaluate, "--data", data, "--engine", files / "best.pt", "--report", tmp_path / "no/report.html")
    assert "cannot write" in line  # and not that best.pt is no bundle
    done = run_without(["scipy"], "mge.cli.evaluate", "--data", data, "--engine", "no.plan", "--report", tmp_path / "r")
    assert "needs scipy" in done.stderr


# --- two models ---------------------------------------------------------------------------------------------------


def test_the_table_is_there_where_the_page_is_refused(files, tmp_path):
    save_noise(tmp_path / "test", {"a": 1})
    given = ["--data", tmp_path, "--ckpt", files / "best.pt", "--workers", 0, "--report", tmp_path / "r.html"]
    done = CliRunner().invoke(evaluate, list(map(str, given)))
    assert "holds one image; expected two at least" in done.stderr
    assert "mixture" in done.stdout
    assert not (tmp_path / "r.html").exists()


def test_two_models_are_compared_on_the_same_images(data, files, tmp_path):
    figures(data, "--ckpt", files / "best.pt", "--predictions", tmp_path / "a.npz")
    torch.manual_seed(4)
    save_checkpoint(tmp_path / "one.pt", MGENet(tiny_config(1, "ab")))
    result = figures(data, "--compare", tmp_path / "a.npz", tmp_path / "one.pt")
    single = figures(data, "--ckpt", tmp_path / "one.pt")
    heads = {row["name"]: row for row in result["heads"]}
    assert list(heads) == ["output", "expert 1 global", "expert 1 parts", "expert 1"]
    assert heads["output"]["second"] == heads["expert 1"]["second"] == single["heads"][-1]["top1"]
    assert result["outputs"] == ["mixture", "expert 1"]
    assert result["costs"][1]["gmacs"] == single["cost"]["gmacs"]
    text = succeeds(evaluate, "--compare", tmp_path / "a.npz", tmp_path / "a.npz").stdout  # needs no images
    assert "right in A alone\n  none" in text
    assert "+0.00 [+0.00, +0.00]" in text
    same = figures(data, "--compare", files / "best.pt", files / "mge.plan")
    assert {row["p"] for row in same["heads"]} == {1}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--compare a.npz b.npz", 1, "of which 2 are on one side alone, such as b/0.png"),
        ("--compare a.npz no.npz", 1, "no.npz"),
        ("--compare a.npz text.npz", 1, "expected a file that mge-eval --predictions wrote"),
        ("--compare a.npz empty.npz", 1, "expected a file that mge-eval --predictions wrote"),
        ("--compare a.npz uneven.npz", 1, "its parts are of different numbers of images"),
        ("--compare a.npz no.pt", 2, "--data"),
        ("--compare a.npz hf://birds --data .", 1, "expected hf://owner/name"),
        ("--compare a.npz b.npz --ckpt no.pt", 2, "two models after --compare"),
        ("--compare a.npz b.npz --report r.html", 2, "cannot use --report"),
        ("--compare a.npz no.pt --data .", 1, "no.pt does not exist"),
        ("--ckpt no.pt", 2, "--data"),
        ("--ckpt no.pt --data . --predictions a.bin", 2, "which --compare knows by .npz, not a.bin"),
    ],
)
def test_what_cannot_be_compared_is_named_in_one_line(tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    logits = {"expert 1": np.eye(3)}
    for name, images in {
        "a": ["a/0.png", "a/1.png", "b/0.png"],
        "b": ["a/0.png", "a/1.png", "c/0.png"],
        "uneven": ["a/0.png", "a/1.png"],
    }.items():
        found = Predictions(np.arange(3), logits, np.ones((3, 1)), np.zeros((3, 1, 4)))
        write_predictions(tmp_path / f"{name}.npz", found, images)
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "empty.npz").touch()
    assert said in fails(evaluate, *arguments.split(), code=code)


def test_images_of_two_splits_are_not_the_same(data, files, tmp_path):
    for split in ("val", "test"):
        shutil.copytree(data, tmp_path / "data" / split)
        options = ["--ckpt", files / "best.pt", "--split", split, "--predictions", tmp_path / f"{split}.npz"]
        figures(tmp_path / "data", *options)
    line = fails(evaluate, "--compare", tmp_path / "val.npz", tmp_path / "test.npz")
    assert "of which 8 are on one side alone, such as test/a/0.png" in line
    figures(tmp_path / "data/val", "--ckpt", files / "best.pt", "--predictions", tmp_path / "named.npz")
    succeeds(evaluate, "--compare", tmp_path / "val.npz", tmp_path / "named.npz")


def test_a_table_without_splits_is_evaluated_with_a_note(data, files, tmp_path):
    save_csv(tmp_path / "images.csv", [{"path": path, "label": path.parent.name} for path in data.glob("*/*.png")])
    said = succeeds(evaluate, "--data", tmp_path / "images.csv", "--ckpt", files / "best.pt", "--workers", 0).stderr
    assert "images.csv has no splits: a model trained on it has seen most of these images" in said


TORCH = ["torch", "torchvision", "timm", "lightning", "safetensors", "matplotlib", "tqdm", "onnx", "scipy"]


def test_a_bundle_is_evaluated_without_torch(data, files):
    arguments = ["--engine", files / "mge.plan", "--data", data, "--json"]
    done = run_without(TORCH, "mge.cli.evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    assert without_times(json.loads(done.stdout)) == without_times(figures(data, *arguments))


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
