"""The loop on a tiny network and drawn squares: resuming, interrupting, stopping at nonsense."""

import csv
import multiprocessing
import os
import pickle
import re
import signal
from contextlib import nullcontext
from typing import ClassVar

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
from torch.utils.data import Dataset

from mge.checkpoint import load_checkpoint, read_checkpoint
from mge.config import MGEConfig
from mge.data.folder import EpochSampler, FolderDataset, TrainingDataset, batches, make_loader, random_crop
from mge.data.splits import training_splits
from mge.model import MGENet
from mge.training.loop import Progress, Trainer, within_noise
from mge.training.recipe import TrainOptions, make_optimizer, make_schedule, to_training_layout
from mge.training.record import Meter
from mge_runtime.errors import InputError, TrainingError

COLORS = {"blue": (40, 60, 220), "red": (220, 50, 40)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    random = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 3)):
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (72, 80, 3), dtype=np.uint8)
                top, left = random.integers(0, 40, 2)
                pixels[top : top + 32, left : left + 32] = color
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def make(data, tmp_path):
    classes, train, val = training_splits(data, 0)

    def make(name="run", *, dataset=TrainingDataset, model=None, kind=Trainer, fabric=None, **changes):
        options = TrainOptions(**{"epochs": 3, "batch_size": 4, "workers": 0, "crop_area": 0.5} | changes)
        config = MGEConfig("test_resnet", classes, image_size=64, resize=72)
        torch.manual_seed(options.seed)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return kind(
            model or MGENet(config),
            dataset(train, config, seed=options.seed),
            FolderDataset(val, config),
            options,
            folder,
            fabric or Fabric(accelerator="cpu", devices=1),
        )

    return make


class IsSignalled(TrainingDataset):
    """Sends a signal to this process while an image is being read."""

    left: ClassVar = [signal.SIGINT]

    def __getitem__(self, key):
        if key[0] == 1 and self.left and np.random.default_rng(key).random() < 0.5:
            os.kill(os.getpid(), self.left.pop())
        return super().__getitem__(key)


class StopsInTheSecondEpoch(Trainer):
    """Is sent Ctrl-C during one step of it."""

    at = 1  # the step, from 0

    def _step(self, wrapped, optimizer, images, labels, progress):
        if (progress.epoch, progress.step) == (1, self.at):
            os.kill(os.getpid(), signal.SIGINT)
        return super()._step(wrapped, optimizer, images, labels, progress)


class StopsInItsLastStep(StopsInTheSecondEpoch):
    at = 3


