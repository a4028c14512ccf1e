"""What users see, as it was before the code was rearranged: the same numbers, options and names.

`python tests/test_fence.py` writes `fence/golden.json` anew; that is for a change which is meant, and named there.
"""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from click.testing import CliRunner
from PIL import Image

import mge_runtime
from mge.checkpoint import save_checkpoint
from mge.config import MGEConfig
from mge.data.folder import normalize
from mge.model import MGENet
from mge_runtime import Pipeline
from mge_runtime.decode import decode_image
from mge_runtime.preprocess import to_frame

pytestmark = pytest.mark.timeout(900)  # three exports, of which a loaded machine makes minutes
GOLDEN = Path(__file__).parent / "fence/golden.json"
COMMANDS = {
    "mge-train": "mge.cli.train", "mge-eval": "mge.cli.evaluate", "mge-field-guide": "mge.cli.field_guide",
    "mge-export": "mge_export.cli", "mge-calibrate": "mge_calibration.cli", "mge-run": "mge_runtime.cli.run",
    "mge-build": "mge_runtime.cli.build", "mge-bench": "mge_runtime.cli.bench", "mge-info": "mge_runtime.cli.info",
    "mge-serve": "mge_runtime.cli.serve",
}  # fmt: skip
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
# Of the largest magnitude of a value's tensor. Another processor sums in another order, has other integer kernels.
RELATIVE = {"fp32": 1e-4, "fp16": 2e-3, "int8": 0.1}
PIXELS = {"fp32": 0.02, "fp16": 1.5, "int8": 12}  # of the source image, by which an edge of a box may move


def make_checkpoint(path, photographs):
    """Three experts whose weights come from NumPy, whose generators are the same everywhere."""
    config = MGEConfig(
        "resnet10t", tuple("abcde"), 3, 96, 104, box_thresholds=(0.6, 0.5), parts_per_class=2, gate_width=8
    )
    model = MGENet(config).eval()
    rng = np.random.default_rng(12)
    state = model.state_dict()
    for name, tensor in sorted(state.items(), key=lambda item: item[0].replace("backbone", "trunk")):
        shape = tuple(tensor.shape)
        if name.endswith("running_var"):
            drawn = rng.uniform(0.5, 2, shape)
        elif tensor.ndim > 1:
            drawn = rng.normal(0, 1.4 / np.sqrt(np.prod(shape[1:])), shape)
        else:
            drawn = rng.uniform(0.5, 1.5, shape) if name.endswith("weight") else rng.normal(0, 0.2, shape)
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(np.asarray(drawn, np.float32)))
    model.load_state_dict(state)
    # A network of random weights sees one class everywhere: shift its scores so that the photographs fall into several.
    frames = [to_frame(decode_image(p), config.preprocess)[0] for p in sorted(photographs.rglob("*.png"))]
    with torch.no_grad():
        images = torch.stack([normalize(frame, config) for frame in frames])
        for k, expert in enumerate(model.experts):
            expert.global_head.fc.bias -= model(images).experts[k].global_logits.mean(0)
            expert.concat_head.bias -= model(images).experts[k].logits.mean(0)
            expert.concat_head.weight *= 8
            expert.concat_head.bias *= 8
    save_checkpoint(path, model)


def make_photographs(folder):
    """Eight: four whole photographs, one detail of each, in folders as if they were of four classes."""
    for kind, name in zip("abcd", PHOTOGRAPHS, strict=True):
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        image.thumbnail((160, 160))
        (folder / kind).mkdir()
        image.save(folder / kind / "whole.png")
        image.crop((30, 10, 110, 90)).save(folder / kind / "detail.png")


def make_details(folder):
    """160 details in folders of five classes, for the calibration."""
    for kind, name in zip("abcde", (*PHOTOGRAPHS, PHOTOGRAPHS[0]), strict=True):
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        (folder / kind).mkdir(parents=True)
        for number in range(32):
            left, top = 4 * number + 40 * (kind == "e"), 3 * number
            image.crop((left, top, left + 110, top + 110)).save(folder / kind / f"{number}.png")


