"""Backbones, one for all experts: its gradient, what optimizer and checkpoint hold, initial weights, fine-tuning."""

import dataclasses

import pytest
import timm
import torch
from safetensors.torch import save_file

from mge.backbones import create_backbone
from mge.checkpoint import load_checkpoint, save_checkpoint
from mge.cli.train import main as train
from mge.model import MGENet, initialize_backbones
from mge.training.options import TrainOptions
from mge.training.recipe import loss_terms, make_optimizer
from mge_runtime.errors import CheckpointError
from tests.helpers.commands import fails, succeeds
from tests.helpers.tiny_models import make_model, save_noise


@pytest.fixture(params=["none", "network"])
def shared(request):
    return make_model(3, gate=request.param, sharing="backbone")


def test_the_gradient_is_the_sum_over_the_experts_passes(shared):
    copies = MGENet(dataclasses.replace(shared.config, sharing="none"))
    copies.load_state_dict(shared.state_dict())
    images, labels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    for model in (shared, copies):
        terms = loss_terms(model.train()(images, labels), labels)
        torch.stack(list(terms.values())).sum().backward()
    own = [dict(expert.named_parameters()) for expert in copies.experts]
    passes = [sum(float(p.grad.square().sum()) for name, p in one.items() if "backbone." in name) for one in own]
    assert min(passes) > 0
    for k, expert in enumerate(shared.experts):
        for name, parameter in expert.named_parameters():
            wanted = sum(one[name].grad for one in own) if "backbone." in name else own[k][name].grad
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_the_optimizer_has_each_weight_once(shared):
    groups = make_optimizer(shared, TrainOptions()).param_groups
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(shared.parameters()))
    backbones = 1 + (shared.config.gate == "network")
    assert len(groups[0]["params"]) == backbones * len(list(shared.experts[0].backbone.parameters()))


def test_the_file_has_the_backbone_once_and_is_read_strictly(shared, tmp_path):
    save_checkpoint(tmp_path / "best.pt", shared)
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    stored = {name.split(".")[1] for name in content["model"] if name.startswith("experts.") and ".backbone." in name}
    assert stored == {"0"}
    loaded = load_checkpoint(tmp_path / "best.pt")
    assert len({expert.backbone for expert in loaded.experts}) == 1
    assert all(torch.equal(one, loaded.state_dict()[name]) for name, one in shared.state_dict().items())
    name = "experts.0.backbone.conv1.0.weight"
    for change, message in (
        (lambda weights: weights.pop(name), f"weight '{name}' is missing"),
        (lambda weights: weights.update({name.replace("0", "1", 1): weights[name]}), "has no place in the model"),
    ):
        weights = dict(content["model"])
        change(weights)
        torch.save(content | {"model": weights}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "other.pt")


def test_pretrained_weights_reach_the_one_backbone(shared, tmp_path):
    weights = create_backbone("resnet10t")[0].state_dict()
    save_file(weights, tmp_path / "backbone.safetensors")
    initialize_backbones(shared, str(tmp_path / "backbone.safetensors"))
    for expert in shared.experts:
        assert all(torch.equal(one, weights[name]) for name, one in expert.backbone.state_dict().items())


def test_a_run_is_trained_resumed_and_fine_tuned(tmp_path):
    folder = save_noise(tmp_path / "data/train", {"a": 4, "b": 4}).parent
    other = save_noise(tmp_path / "other/train", {"c": 4, "d": 4}).parent
    quick = ["--batch-size", 4, "--accelerator", "cpu", "--workers", 0]
    start = ["--init", "none", "--arch", "test_resnet", "--image-size", 64, "--gate", "shared", "--sharing", "backbone"]
    start += ["--recipe", "paper"]
    succeeds(train, "--data", folder, "--out", tmp_path / "run", *start, *quick, "--epochs", 1)
    last = tmp_path / "run/last.pt"
    assert "--sharing backbone, now it is none" in fails(train, "--resume", last, "--sharing", "none")
    counts = [load_checkpoint(last).experts[0].backbone.bn1.num_batches_tracked.item()]
    succeeds(train, "--resume", last, "--epochs", 3)
    counts.append(load_checkpoint(last).experts[0].backbone.bn1.num_batches_tracked.item())
    assert counts[1] == 2 * counts[0] > 0  # in the last third statistics stay
    tuned = ["--data", other, "--out", tmp_path / "tuned", "--init", last, *quick, "--epochs", 1, "--backbone-lr", 0]
    assert "has sharing backbone, not none; leave the option out" in fails(train, *tuned, "--sharing", "none")
    succeeds(train, *tuned)
    before, after = (load_checkpoint(path) for path in (last, tmp_path / "tuned/last.pt"))
    assert after.config.sharing == "backbone"
    for name, weight in before.experts[2].backbone.named_parameters():
        assert torch.equal(weight, after.experts[0].backbone.get_parameter(name))


def test_backbone_ends_at_strides_16_and_32():
    backbone, channels4, channels5 = create_backbone("plainnet_w16")
    assert (channels4, channels5) == (128, 128)
    c4, c5 = backbone(torch.zeros(2, 3, 112, 96))
    assert c4.shape == (2, 128, 7, 6)
    assert c5.shape == (2, 128, 4, 3)
    assert (c5 >= 0).all()  # ReLU at the end: attention needs no normalization
    assert sum(p.numel() for p in backbone.parameters()) < 0.25e6


def test_features_are_those_of_the_classifier():
    torch.manual_seed(0)
    model = timm.create_model("plainnet_w16", num_classes=5).eval()
    backbone = timm.create_model("plainnet_w16", features_only=True, out_indices=(-1,)).eval()
    backbone.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("fc.")})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.fc(backbone(images)[0].mean((2, 3))), model(images))