def losses(progress):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in progress.history]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_stopped_by_a_signal_goes_on_exactly(make, monkeypatch, number):
    whole = make("whole").fit()
    assert whole.epoch == 3
    monkeypatch.setattr(IsSignalled, "left", [number])
    stopped = make("stopped", dataset=IsSignalled)
    half = stopped.fit()
    assert (IsSignalled.left, stopped.stopped_by) == ([], number)
    assert (half.epoch, len(half.history)) == (1, 1)
    assert 0 < half.step < stopped.steps_per_epoch  # within the second epoch
    last = stopped.folder / "last.pt"
    resumed = make("stopped", model=load_checkpoint(last))
    assert losses(resumed.fit(last)) == losses(whole)
    assert [len(list((make(name).folder / "tensorboard").iterdir())) for name in ("whole", "stopped")] == [1, 2]
    mine, theirs = (load_checkpoint(last.parents[1] / name / "last.pt").state_dict() for name in ("stopped", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def with_dropout(model):
    """The same weights; the first expert, whose box decides what the others see, and the gate drop features."""
    model.experts[0].norm5 = nn.Dropout(0.5)
    model.gate.norm5 = nn.Dropout(0.5)
    return model


def test_resumed_runs_drop_the_same_features(make):
    new = make("new", epochs=2, workers=1)
    whole = with_dropout(new.model) and new.fit()
    for kind in (StopsInTheSecondEpoch, StopsInItsLastStep):
        stopped = make(kind.__name__, epochs=2, kind=kind)
        half = with_dropout(stopped.model) and stopped.fit()
        assert (half.epoch, half.step) == (1, kind.at + 1)
        last = stopped.folder / "last.pt"
        torch.manual_seed(99)  # another process begins with other random numbers
        resumed = make(kind.__name__, epochs=2, workers=1, model=with_dropout(load_checkpoint(last)))
        assert losses(resumed.fit(last)) == losses(whole)


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

    stopped = make(epochs=2, kind=StopsInTheSecondEpoch, fabric=scaling())
    assert stopped.fit().step == 2
    last = stopped.folder / "last.pt"
    assert read_checkpoint(last).training["precision"]["_growth_tracker"] == 6 % 3
    make(epochs=2, model=load_checkpoint(last), fabric=scaling()).fit(last)
    assert read_checkpoint(last).training["precision"]["scale"] == 16.0 * 2**2  # doubled after steps 3 and 6 of 8


def test_validation_has_the_precision_of_training(make):
    trainer = make(epochs=1, batch_size=18, fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))
    seen = set()
    trainer.model.gate.hidden.register_forward_hook(lambda module, _, out: seen.add((module.training, out.dtype)))
    trainer.fit()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_the_optimizer_s_state_goes_to_where_the_weights_are(make):
    def double():  # stands for a GPU: Fabric changes the weights when it sets the model up
        return Fabric(accelerator="cpu", devices=1, precision="64-true")

    stopped = make(epochs=2, kind=StopsInTheSecondEpoch, fabric=double())
    stopped.fit()
    last = stopped.folder / "last.pt"
    make(epochs=2, model=load_checkpoint(last), fabric=double()).fit(last)
    momentum = read_checkpoint(last).training["optimizer"]["state"][0]["momentum_buffer"]
    assert momentum.dtype == torch.float64


def test_an_epoch_that_was_not_saved_appears_once_in_tensorboard(make):
    one = make(epochs=1)
    one.fit()
    last = one.folder / "last.pt"
    saved = last.read_bytes()
    for _ in range(2):  # the second epoch is trained again
        last.write_bytes(saved)
        make(epochs=2, model=load_checkpoint(last)).fit(last)
    events = EventAccumulator(str(one.folder / "tensorboard")).Reload().Scalars("loss/total")
    assert [event.step for event in events] == [1, 2]


def test_ctrl_c_is_as_before_after_training(make):
    before = signal.getsignal(signal.SIGINT)
    make(epochs=1).fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_run_leaves(make, monkeypatch):
    drawn, draw = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), draw(self, *a, **k)))
    trainer = make()
    progress = trainer.fit()
    names = {path.name for path in trainer.folder.iterdir()}
    assert names == {"best.pt", "last.pt", "metrics.csv", "curves.png", "tensorboard"}
    with (trainer.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(float(row["epoch"])) for row in rows] == [1, 2, 3]
    assert float(rows[2]["loss/total"]) == pytest.approx(progress.history[2]["loss/total"])
    assert float(rows[0]["loss/total"]) == pytest.approx(
        sum(float(value) for key, value in rows[0].items() if key.startswith("loss/") and key != "loss/total")
    )
    with Image.open(trainer.folder / "curves.png") as image:
        assert image.size[0] > 600
    panels = drawn[-1].axes
    assert panels[-1].get_title().startswith("learning rate")
    for axes in panels:
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1, "it covers the curves"
        assert all(tick == round(tick) for tick in axes.get_xticks()), "there are no half epochs"
        looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
        assert len(set(looks)) == len(looks) > 1
    accuracies = [float(row["top1/mixture"]) for row in rows]
    best = max(i for i in range(3) if within_noise(accuracies[i], max(accuracies[:i], default=-1), 6))
    stored = load_checkpoint(trainer.folder / "best.pt").config.box_thresholds
    assert stored == tuple(float(rows[best][f"threshold/{k}"]) for k in (1, 2))


def test_off_a_terminal_a_line_says_how_far_the_run_is(make, monkeypatch, capsys):
    monkeypatch.setattr(Meter, "EVERY", 0.0)
    make(epochs=2, batch_size=9).fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if ", batch " in line]
    assert [line.partition(":")[0] for line in lines] == [
        f"epoch {epoch}/2, batch {batch}/2" for epoch in (1, 2) for batch in (1, 2)
    ]
    assert re.fullmatch(r"epoch 2/2, batch 1/2: loss \d+\.\d{3}, 75% done, \d\d:\d\d left of the run", lines[2])


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


def test_workers_live_on_and_batches_for_a_gpu_are_pinned():
    class Process(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return os.getpid()

    loader = make_loader(Process(), 2, workers=1, persistent=True)
    first, second = (next(batches(loader)) for _ in range(2))
    assert first.tolist() == second.tolist() != [os.getpid()] * 2
    assert [make_loader(Process(), 2, workers=0, device=torch.device(name)).pin_memory for name in ("cpu", "cuda")] == [
        False,
        True,
    ]


def test_only_the_workers_of_training_outlive_an_epoch(make):
    trainer = make("run", epochs=1, workers=1)
    before = {process.pid for process in multiprocessing.active_children()}
    trainer.fit()
    assert len({process.pid for process in multiprocessing.active_children()} - before) == 1


def test_a_second_fit_adds_no_hooks_and_a_model_in_its_layout_can_be_pickled():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2))
    for _ in range(2):
        to_training_layout(model, torch.device("cpu"))
    (layer,) = pickle.loads(pickle.dumps(model))
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == (1, 1)


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


