"""A bundle carries a model card: its author's words, what was measured; with it, it is a repository for the Hub."""

import re
import subprocess
import sys
import zipfile
from unittest.mock import ANY

import pytest
import yaml

from mge_export.cli import main
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.cli.info import main as info
from tests.helpers.bundles import read_entries
from tests.helpers.commands import fails, succeeds
from tests.runtime.tiny_chain import write_tiny_bundle

WORDS = (
    "---\nlicense: mit\ntags: [birds]\n---\n\n# Five birds\n\n## Data\n\nDrawn.\n\n## Limits\n\nNo bird but these.\n"
)
TEMPERATURES = {"mean_logits_1": 1.3, "mean_logits_2": 1.5, "logits": 1.2}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "mge.plan"
    write_tiny_bundle(path)
    add_calibration(path, {"temperatures": TEMPERATURES, "data": {"temperatures": {"images": 500}}})
    return path


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.md"
    path.write_text(WORDS)
    return path


@pytest.fixture
def birds(tmp_path, photographs):
    """Two test images of each of the tiny bundle's classes."""
    folder = tmp_path / "birds"
    for number, photograph in enumerate(sorted(photographs.rglob("*.png"))[:10]):
        place = folder / f"test/bird {number % 5}"
        place.mkdir(parents=True, exist_ok=True)
        (place / photograph.name).write_bytes(photograph.read_bytes())
    return folder


def test_a_card_holds_the_words_and_what_was_measured(plan, words, birds):
    before = read_entries(plan)
    with Bundle.open(plan) as bundle:
        sha256 = bundle.sha256
    for _ in range(2):  # the second takes the first one's place
        succeeds(main, "--engine", plan, "--card", words, "--test-data", birds)
    card = succeeds(info, plan, "--card").stdout
    _, front, text = card.split("---\n", 2)
    top1 = float(re.search(r"\| mixture \| ([\d.]+) ", text)[1]) / 100
    assert yaml.safe_load(front) == {
        "library_name": "mge", "pipeline_tag": "image-classification", "license": "mit", "tags": ["birds"],
        "model-index": [{"name": "mge", "results": [ANY]}],
    }  # fmt: skip
    (result, _) = pytest.importorskip("huggingface_hub").ModelCard(card).data.eval_results
    assert (result.metric_name, result.metric_value) == ("Top-1 accuracy of 10 images", top1)
    assert result.dataset_name == "birds/test"
    assert text.startswith(
        "\n# Five birds\n\n## Data\n\nDrawn.\n\n## Limits\n\nNo bird but these.\n\n## Accuracy\n\nOn the 10 "
    )
    for found in (
        "images of birds/test",
        "| mixture | ",
        "- temperatures: mean_logits_1 1.3",
        "mge-run --engine mge.plan",
    ):
        assert found in text
    after = read_entries(plan)
    assert after.pop("card.md").decode() == card
    assert after == before
    assert sha256 in text
    succeeds(info, plan, "--verify", sha256)


def test_the_accuracy_is_that_of_mge_eval(plan, words, birds):
    from mge.cli.evaluate import main as evaluate

    succeeds(main, "--engine", plan, "--card", words, "--test-data", birds)
    line = next(text for text in succeeds(info, plan, "--card").stdout.splitlines() if text.startswith("| mixture"))
    table = succeeds(evaluate, "--engine", plan, "--data", birds).stdout
    shown = next(text for text in table.splitlines() if text.startswith("mixture")).split()[1:4]
    assert [float(part.strip("[],")) for part in line.split("|")[2].split()] == [
        round(float(part.strip("[],")), 1) for part in shown
    ]


def test_info_names_the_card_and_says_when_the_bundle_is_another_by_now(plan, words):
    assert "card " not in succeeds(info, plan).stdout
    assert fails(info, plan, "--card").endswith("has no model card; mge-export --card writes one")
    succeeds(main, "--engine", plan, "--card", words)
    assert "card       Five birds (all of it: --card)\n" in succeeds(info, plan).stdout
    assert "## Accuracy\n\nNot measured." in succeeds(info, plan, "--card").stdout
    add_calibration(plan, {"temperatures": {**TEMPERATURES, "logits": 2.0}})
    assert "it is of another sha256" in succeeds(info, plan).stdout


@pytest.mark.usefixtures("traced_once")
def test_an_export_writes_the_card_of_what_it_exports(single, words, tmp_path):
    succeeds(main, "--ckpt", single, "--verify-images", 1, "--card", words, "--hf", tmp_path / "hub")
    with Bundle.open(tmp_path / "hub/mge.plan") as bundle:
        assert bundle.sha256 in bundle.card()
        assert "- no: probabilities are the model's own" in bundle.card()


