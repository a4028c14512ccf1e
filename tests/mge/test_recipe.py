"""The recipe: losses against their formulas written out class by class, learning rates, memory layout."""

import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mge.config import MGEConfig
from mge.model import MGENet
from mge.training.options import OPTIMIZERS, TrainOptions
from mge.training.recipe import (
    distillation,
    diversity,
    freeze,
    loss_terms,
    make_optimizer,
    make_schedule,
    to_training_layout,
)
from tests.helpers.tiny_models import tiny_config


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
    model = MGENet(tiny_config())
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


def test_experts_before_the_last_follow_the_mixture_without_moving_it(step):
    model, output, labels = step
    terms = loss_terms(output, labels, distill=0.5)
    assert {"distill_1", "distill_2"} == set(terms) - set(loss_terms(output, labels))
    target = (output.logits / 2).softmax(1)
    heads = (output.experts[0].global_logits, output.experts[0].logits)
    divergence = [(target * (target.log() - (logits / 2).log_softmax(1))).sum(1).mean() for logits in heads]
    torch.testing.assert_close(terms["distill_1"], 0.5 * 4 * sum(divergence))
    layers = {f"experts.0.{name}.{kind}" for name in ("global_head.fc", "concat_head") for kind in ("weight", "bias")}
    assert trained_by(model, terms["distill_1"]) == {"experts.0.backbone"} | layers
    assert distillation(output.logits, output.logits).item() == pytest.approx(0, abs=1e-6)


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


def rates_of(optimizer, schedule, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


def test_rates_of_backbones_and_heads_fall_tenfold_every_thirty_epochs(step):
    model, options = step[0], TrainOptions()
    optimizer = make_optimizer(model, options)
    backbones, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert backbones == {id(p) for name, p in model.named_parameters() if ".backbone." in name}
    assert others == {id(p) for name, p in model.named_parameters() if ".backbone." not in name}
    assert [(group["weight_decay"], group["momentum"]) for group in optimizer.param_groups] == [(1e-4, 0.9)] * 2
    rates = rates_of(optimizer, make_schedule(optimizer, options, steps_per_epoch=2), 200)
    for epoch, factor in ((0, 1), (29, 1), (30, 0.1), (59, 0.1), (60, 0.01), (90, 0.001)):
        assert rates[2 * epoch] == pytest.approx([0.001 * factor, 0.01 * factor])


def test_rates_fall_from_layer_to_layer_before():
    """A layer is twelve parameters; each backbone has its own."""
    backbones = [nn.Sequential(*(nn.Linear(1, 1) for _ in range(count))) for count in (13, 6)]  # 26 and 12 parameters
    model = nn.ModuleDict({str(k): nn.ModuleDict({"backbone": one}) for k, one in enumerate(backbones)})
    model["head"] = nn.Linear(1, 1)
    groups = make_optimizer(model, TrainOptions(layer_decay=0.5)).param_groups
    assert [group["lr"] for group in groups] == [0.001, 0.0005, 0.00025, 0.01]
    assert [len(group["params"]) for group in groups] == [24, 12, 2, 2]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in backbones[0][0].parameters()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_goes_on(name):
    options = TrainOptions(optimizer=name)

    def step(model, optimizer):
        optimizer.zero_grad()
        before = (model["head"](torch.ones(1)) - 10).square()
        before.backward()
        optimizer.step()
        assert (model["head"](torch.ones(1)) - 10).square() < before
        return [*model.parameters(), optimizer.state_dict()["state"]]

    model = heads_alone()
    optimizer = make_optimizer(model, options)
    step(model, optimizer)
    again = copy.deepcopy(model)
    resumed = make_optimizer(again, options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(step(again, resumed), step(model, optimizer), rtol=0, atol=0)


def heads_alone():
    return nn.ModuleDict({"backbone": nn.Linear(1, 1), "head": nn.Linear(1, 1)})


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_rates_rise_first(schedule):
    options = TrainOptions(epochs=5, warmup_epochs=1.5, schedule=schedule)
    optimizer = make_optimizer(heads_alone(), options)
    heads = [rates[-1] for rates in rates_of(optimizer, make_schedule(optimizer, options, 2), 10)]
    assert heads[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert heads[4:] == sorted(heads[4:], reverse=True)
    assert (heads[-1] < 0.001) == (schedule == "cosine")


@pytest.mark.parametrize("warmup", [0.0, 2.0])
@pytest.mark.parametrize("schedule", ["step", "onecycle", "cosine"])
def test_a_schedule_goes_on_where_a_shorter_run_ended(schedule, warmup):
    """As the longer run's would; only "step" had the same rates before."""
    short, long = (
        TrainOptions(epochs=epochs, step_epochs=2, schedule=schedule, warmup_epochs=warmup) for epochs in (3, 5)
    )
    optimizer = make_optimizer(heads_alone(), long)
    whole = rates_of(optimizer, make_schedule(optimizer, long, 4), 19)
    if schedule != "step":
        assert max(heads for _, heads in whole) == pytest.approx(0.01)
        assert whole[-1][1] < 0.001
    optimizer = make_optimizer(heads_alone(), short)
    rates_of(optimizer, make_schedule(optimizer, short, 4), 11)
    resumed = make_optimizer(heads_alone(), long)
    resumed.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(rates_of(resumed, make_schedule(resumed, long, 4, done=12), 7), whole[12:])


@pytest.mark.parametrize(("arch", "fragile"), [("mobileone_s0", 1), ("resnet18", 0)])
def test_convolutions_that_ruin_the_heap_are_kept_out_of_channels_last(arch, fragile):
    """1x1, stride 2, few channels: for each expert, whose image comes in any layout. A ResNet's are wide enough."""
    model = MGENet(MGEConfig(arch, ("a", "b"), experts=2, image_size=64, resize=64, box_thresholds=(0.5,)))
    to_training_layout(model, torch.device("cpu"))
    layouts = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride == (2, 2):
            module.register_forward_hook(
                lambda module, args, _: layouts.append(
                    (args[0].shape[1], args[0].stride()[1], module.weight.stride()[1])
                )
            )
    model(torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert layouts
    assert sum(channels < 16 for channels, *_ in layouts) == 3 * fragile  # two experts and the gate
    for channels, stride, weight_stride in layouts:
        assert (stride > 1, weight_stride) == ((True, 1) if channels < 16 else (False, 1))


def test_a_second_fit_adds_no_hooks_and_a_model_in_its_layout_can_be_pickled():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2))
    for _ in range(2):
        to_training_layout(model, torch.device("cpu"))
    (layer,) = pickle.loads(pickle.dumps(model))
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == (1, 1)


@pytest.mark.parametrize("arch", ["resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto"])
def test_frozen_are_all_layers_that_lead_to_a_stride_and_no_other(arch):
    model = MGENet(tiny_config(1, arch=arch, gate="none"))
    freeze(model, 4)
    level = model.experts[0].backbone.feature_info.info
    until = next(place for place, item in enumerate(level) if item["reduction"] == 4)
    backbone = timm.create_model(arch, features_only=True, out_indices=(until,))
    backbone(torch.randn(2, 3, 64, 64))[0].sum().backward()
    frozen = {name for name, weight in model.experts[0].backbone.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name, weight in backbone.named_parameters() if weight.grad is not None}