def test_thresholds_stay_without_a_target_area(make):
    trainer = make(crop_area=None, epochs=1)
    trainer.fit()
    assert trainer.model.config.box_thresholds == (0.2, 0.2)


def test_a_loss_that_is_not_finite_stops_the_run(make):
    trainer = make()
    with torch.no_grad():
        trainer.model.experts[1].global_head.fc.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"global_2 became nan in epoch 1, step 1.*--clip-norm"):
        trainer.fit()
    assert not (trainer.folder / "best.pt").exists()


@pytest.mark.parametrize("schedule", ["step", "onecycle", "cosine"])
def test_a_finished_run_may_grow(make, schedule, capsys):
    """Its rates go on as those of the longer run would; under "step" it is the longer run."""
    whole = make("whole", epochs=2, schedule=schedule).fit()
    make("grown", epochs=1, schedule=schedule).fit()
    grown = make("grown", epochs=2, schedule=schedule, model=load_checkpoint(make("grown").folder / "last.pt"))
    assert grown.options.epochs == 2
    progress = grown.fit(grown.folder / "last.pt")
    assert "2 epochs instead of 1" in capsys.readouterr().out
    assert [progress.history[1][key] for key in ("lr/backbone", "lr/heads")] == pytest.approx(
        [whole.history[1][key] for key in ("lr/backbone", "lr/heads")], rel=1e-12
    )
    if schedule == "step":
        assert losses(progress) == losses(whole)
    shorter = make("grown", epochs=1, schedule=schedule)
    with pytest.raises(TrainingError, match=r"trained with epochs = 2 \(now 1\)"):
        shorter.fit(shorter.folder / "last.pt")


def test_removed_images_are_said_and_the_rest_goes_on(make, capsys):
    stopped = make(kind=StopsInItsLastStep)
    assert stopped.fit().step == 4
    last = stopped.folder / "last.pt"
    fewer = make(model=load_checkpoint(last))
    del fewer.train.samples[-7:]  # 11 images left: 2 steps an epoch, where 4 of this one are done
    progress = fewer.fit(last)
    assert "trained on 18 images" in capsys.readouterr().out
    assert (progress.epoch, len(progress.history)) == (3, 3)
    assert progress.history[0]["loss/total"] < 1.5 * progress.history[1]["loss/total"]  # a mean of the steps that count


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

    trainer = make(kind=Watched, epochs=1, batch_size=2, crop_area=None)  # no validation before the first step
    trainer._val_loader, trainer._train_loader  # noqa: B018 - made once, before anything is counted
    with Counts():
        trainer.fit()
    steps, last = [after - before for before, after in found], [before for before, _ in found]
    assert steps == [0] * 9
    assert last[0] == last[8]  # nor does anything between them
    assert len(reads) > last[8]  # the losses are read after the last


def test_other_options_do_not_resume(make):
    make("run", epochs=1).fit()
    trainer = make("run", epochs=1, head_lr=0.5)
    with pytest.raises(TrainingError, match=r"trained with head_lr = 0\.01 \(now 0\.5\); expected"):
        trainer.fit(trainer.folder / "last.pt")
    with pytest.raises(TrainingError, match="holds a model but no training state"):
        trainer.fit(trainer.folder / "best.pt")


def test_another_number_of_processes_goes_on_at_the_same_images(make, capsys):
    stopped = make(epochs=2, batch_size=2, kind=StopsInTheSecondEpoch)
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

    make(epochs=2, batch_size=2, kind=Watched, model=load_checkpoint(last)).fit(last)
    assert first[0] == (1, 6)
    assert "1 processes instead of 3: " in capsys.readouterr().out
    progress = Progress(step=5, sums={"part": 15.0})
    progress.move(10)
    assert (progress.step, progress.sums["part"]) == (10, pytest.approx(30.0))


def test_the_latest_epoch_within_noise_is_kept():
    # One standard error at 90 % on 100 images is 3 points.
    assert within_noise(0.5, -1, 100)
    assert within_noise(0.88, 0.9, 100)
    assert not within_noise(0.86, 0.9, 100)
    assert not within_noise(0.88, 0.9, 10_000)