def command(name):
    return importlib.import_module(COMMANDS[name]).main


def invoke(name, *arguments):
    found = CliRunner().invoke(command(name), [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output
    return found.output


def answers(plan, photographs, **options):
    with Pipeline.open(plan, device="cpu", threads=1, **options) as pipeline:
        found = [pipeline.predict(path) for path in sorted(photographs.rglob("*.png"))]
    return [
        {
            "class": p.class_name,
            "probability": p.probability,
            "logits": p.logits.tolist(),
            "expert_logits": p.expert_logits.tolist(),
            "gate": None if p.gate is None else p.gate.tolist(),
            "boxes": p.boxes.tolist(),
            "heatmaps": [heatmap.ravel().tolist() for heatmap in p.heatmaps],
            "experts_used": p.experts_used,
        }
        for p in found
    ]


def observe_numbers(folder):
    """Export in three precisions, calibrate, run."""
    photographs = folder / "photographs"
    photographs.mkdir()
    make_photographs(photographs)
    make_checkpoint(folder / "best.pt", photographs)
    int8 = [
        "--int8",
        "--force-few-images",
        "--max-drop",
        50,
        "--min-box-iou",
        0,
        "--calib-seed",
        3,
        "--calib-images",
        8,
    ]
    given = {"fp32": [], "fp16": ["--fp16"], "int8": [*int8, "--calib-data", photographs]}
    found = {}
    for precision, options in given.items():
        plan = folder / f"{precision}.plan"
        common = ["--ckpt", folder / "best.pt", "-o", plan, "--verify-data", photographs, "--target", "onnx"]
        invoke("mge-export", *common, *options, "--allow-mismatch")
        found[precision] = answers(plan, photographs)
    plan = folder / "fp32.plan"
    found["two experts"] = answers(plan, photographs, exit=2)
    make_details(folder / "details")
    invoke("mge-calibrate", plan, "--data", folder / "details", "--epsilon", "0.45", "--threads", 1)
    found["calibrated"] = answers(plan, photographs, exit="calibrated")
    return found


def observe_surface():
    """Options of every command with their defaults, and the public names."""
    options = {
        name: sorted(
            [*parameter.opts, *parameter.secondary_opts, repr(parameter.to_info_dict()["default"])]
            for parameter in command(name).params
        )
        for name in COMMANDS
    }
    return {"options": options, "names": sorted(mge_runtime.__all__)}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return observe_numbers(tmp_path_factory.mktemp("fence"))


def close(found, wanted, tolerance):
    found, wanted = np.asarray(found, float), np.asarray(wanted, float)
    return found.shape == wanted.shape and np.abs(found - wanted).max(initial=0) <= tolerance


@pytest.mark.parametrize("run", ["fp32", "fp16", "int8", "two experts", "calibrated"])
def test_a_model_is_exported_calibrated_and_run_with_the_same_numbers(golden, numbers, run):
    precision = run if run in RELATIVE else "fp32"
    for found, wanted in zip(numbers[run], golden["numbers"][run], strict=True):
        assert (found["class"], found["experts_used"]) == (wanted["class"], wanted["experts_used"])
        assert close(found["boxes"], wanted["boxes"], PIXELS[precision])
        for name in ("probability", "logits", "expert_logits", "gate", "heatmaps"):
            if wanted[name] is None:
                assert found[name] is None
                continue
            largest = np.abs(np.asarray(wanted[name], float)).max()
            assert close(found[name], wanted[name], RELATIVE[precision] * largest), name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_same_options(golden, name):
    assert observe_surface()["options"][name] == golden["surface"]["options"][name]


def test_the_runtime_has_the_same_public_names(golden):
    assert observe_surface()["names"] == golden["surface"]["names"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        observed = {"surface": observe_surface(), "numbers": observe_numbers(Path(folder))}
    rounded = json.loads(json.dumps(observed), parse_float=lambda text: float(f"{float(text):.7g}"))
    lines = re.sub(r"\[\s+([^][{}]+?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", json.dumps(rounded, indent=1))
    GOLDEN.write_text(lines + "\n")