def test_the_folder_for_the_hub_holds_card_bundle_and_labels(plan, words, tmp_path):
    hub = tmp_path / "hub"
    assert "has no model card" in fails(main, "--engine", plan, "--hf", hub)
    succeeds(main, "--engine", plan, "--card", words, "--hf", hub)
    assert {path.name for path in hub.iterdir()} == {"README.md", "mge.plan", "labels.txt"}
    assert (hub / "README.md").read_text() == succeeds(info, plan, "--card").stdout
    assert (hub / "mge.plan").read_bytes() == plan.read_bytes()
    assert (hub / "labels.txt").read_text().splitlines() == [f"bird {number}" for number in range(5)]
    with zipfile.ZipFile(hub / "mge.plan") as archive:
        assert archive.testzip() is None
    other = plan.rename(tmp_path / "birds.plan")
    words.write_text(WORDS.replace("Drawn.", "mge-run --engine birds.plan IMAGES: drawn."))
    succeeds(main, "--engine", other, "--card", words)
    for _ in range(2):  # what it wrote it replaces
        succeeds(main, "--engine", other, "--hf", hub)
        card = (hub / "README.md").read_text()
        (hub / "README.md").unlink()
    assert "mge-run --engine birds.plan IMAGES: drawn." in card  # the author's
    assert card.count("mge.plan") == 5  # the file of this folder


@pytest.mark.parametrize("name", ["README.md", "mge.plan", "labels.txt"])
@pytest.mark.parametrize("written", [False, True])
def test_a_folder_for_the_hub_that_holds_something_else_is_left_alone(plan, words, tmp_path, name, written):
    hub = tmp_path / "hub"
    hub.mkdir()
    succeeds(main, "--engine", plan, "--card", words, *(["--hf", hub] if written else []))
    (hub / name).write_bytes(b"of somebody")
    before = {path: path.read_bytes() for path in hub.iterdir()}
    line = fails(main, "--engine", plan, "--hf", hub)
    assert f"{hub / name} is not what --hf wrote, or was edited since" in line
    assert {path: path.read_bytes() for path in hub.iterdir()} == before


def test_the_accuracy_names_the_images_that_were_named(plan, words, birds):
    (birds / "test").rename(birds / "val")
    succeeds(main, "--engine", plan, "--card", words, "--test-data", birds / "val")
    card = succeeds(info, plan, "--card").stdout
    assert "On the 10 images of birds/val, by this bundle" in card
    assert "test" not in card.partition("\n# Five birds")[0]


def test_the_bundle_may_lie_in_the_folder_for_the_hub(plan, words):
    for _ in range(2):
        succeeds(main, "--engine", plan, "--card", words, "--hf", plan.parent)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "cannot read the model card"),
        (b"\xff\xfe", "cannot read the model card"),
        ("# Five birds\n", "names no license"),
        ("---\nlicense: mit\n", "names no license"),
        (WORDS.replace("license", "licence"), "names no license"),
        (WORDS.replace("mit\n", "[mit\n"), "cannot read the model card"),
        (WORDS.replace("license: mit\ntags: [birds]", "mit"), "names no license"),
        (WORDS.replace("## Limits", "## Else"), "has no section Limits; expected a line `## Limits`"),
    ],
)
def test_words_that_are_no_card_are_refused(plan, words, text, found):
    before = plan.read_bytes()
    words.unlink() if text is None else words.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert found in fails(main, "--engine", plan, "--card", words)
    assert plan.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], "name either --ckpt"),
        (["--ckpt", "best.pt", "--engine", "mge.plan"], "name either --ckpt"),
        (["--engine", "mge.plan"], "--engine alone writes nothing"),
        (["--ckpt", "best.pt", "--hf", "hub"], "add --card FILE"),
        (["--engine", "mge.plan", "--test-data", "birds", "--hf", "hub"], "add --card FILE"),
        (["--engine", "mge.plan", "--card", "words.md", "--fp16"], "cannot use --fp16"),
        (["--engine", "mge.plan", "--onnx", "./mge.plan"], "name files that differ"),
        (["--ckpt", "best.pt", "-o", "best.pt"], "name files that differ"),
    ],
)
def test_options_that_do_not_go_together(options, found):
    assert found in fails(main, *options, code=2)


def test_a_bundle_is_described_without_torch(plan, words, birds):
    code = "import sys; from mge_export.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    given = ["--engine", plan, "--card", words, "--test-data", birds]
    done = subprocess.run([sys.executable, "-c", code, *map(str, given)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "False"), done.stderr
