"""How the experts' logits are combined: formulas by hand, and what is guaranteed on the images weights are from."""

import numpy as np
import pytest
import torch

from mge.config import MGEConfig
from mge.evaluation import gate_entropy, gate_report
from mge.model import Average, MGENet, mix
from mge.training.combine import balance, fit_average
from mge.training.recipe import loss_terms


def make_model(gate):
    torch.manual_seed(0)
    config = MGEConfig("plainnet_w16", ("a", "b", "c"), image_size=64, resize=64, parts_per_class=2, gate=gate)
    model = MGENet(config).eval()
    if gate == "shared":
        torch.nn.init.normal_(model.gate.output.weight)
    if gate == "none":
        model.gate.weights.copy_(torch.tensor([0.5, 0.3, 0.2]))
        model.gate.scale.fill_(2.0)
    return model


@pytest.mark.parametrize("gate", ["network", "shared", "none"])
@torch.no_grad()
def test_the_mixture_is_the_weighted_sum(gate):
    model = make_model(gate)
    images = torch.randn(2, 3, 64, 64)
    output = model(images)
    for row in range(2):
        if gate == "network":
            backbone = model.gate.norm5(model.gate.backbone(images[row : row + 1])[-1]).mean((2, 3))
            weights = model.gate.output(model.gate.hidden(backbone)).softmax(1)[0]
        elif gate == "shared":
            c5 = [e.features(o.image[row : row + 1])[1] for e, o in zip(model.experts, output.experts, strict=True)]
            pooled = torch.cat([(f := one.mean((2, 3))[0]) / f.norm() for one in c5])
            weights = (model.gate.output.weight @ pooled + model.gate.output.bias).softmax(0)
        else:
            weights = torch.tensor([0.5, 0.3, 0.2])
        scale = 2 if gate == "none" else 1
        expected = sum(scale * w * e.logits[row] for w, e in zip(weights, output.experts, strict=True))
        torch.testing.assert_close(output.gate[row], weights)
        torch.testing.assert_close(output.logits[row], expected)


def test_a_shared_gate_costs_no_backbone_and_begins_as_the_plain_average():
    shared = MGENet(make_model("shared").config)
    assert not any("gate.backbone" in name for name in shared.state_dict())
    output = shared.eval()(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(output.gate, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize(("gate", "trained"), [("network", True), ("shared", True), ("none", False)])
def test_the_mixture_is_trained_where_there_is_a_gate_to_train(gate, trained):
    model, labels = make_model(gate).train(), torch.tensor([0, 2])
    terms = loss_terms(model(torch.randn(2, 3, 64, 64), labels), labels, gate_balance=0.5)
    assert {"mixture", "balance"} & set(terms) == ({"mixture", "balance"} if trained else set())
    if trained:
        (terms["mixture"] + terms["balance"]).backward()
        assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"gate"}


def test_balance_is_the_squared_coefficient_of_variation():
    weights = torch.rand(20, 3).softmax(1)
    means = weights.mean(0)
    assert balance(weights).item() == pytest.approx((means.std(unbiased=False) / means.mean()).item() ** 2, abs=1e-6)
    assert balance(torch.eye(3)[[0, 0]]).item() == pytest.approx(2)


def top1(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("seed", [0, 32])  # of the second the likeliest weights alone name fewer images right
def test_learned_weights_are_never_less_accurate_than_the_average_or_an_expert(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (60,), generator=generator)
    logits = torch.randn(60, 3, 5, generator=generator) * torch.tensor([1.0, 3.0, 0.5])[:, None]
    logits[torch.arange(60), :, labels] += torch.rand(3, generator=generator) * 3
    gate = Average(3)
    fit_average(gate, logits, labels)
    mixed = mix(gate, gate(logits), logits)
    rivals = [logits.mean(1), *logits.unbind(1)]
    assert top1(mixed, labels) >= max(top1(one, labels) for one in rivals)
    assert gate.weights.sum().item() == pytest.approx(1)
    assert (gate.weights >= 0).all()


@pytest.mark.parametrize("seed", [1, 12])  # one expert is ahead of the average and of the likeliest weights
def test_an_expert_that_is_ahead_by_chance_does_not_get_all_the_weight(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (60,), generator=generator)
    common, own = (torch.randn(60, k, 4, generator=generator) for k in (1, 3))
    logits = common + 0.4 * own + 1.2 * torch.nn.functional.one_hot(labels, 4)[:, None]
    best = max(top1(one, labels) for one in logits.unbind(1))
    assert best > top1(logits.mean(1), labels)
    gate = Average(3)
    fit_average(gate, logits, labels)
    assert top1(mix(gate, gate(logits), logits), labels) >= best
    assert gate.weights.min() > 0.1


def test_learned_weights_find_the_temperatures_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 2, 4, generator=generator)
    truth = torch.tensor([1.5, 0.5])
    labels = torch.distributions.Categorical(logits=(truth[:, None] * logits).sum(1)).sample()
    gate = Average(2)
    fit_average(gate, logits, labels)
    torch.testing.assert_close(gate.weights * gate.scale, truth, rtol=0.1, atol=0.05)


def test_certainty_leaves_the_weights_finite():
    logits = 50 * torch.eye(3).repeat(4, 1)[:, None].repeat(1, 2, 1)
    gate = Average(2)
    fit_average(gate, logits, torch.arange(3).repeat(4))
    assert torch.isfinite(gate.weights).all()
    assert torch.isfinite(gate.scale)


def test_a_collapsed_gate_is_noticed():
    collapsed = np.array([[0.97, 0.02, 0.01], [0.96, 0.03, 0.01]])
    assert "expert 1 has 96.5 %" in gate_report(collapsed)[0]
    assert "--gate none" in gate_report(collapsed)[0]
    assert "no combination was better" in gate_report(np.tile([[0.0, 1.0]], (3, 1)))[0]
    assert gate_report(np.full((2, 3), 1 / 3)) == gate_report(np.ones((2, 1))) == []
    assert gate_entropy(np.eye(3)) == pytest.approx(0, abs=1e-12)
    assert gate_entropy(np.full((4, 3), 1 / 3)) == pytest.approx(1)
