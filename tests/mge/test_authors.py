"""The authors' checkpoint layout, and our model against the method written out by hand."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from skimage import data

from mge.attention import attention_box
from mge.authors import read_authors_state
from mge.checkpoint import load_checkpoint
from mge.config import MGEConfig
from mge.model import MGENet
from mge_runtime.errors import CheckpointError
from tests.helpers import by_hand
from tests.helpers.tiny_models import SHARED, tiny_config

CLASSES = 7
# Of the largest value: float32 sums in another order, through three backbones. The authors' code is compared at 1e-3.
TOLERANCE = 1e-4

# The layout, written down from its description.
CONV4 = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6"}
EXPERTS = (
    ("conv4", "conv5", "classifier", "conv6", "cls_part", "cls_cat"),
    ("conv4_box", "conv5_box", "classifier_box", "conv6_1", "cls_part_1", "cls_cat_1"),
    ("conv4_box_2", "conv5_box_2", "classifier_box_2", "conv6_2", "cls_part_2", "cls_cat_2"),
)


def theirs_and_ours(arch, classes):
    """Pairs (their name, our name, shape) of a whole checkpoint."""
    with torch.device("meta"):
        backbone = getattr(torchvision.models, arch)().state_dict()
    pairs = []

    def add_backbone(conv4, conv5, ours):
        for name, tensor in backbone.items():
            first, _, rest = name.partition(".")
            if first == "layer4":
                pairs.append((f"{conv5}.{rest}", f"{ours}.backbone.{name}", tensor.shape))
            elif first != "fc":
                pairs.append((f"{conv4}.{CONV4[first]}.{rest}", f"{ours}.backbone.{name}", tensor.shape))

    def add_linear(theirs, ours, inputs, outputs):
        pairs.append((f"{theirs}.weight", f"{ours}.weight", (outputs, inputs)))
        pairs.append((f"{theirs}.bias", f"{ours}.bias", (outputs,)))

    parts = 10 * classes
    for k, (conv4, conv5, classifier, conv6, part, cat) in enumerate(EXPERTS):
        ours = f"experts.{k}"
        add_backbone(conv4, conv5, ours)
        add_linear(f"{classifier}.fc", f"{ours}.global_head.fc", 2048, classes)
        pairs.append((f"{conv6}.weight", f"{ours}.part_conv.weight", (parts, 1024, 1, 1)))
        pairs.append((f"{conv6}.bias", f"{ours}.part_conv.bias", (parts,)))
        add_linear(f"{part}.fc", f"{ours}.part_head", parts, classes)
        add_linear(f"{cat}.fc", f"{ours}.concat_head", 2048 + parts, classes)
    add_backbone("conv4_gate", "conv5_gate", "gate")
    add_linear("cls_gate.0.fc", "gate.hidden", 2048, 512)
    add_linear("cls_gate.1.fc", "gate.output", 512, 3)
    return pairs


def authors_state(pairs, classes, prefix="", counters=True):
    """A state dict in which every tensor holds a number of its own, one stored value each."""
    state = OrderedDict()
    for index, (theirs, _, shape) in enumerate(pairs):
        if theirs.endswith("num_batches_tracked"):
            if counters:
                state[prefix + theirs] = torch.tensor(index)
        else:
            state[prefix + theirs] = torch.full((1,) * max(len(shape), 1), index / 1024).expand(shape)
    state[f"{prefix}cls_cat_a.fc.weight"] = torch.zeros(1, 1).expand(classes, 3 * (2048 + 10 * classes))
    state[f"{prefix}cls_cat_a.fc.bias"] = torch.zeros(classes)
    return state


@pytest.fixture(scope="module")
def pairs():
    return theirs_and_ours("resnet50", CLASSES)


@pytest.fixture(scope="module")
def shell():
    return MGENet(MGEConfig("resnet50", tuple("abcdefg")))


@pytest.fixture(autouse=True)
def quick(monkeypatch, shell):
    """Load into one model again and again: building a ResNet-50 model takes longer than filling it."""

    def build(config):
        shell.config = config
        return shell

    monkeypatch.setattr("mge.checkpoint.MGENet", build)


def training_states():
    """What SGD and a scheduler leave in such a file, the scheduler's with a Counter and a NumPy number."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.01}], momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict() | {"best": np.float64(88.5)}}


