"""The loop on a tiny network: resuming, interrupting, stopping at nonsense, and what a run leaves."""

import copy
import csv
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mge.checkpoint import load_checkpoint, read_training
from mge.data.folder import FolderDataset, TrainingDataset, batches, make_loader
from mge.data.splits import training_splits
from mge.evaluation import collect
from mge.model import MGENet
from mge.training.loop import Progress, Trainer, within_noise
from mge.training.options import TrainOptions
from mge.training.record import Meter, write_curves
from mge_runtime.errors import TrainingError
from tests.helpers.tiny_models import save_noise, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    for split, count in (("train", 9), ("val", 3)):
        save_noise(folder / split, {"blue": count, "red": count})
    return training_splits(folder, 0)


@pytest.fixture
def make(data, tmp_path):
    classes, train, val = data

    def make(name="run", *, model=None, kind=Trainer, fabric=None, **changes):
        options = TrainOptions(**{"epochs": 2, "batch_size": 4, "workers": 0, "crop_area": (0.5,)} | changes)
        config = tiny_config(2, classes, arch="plainnet_w16", resize=72, box_thresholds=(0.2,))
        torch.manual_seed(options.seed)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return kind(
            model or MGENet(config),
            TrainingDataset(train, config, options),
            FolderDataset(val, config),
            options,
            folder,
            fabric or Fabric(accelerator="cpu", devices=1),
        )

    return make


class Stops(Trainer):
    """Is sent a signal during a step."""

    at = (1, 1)  # epoch and step, from 0
    number = signal.SIGINT

    def _step(self, wrapped, optimizer, images, labels, progress):
        if (progress.epoch, progress.step) == self.at:
            os.kill(os.getpid(), self.number)
        return super()._step(wrapped, optimizer, images, labels, progress)


class StopsInItsLastStep(Stops):
    at = (1, 3)


def losses(progress):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in progress.history]


def with_dropout(trainer):
    """The first expert, whose box decides what the next one sees, and the gate drop features."""
    trainer.model.experts[0].norm5 = nn.Dropout(0.5)
    trainer.model.gate.norm5 = nn.Dropout(0.5)
    return trainer


MODERN = {"optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 1.0, "layer_decay": 0.5, "ema": 0.9,
          "augment": "trivial", "erasing": 0.5, "distill": 1.0}  # fmt: skip