def test_weights_ruined_by_the_last_step_do_not_become_the_best(make):
    trainer = make(epochs=1, head_lr=1e30, clip_norm=None, batch_size=18)  # a single step, whose loss is still finite
    with pytest.raises(TrainingError, match="not finite after epoch 1"):
        trainer.fit()
    assert not (trainer.folder / "best.pt").exists()


def test_rates_of_backbones_and_heads_fall_tenfold_every_thirty_epochs():
    model = MGENet(MGEConfig("test_resnet", ("a", "b"), image_size=64, resize=64))
    options = TrainOptions()
    optimizer = make_optimizer(model, options)
    backbones, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert backbones == {id(p) for name, p in model.named_parameters() if ".backbone." in name}
    assert others == {id(p) for name, p in model.named_parameters() if ".backbone." not in name}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 1e-4]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    schedule = make_schedule(optimizer, options, steps_per_epoch=2)
    rates = []
    for _ in range(200):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for epoch, factor in ((0, 1), (29, 1), (30, 0.1), (59, 0.1), (60, 0.01), (90, 0.001)):
        assert rates[2 * epoch] == pytest.approx([0.001 * factor, 0.01 * factor])


def test_one_cycle_and_cosine_end_near_zero():
    model = MGENet(MGEConfig("test_resnet", ("a", "b"), image_size=64, resize=64))
    for name in ("onecycle", "cosine"):
        options = TrainOptions(epochs=5, schedule=name)
        optimizer = make_optimizer(model, options)
        schedule = make_schedule(optimizer, options, steps_per_epoch=4)
        rates = []
        for _ in range(20):
            rates.append(optimizer.param_groups[1]["lr"])
            optimizer.step()
            schedule.step() if len(rates) < 20 else None
        assert max(rates) == pytest.approx(0.01)
        assert rates[-1] < 0.001


def test_one_seed_gives_one_run_and_another_seed_another(make):
    first, again, other = (make(name, epochs=1, seed=seed).fit() for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


def test_epochs_shuffle_and_ranks_share():
    first, second = (list(EpochSampler(10, seed=3, epoch=epoch)) for epoch in (0, 1))
    assert sorted(first) == [(0, i) for i in range(10)]
    assert [i for _, i in first] != [i for _, i in second]
    assert list(EpochSampler(10, seed=3, epoch=0, skip=4)) == first[4:]
    shares = [list(EpochSampler(10, seed=3, epoch=0, rank=rank, world=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    assert len({pair for share in shares for pair in share}) == 9


def test_without_val_a_tenth_is_held_out(data, tmp_path):
    (tmp_path / "train").symlink_to(data / "train")
    classes, train, val = training_splits(tmp_path, seed=0)
    assert classes == ("blue", "red")
    assert (len(train), len(val)) == (16, 2)
    assert not {path for path, _ in train} & {path for path, _ in val}
    assert training_splits(tmp_path, seed=0)[2] == val
    assert training_splits(tmp_path, seed=1)[2] != val


def test_images_stay_held_out_where_others_are_removed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(20):
            (tmp_path / f"train/{name}/{number}.png").touch()
    _, train, val = training_splits(tmp_path, seed=0)
    assert len(val) == 4
    for path, _ in train[::9]:
        path.unlink()
    assert training_splits(tmp_path, seed=0)[2] == val


def test_classes_that_unicode_calls_one_are_refused(tmp_path):
    for name in ("caf\u00e9", "cafe\u0301", "tea"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").touch()
        (tmp_path / "train" / name / "1.png").touch()
    with pytest.raises(InputError, match=r"two class folders named .*'cafe\\u0301', 'caf\\xe9'.*merge them") as error:
        training_splits(tmp_path, seed=0)
    assert "\n" not in str(error.value)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*train"):
        training_splits(tmp_path, 0)
    (tmp_path / "train/a").mkdir(parents=True)
    with pytest.raises(InputError, match="holds 1 class folders"):
        training_splits(tmp_path, 0)
    (tmp_path / "train/b").mkdir()
    with pytest.raises(InputError, match="train/a holds no image"):
        training_splits(tmp_path, 0)


def test_a_crop_of_a_strip_needs_no_memory_for_the_whole_strip():
    config = MGEConfig("test_resnet", ("a", "b"), image_size=448, resize=512)
    gradient = np.repeat(np.linspace(0, 255, 9000).astype(np.uint8)[None, :, None], 3, axis=2)
    crop = random_crop(Image.fromarray(gradient), config, np.random.default_rng(0))  # resized: 4,608,000 x 512 pixels
    assert crop.shape == (448, 448, 3)
    assert np.ptp(crop) <= 1  # one pixel of the strip, or two