@pytest.mark.parametrize(
    ("prefix", "zipped", "whole", "counters"),
    [("", True, True, True), ("module.", False, True, False), ("", True, False, True)],
    ids=["as released", "DataParallel, PyTorch 1.0, no counters", "weights alone"],
)
def test_every_weight_finds_its_place(tmp_path, pairs, shell, prefix, zipped, whole, counters):
    for tensor in shell.state_dict().values():
        tensor.fill_(-1)
    path = tmp_path / "model_best.pth.tar"
    content = authors_state(pairs, CLASSES, prefix, counters)
    if whole:
        content = {"epoch": 100, "state_dict": content, **training_states()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = load_checkpoint(path)
    assert not model.training
    state = model.state_dict()
    assert set(state) == {ours for _, ours, _ in pairs}
    for index, (theirs, ours, shape) in enumerate(pairs):
        if theirs.endswith("num_batches_tracked"):
            continue
        assert state[ours].shape == torch.Size(shape)
        assert (state[ours] == index / 1024).all(), ours
    config = model.config
    assert config == MGEConfig(
        arch="resnet50", classes=tuple(f"class_{i}" for i in range(CLASSES)), attention_head="first"
    )
    assert (config.image_size, config.resize, config.box_thresholds) == (448, 512, (0.2, 0.2))
    assert (config.mean, config.std, config.parts_per_class) == ((0.5,) * 3, (0.5,) * 3, 10)


def test_options_stand_for_what_the_file_lacks(tmp_path, pairs):
    path, labels = tmp_path / "a.pth", tmp_path / "classes.txt"
    torch.save({"state_dict": authors_state(pairs, CLASSES)}, path)
    names = [f"Bird {letter}" for letter in "abcdefg"]
    labels.write_text("\n".join(names) + "\n", encoding="utf-8")
    config = load_checkpoint(path, labels=labels, box_threshold=0.4, resize=300, image_size=256).config
    assert config.classes == tuple(names)
    assert (config.box_thresholds, config.resize, config.image_size) == ((0.4, 0.4), 300, 256)
    labels.write_text("\n".join(names[:5]), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"has {CLASSES} classes, .*classes.txt names 5"):
        load_checkpoint(path, labels=labels)


def test_backbone_follows_from_the_shapes():
    pairs = theirs_and_ours("resnet101", 200)
    found, _ = read_authors_state(authors_state(pairs, 200), "a.pth")
    assert (found.arch, found.num_classes, found.parts_per_class, found.gate_width) == ("resnet101", 200, 10, 512)
    with pytest.raises(CheckpointError, match="3-8-36-3 blocks"):
        read_authors_state(authors_state(theirs_and_ours("resnet152", 200), 200), "a.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv5_box.2.conv3.weight"), "'experts.1.backbone.layer4.2.conv3.weight' is missing"),
        (lambda s: s.pop("conv6.weight"), "'conv6.weight' is missing"),
        (lambda s: s.update({"classifier_box_3.fc.weight": torch.zeros(7, 9)}), "'classifier_box_3.fc.weight' is"),
        (lambda s: s.update({"conv4.7.weight": torch.zeros(1)}), "'conv4.7.weight' is no name"),
        (lambda s: s.update({"conv6.weight": torch.zeros(71, 1024, 1, 1)}), "conv6 has 71 channels for 7 classes"),
        (lambda s: s.update({"cls_cat_1.fc.weight": torch.zeros(7, 9)}), r"32 \[7, 9\]; .* float32 \[7, 2118\]"),
        (lambda s: s.update({"cls_cat.fc.bias": torch.full((7,), torch.nan)}), "7 of 7 values NaN or infinite"),
        (lambda s: s.update({"cls_gate.0.fc.weight": torch.zeros(3)}), r"'cls_gate.0.fc.weight' is \[3\]; expected 2"),
        (lambda s: s.update({"conv6.bias": [1.0]}), "'conv6.bias' is a list; expected a tensor"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, pairs, change, message):
    state = authors_state(pairs, CLASSES)
    change(state)
    path = tmp_path / "a.pth"
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "a.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


# The method by hand.


def natural_images(size):
    """Images that need no download, normalized [B, 3, S, S]."""
    images = []
    for pixels in (data.astronaut(), data.coffee(), data.chelsea()):
        short = min(pixels.shape[:2])
        square = Image.fromarray(pixels[:short, :short]).resize((size, size), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(images)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.8, 0.999])
def test_boxes_by_hand(threshold):
    generator = torch.Generator().manual_seed(0)
    cams = torch.randn(40, 5, 5, generator=generator).exp()
    cams[::3] -= 2  # maps of either sign
    cams[0], cams[1] = 0.0, 3.5  # flat
    cams[2], cams[2, 1, 2] = 0.0, 1.0  # one peak
    for size in (33, 64):
        boxes = attention_box(cams, size, threshold).tolist()
        # A flat map keeps every pixel at a threshold of 0; whatever the threshold, nothing stands out in it.
        start = 2 if threshold == 0 else 0
        assert [tuple(box) for box in boxes[start:]] == [by_hand.box_of(c, size, threshold) for c in cams[start:]]
        assert threshold not in (0.5, 0.8) or len({tuple(box) for box in boxes}) > 20