@pytest.mark.parametrize("options", [{}, MODERN], ids=["paper", "modern"])
def test_a_stopped_run_goes_on_exactly(make, options):
    make = functools.partial(make, **options)
    whole = with_dropout(make("whole", workers=1)).fit()  # a loader with workers draws more random numbers
    assert ["loss/distill_1" in row for row in whole.history] == [False, bool(options)]  # in the last third
    for kind in (Stops, StopsInItsLastStep):
        stopped = with_dropout(make(kind.__name__, kind=kind))
        half = stopped.fit()
        assert (half.epoch, half.step, len(half.history)) == (1, kind.at[1] + 1, 1)
        last = stopped.folder / "last.pt"
        torch.manual_seed(99)  # another process begins with other random numbers
        resumed = with_dropout(make(kind.__name__, model=load_checkpoint(last)))
        assert losses(resumed.fit(last)) == losses(whole)
        assert len(list((stopped.folder / "tensorboard").iterdir())) == 2
        mine, theirs = (load_checkpoint(path).state_dict() for path in (last, last.parents[1] / "whole/last.pt"))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    other = with_dropout(make("other", seed=1, epochs=1)).fit()
    assert losses(other) != losses(whole)[:1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_stops_after_a_step_and_handlers_come_back(make, monkeypatch, number):
    monkeypatch.setattr(Stops, "at", (0, 1))
    monkeypatch.setattr(Stops, "number", number)
    before = signal.getsignal(number)
    stopped = make(kind=Stops, crop_area=())
    progress = stopped.fit()
    assert (progress.step, stopped.stopped_by) == (2, number)
    assert read_training(stopped.folder / "last.pt")["progress"]["step"] == 2
    assert signal.getsignal(number) is before


class Scaling(MixedPrecision):
    """What 16-mixed does to the loss, with weights and features in single precision (half is slow on CPUs)."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3))

    def forward_context(self):
        return nullcontext()

    def convert_input(self, data):
        return data


def test_a_resumed_run_in_half_precision_scales_the_loss_alike(make):
    def scaling():
        return Fabric(accelerator="cpu", devices=1, plugins=[Scaling()])

    stopped = make(kind=Stops, fabric=scaling())
    assert stopped.fit().step == 2
    last = stopped.folder / "last.pt"
    assert read_training(last)["precision"]["_growth_tracker"] == 6 % 3
    make(model=load_checkpoint(last), fabric=scaling()).fit(last)
    assert read_training(last)["precision"]["scale"] == 16.0 * 2**2  # doubled after steps 3 and 6 of 8


def test_validation_has_the_precision_of_training(make):
    trainer = make(epochs=1, batch_size=18, fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))
    seen = set()
    trainer.model.gate.hidden.register_forward_hook(lambda module, _, out: seen.add((module.training, out.dtype)))
    trainer.fit()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_the_optimizer_s_state_goes_to_where_the_weights_are(make):
    def double():  # stands for a GPU: Fabric changes the weights when it sets the model up
        return Fabric(accelerator="cpu", devices=1, precision="64-true")

    stopped = make(kind=StopsInItsLastStep, fabric=double())
    stopped.fit()
    last = stopped.folder / "last.pt"
    make(model=load_checkpoint(last), fabric=double()).fit(last)
    assert read_training(last)["optimizer"]["state"][0]["momentum_buffer"].dtype == torch.float64


def test_what_a_run_leaves(make, monkeypatch):
    drawn, draw = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), draw(self, *a, **k)))
    monkeypatch.setattr("mge.training.loop.write_curves", write_curves)
    trainer = make(epochs=3)
    progress = trainer.fit()
    names = {path.name for path in trainer.folder.iterdir()}
    assert names == {"best.pt", "last.pt", "metrics.csv", "curves.png", "tensorboard"}
    with (trainer.folder / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == progress.history
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[0]["threshold/1"] != 0.2  # it has followed the area before the first epoch
    assert all(row["gate/1"] + row["gate/2"] == pytest.approx(1) and 0 < row["gate/entropy"] <= 1 for row in rows)
    parts = [value for key, value in rows[0].items() if key.startswith("loss/") and key != "loss/total"]
    assert rows[0]["loss/total"] == pytest.approx(sum(parts))
    with Image.open(trainer.folder / "curves.png") as image:
        assert image.size[0] > 600
    panels = drawn[-1].axes
    assert panels[-1].get_title().startswith("learning rate")
    for axes in panels:
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1, "it covers the curves"
        assert all(tick == round(tick) for tick in axes.get_xticks()), "there are no half epochs"
        looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
        assert len(set(looks)) == len(looks) > 1
    accuracies = [row["top1/mixture"] for row in rows]
    best = max(i for i in range(3) if within_noise(accuracies[i], max(accuracies[:i], default=-1), 6))
    assert load_checkpoint(trainer.folder / "best.pt").config.box_thresholds == (rows[best]["threshold/1"],)


def test_off_a_terminal_a_line_says_how_far_the_run_is(make, monkeypatch, capsys):
    monkeypatch.setattr(Meter, "EVERY", 0.0)
    make(batch_size=9).fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if ", batch " in line]
    assert [line.partition(":")[0] for line in lines] == [
        f"epoch {epoch}/2, batch {batch}/2" for epoch in (1, 2) for batch in (1, 2)
    ]
    assert re.fullmatch(r"epoch 2/2, batch 1/2: loss \d+\.\d{3}, 75% done, \d\d:\d\d left of the run", lines[2])


def test_only_the_workers_of_training_outlive_an_epoch(make):
    trainer = make(epochs=1, workers=1)
    before = {process.pid for process in multiprocessing.active_children()}
    trainer.fit()
    assert len({process.pid for process in multiprocessing.active_children()} - before) == 1


def test_compiled_backbones_learn_the_same(make, monkeypatch):
    """Traced forwards and backwards; the generated code, which takes minutes, is left out."""
    compiled, original = [], nn.Module.compile

    def traced(module):
        compiled.append(module)
        original(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    plain, faster = (make(str(flag), epochs=1, compile=flag) for flag in (False, True))
    first, second = plain.fit().history[0], faster.fit().history[0]
    assert compiled == [*(expert.backbone for expert in faster.model.experts), faster.model.gate.backbone]
    assert second["loss/total"] == pytest.approx(first["loss/total"], rel=1e-3)
    assert load_checkpoint(faster.folder / "last.pt").state_dict().keys() == plain.model.state_dict().keys()


def test_a_loss_that_is_not_finite_stops_the_run(make):
    trainer = make()
    with torch.no_grad():
        trainer.model.experts[1].global_head.fc.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"global_2 became nan in epoch 1, step 1.*--clip-norm"):
        trainer.fit()
    assert not (trainer.folder / "best.pt").exists()


def test_weights_ruined_by_the_last_step_do_not_become_the_best(make):
    trainer = make(epochs=1, head_lr=1e30, batch_size=18)  # a single step, whose loss is still finite
    with pytest.raises(TrainingError, match="not finite after epoch 1"):
        trainer.fit()
    assert not (trainer.folder / "best.pt").exists()


def test_a_grown_run_is_the_longer_one_and_in_tensorboard_once(make, capsys):
    whole = make("whole").fit()
    grown = make(epochs=1)
    grown.fit()
    last = grown.folder / "last.pt"
    saved = last.read_bytes()
    for _ in range(2):  # the second epoch is trained again
        last.write_bytes(saved)
        assert losses(make(model=load_checkpoint(last)).fit(last)) == losses(whole)
    assert "2 epochs instead of 1" in capsys.readouterr().out
    events = EventAccumulator(str(grown.folder / "tensorboard")).Reload().Scalars("loss/total")
    assert [event.step for event in events] == [1, 2]


class Watched(Trainer):
    """Keeps the weights after every step, and what validation predicts."""

    def _step(self, *arguments):
        super()._step(*arguments)
        self.states = [*getattr(self, "states", []), copy.deepcopy(self.model.state_dict())]

    def _validate(self, validated):
        self.predictions = super()._validate(validated)
        return self.predictions


def test_the_moving_average_is_validated_and_kept(make):
    """Of weights and statistics alike, step by step by its formula; its decay begins at 0 and rises to `ema`."""
    trainer = make(kind=Watched, epochs=1, batch_size=2, ema=0.7)
    trainer.fit()
    expected = trainer.states[0]
    for update, state in enumerate(trainer.states[1:], 1):
        decay = min(1 - (1 + update) ** (-2 / 3), 0.7)
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in state.items()}
    kept, trained = load_checkpoint(trainer.folder / "best.pt"), read_training(trainer.folder / "last.pt")["weights"]
    for name, value in kept.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], msg=name)
        assert torch.equal(trained[name], trainer.states[-1][name])
    assert "experts.0.backbone.stage1.1.running_var" in trained
    again = collect(kept, batches(make_loader(trainer.val, 6, workers=0)))
    np.testing.assert_allclose(trainer.predictions.final, again.final, atol=1e-5)


def test_the_last_third_holds_the_statistics_of_a_shared_backbone_and_distills(make):
    trainer = make(kind=Watched, epochs=3, distill=1.0, ema=0.5)
    config = dataclasses.replace(trainer.model.config, sharing="backbone", gate="none")
    trainer.model = MGENet(config)
    progress = trainer.fit()
    name, weight = "experts.0.backbone.stage1.1.running_mean", "experts.0.backbone.stage1.0.weight"
    steps = list(itertools.pairwise(trainer.states))
    late = len(trainer.states) // 3 * 2 - 1
    assert [torch.equal(one[name], two[name]) for one, two in steps] == [place >= late for place in range(len(steps))]
    assert not any(torch.equal(one[weight], two[weight]) for one, two in steps)
    assert ["loss/distill_1" in row for row in progress.history] == [False, False, True]
    gates = [model.gate.weights.tolist() for model in (trainer.result, trainer.model)]
    assert gates[0] == gates[1] == pytest.approx([progress.history[-1][f"gate/{k}"] for k in (1, 2)])
    assert gates[0] != [0.5, 0.5]  # what experts follow is the mixture that is fitted
    assert "loss/distill_1" not in make("short", epochs=1, distill=1.0).fit().history[0]


def test_removed_images_are_said_and_the_rest_goes_on(make, capsys):
    stopped = make(epochs=3, kind=StopsInItsLastStep)
    assert stopped.fit().step == 4
    last = stopped.folder / "last.pt"
    fewer = make(epochs=3, model=load_checkpoint(last))
    del fewer.train.samples[-7:]  # 11 images left: 2 steps an epoch, where 4 of this one are done
    progress = fewer.fit(last)
    assert "trained on 18 images" in capsys.readouterr().out
    assert (progress.epoch, len(progress.history)) == (3, 3)
    assert progress.history[0]["loss/total"] < 1.5 * progress.history[1]["loss/total"]  # a mean of the steps that count


def test_another_number_of_processes_goes_on_at_the_same_images(make, capsys):
    stopped = make(batch_size=2, kind=Stops)
    last = stopped.folder / "last.pt"
    assert stopped.fit().step == 2
    content = torch.load(last)
    content["training"]["processes"] = 3
    torch.save(content, last)
    first = []

    class Watched(Trainer):
        def _step(self, wrapped, optimizer, images, labels, progress):
            first.append((progress.epoch, progress.step))
            super()._step(wrapped, optimizer, images, labels, progress)

    make(batch_size=2, kind=Watched, model=load_checkpoint(last)).fit(last)
    assert first[0] == (1, 6)
    assert "1 processes instead of 3: " in capsys.readouterr().out
    progress = Progress(step=5, sums={"part": 15.0})
    progress.move(10)
    assert (progress.step, progress.sums["part"]) == (10, pytest.approx(30.0))


def test_no_step_waits_for_the_device(make, monkeypatch):
    """Python waits for a GPU where it reads a value; on a CPU such reads can be counted."""
    reads = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.append(str(function))
            return function(*args, **(kwargs or {}))

    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _n=name, _o=original, **k: (reads.append(_n), _o(self, *a, **k))[1]
        )
    found = []

    class Watched(Trainer):
        def _step(self, wrapped, optimizer, images, labels, progress):
            before = len(reads)
            super()._step(wrapped, optimizer, images, labels, progress)
            found.append((before, len(reads)))

    trainer = make(kind=Watched, epochs=1, batch_size=2, crop_area=(), ema=0.9)  # no validation before the first step
    trainer._val_loader, trainer._train_loader  # noqa: B018 - made once, before anything is counted
    with Counts():
        trainer.fit()
    assert len(found) == 9
    assert {count for step in found for count in step} == {found[0][0]}  # neither in steps nor between them
    assert len(reads) > found[-1][1]  # the losses are read after the last
    assert trainer.model.config.box_thresholds == (0.2,)  # without a target area they stay


def test_the_latest_epoch_within_noise_is_kept():
    # One standard error at 90 % on 100 images is 3 points.
    assert within_noise(0.5, -1, 100)
    assert within_noise(0.88, 0.9, 100)
    assert not within_noise(0.86, 0.9, 100)
    assert not within_noise(0.88, 0.9, 10_000)
