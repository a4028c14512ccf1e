"""The losses against their formulas written out class by class."""

import math

import pytest
import torch
import torch.nn.functional as F

from mge.config import MGEConfig
from mge.model import MGENet
from mge.training.recipe import diversity, loss_terms


def by_hand(logits, previous, labels, *, renormalize):
    values = []
    for row, before, label in zip(logits, previous, labels.tolist(), strict=True):
        p, q = row.softmax(0).tolist(), before.softmax(0).tolist()
        wrong = [c for c in range(len(p)) if c != label]
        if renormalize:
            p_sum, q_sum = sum(p[c] for c in wrong), sum(q[c] for c in wrong)
            p, q = [value / p_sum for value in p], [value / q_sum for value in q]
        values += [math.exp(-q[c] * (math.log(q[c]) - math.log(p[c]))) if c != label else 1.0 for c in range(len(p))]
    return sum(values) / len(values)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_diversity_equals_its_formula(form):
    logits, previous = 2 * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 5, 2, 2])
    expected = by_hand(logits, previous, labels, renormalize=form == "paper")
    assert diversity(logits, previous, labels, form).item() == pytest.approx(expected, rel=1e-5)


def test_diversity_is_one_for_equal_experts_and_trains_only_the_later_one():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    previous = logits.detach().clone().requires_grad_()
    labels = torch.tensor([1, 2, 3])
    assert diversity(logits, previous, labels).item() == pytest.approx(1)
    diversity(logits, previous + 1, labels).backward()
    assert logits.grad is not None
    assert previous.grad is None


def test_diversity_survives_certainty():
    certain = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    for form in ("code", "paper"):
        diversity(certain, torch.tensor([[0.0, 300.0, -300.0]]), torch.tensor([0]), form).backward()
    assert torch.isfinite(certain.grad).all()


@pytest.fixture(scope="module")
def step():
    torch.manual_seed(0)
    model = MGENet(MGEConfig("test_resnet", ("a", "b", "c"), image_size=64, resize=64))
    labels = torch.tensor([0, 1, 2, 1])
    return model, model(torch.randn(4, 3, 64, 64), labels), labels


def test_terms_are_the_papers_ten_entropies_and_two_diversities(step):
    _, output, labels = step
    terms = loss_terms(output, labels)
    assert sorted(terms) == sorted(
        [f"{head}_{k}" for head in ("global", "part", "concat") for k in (1, 2, 3)]
        + ["mixture", "diversity_2", "diversity_3"]
    )
    torch.testing.assert_close(terms["concat_2"], F.cross_entropy(output.experts[1].logits, labels))
    torch.testing.assert_close(terms["mixture"], F.cross_entropy(output.logits, labels))


def trained_by(model, term):
    model.zero_grad()
    term.backward(retain_graph=True)
    return {name.split(".backbone.")[0] + (".backbone" if ".backbone." in name else "")
            for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}  # fmt: skip


def test_each_term_trains_what_the_paper_says(step):
    model, output, labels = step
    terms = loss_terms(output, labels)
    assert trained_by(model, terms["global_2"]) == {
        "experts.1.backbone", "experts.1.global_head.fc.weight", "experts.1.global_head.fc.bias"
    }  # fmt: skip
    assert trained_by(model, terms["part_1"]) == {
        f"experts.0.{name}.{kind}" for name in ("part_conv", "part_head") for kind in ("weight", "bias")
    }
    assert trained_by(model, terms["concat_3"]) == {"experts.2.concat_head.weight", "experts.2.concat_head.bias"}
    layers = {f"gate.{name}.{kind}" for name in ("hidden", "output") for kind in ("weight", "bias")}
    assert trained_by(model, terms["mixture"]) == {"gate.backbone"} | layers