def seeded(config, images):
    """A model with experts that differ, BatchNorm statistics of real images and attention that has peaks."""
    torch.manual_seed(3)
    model = MGENet(config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Small residual branches, or a deep random network turns rounding into differences of its own.
            scale = 0.3 if name.endswith("bn3") else 1.0
            torch.nn.init.uniform_(module.weight, 0.5 * scale, 1.5 * scale)
            torch.nn.init.normal_(module.bias, 0, 0.3 * scale)
            module.momentum = 1.0  # the statistics of the pass below, at once
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, 0, module.in_features**-0.5)
    model.train()
    with torch.no_grad():
        model(images)
        model.eval()
        for expert in model.experts:
            # Each class looks for one of the channels with the narrowest peaks: the sum of many crops nothing.
            _, c5 = expert.backbone(images)
            peaked = (c5.amax((2, 3)) / (c5.mean((2, 3)) + 0.01)).mean(0).topk(config.num_classes).indices
            weight = expert.global_head.fc.weight
            weight.copy_(-0.01 * weight.abs())
            weight[torch.arange(config.num_classes), peaked] = 1.0
    return model


def with_config(model, **changes):
    copied = copy.copy(model)  # the same weights
    copied.config = MGEConfig.from_dict(model.config.to_dict() | changes)
    return copied


def compare(model, images, labels=None):
    """Compare a model with the method by hand; the areas of the crops, [B, K - 1]."""
    with torch.no_grad():
        output = model(images, labels)
    areas = []
    for i, wanted in enumerate(by_hand.run(model, images, labels)):
        rows = [(wanted.mixture, output.logits[i]), (wanted.gate, output.gate[i])]
        for k, expert in enumerate(output.experts):
            rows.append((wanted.global_logits[k], expert.global_logits[i]))
            rows.append((wanted.part_logits[k], expert.part_logits[i]))
            rows.append((wanted.logits[k], expert.logits[i]))
            rows.append((wanted.heatmaps[k], expert.heatmap[i]))
            rows.append((wanted.images[k], expert.image[i]))
        boxes = [tuple(expert.box[i].tolist()) for expert in output.experts if expert.box is not None]
        assert boxes == wanted.boxes
        for expected, found in rows:
            assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
        size = model.config.image_size
        areas.append([(x1 - x0) * (y1 - y0) / size**2 for x0, y0, x1, y1 in boxes])
    return np.array(areas)


@pytest.fixture(scope="module")
def tiny_model():
    config = tiny_config(classes="abcdefg", image_size=160, resize=160, box_thresholds=(0.2, 0.2), gate_width=16)
    return seeded(config, natural_images(160))


@pytest.mark.parametrize("attention_head", ["own", "first"])
@pytest.mark.parametrize("threshold", [0.2, 0.8])
@pytest.mark.parametrize("labels", [None, [6, 0, 3]], ids=["first guess", "true class"])
def test_forward_by_hand(tiny_model, attention_head, threshold, labels):
    model = with_config(tiny_model, attention_head=attention_head, box_thresholds=[threshold, threshold])
    labels = None if labels is None else torch.tensor(labels)
    areas = compare(model, natural_images(160), labels)
    assert (areas < 0.9).sum() >= 2  # real crops, or nothing is compared


def test_forward_with_a_head_that_sees_nothing(tiny_model):
    model = copy.deepcopy(tiny_model)
    torch.nn.init.constant_(model.experts[0].global_head.fc.weight, -1.0)  # no slope above 0: a flat map
    areas = compare(model, natural_images(160))
    assert (areas[:, 0] == 1).all()


@pytest.mark.slow
def test_resnet50_by_hand():
    if SHARED.is_dir():
        found = sorted((SHARED / "data/groceries/test").rglob("*.jpg"))
        assert found, "../shared is there without data/groceries/test"
        image = Image.open(found[len(found) // 2]).convert("RGB").resize((448, 448), Image.Resampling.BILINEAR)
        images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    else:
        images = natural_images(448)[:1]
    model = seeded(MGEConfig("resnet50", tuple("abcdefg"), attention_head="first"), images)
    for threshold in (0.2, 0.8):
        areas = compare(with_config(model, box_thresholds=[threshold] * 2), images)
        assert areas.min() < 0.9
