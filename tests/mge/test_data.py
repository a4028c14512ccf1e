"""Which images are trained on, in which order, and how they are loaded and cropped."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from mge.data.folder import (
    EpochSampler,
    FolderDataset,
    TrainingDataset,
    batches,
    make_loader,
    normalize,
    random_crop,
)
from mge.data.splits import training_splits
from mge.training.options import TrainOptions
from mge_runtime.errors import InputError
from tests.helpers.tiny_models import save_noise, tiny_config


def touch(folder, names, count):
    for name in names:
        (folder / "train" / name).mkdir(parents=True)
        for number in range(count):
            (folder / "train" / name / f"{number}.png").touch()


def test_epochs_shuffle_and_ranks_share():
    first, second = (list(EpochSampler(10, seed=3, epoch=epoch)) for epoch in (0, 1))
    assert sorted(first) == [(0, i) for i in range(10)]
    assert [i for _, i in first] != [i for _, i in second]
    assert list(EpochSampler(10, seed=3, epoch=0, skip=4)) == first[4:]
    shares = [list(EpochSampler(10, seed=3, epoch=0, rank=rank, world=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    assert len({pair for share in shares for pair in share}) == 9


def test_without_val_a_tenth_is_held_out_and_stays_so_where_others_are_removed(tmp_path):
    touch(tmp_path, "ab", 20)
    classes, train, val = training_splits(tmp_path, seed=0)
    assert classes == ("a", "b")
    assert (len(train), len(val)) == (36, 4)
    assert not {path for path, _ in train} & {path for path, _ in val}
    assert training_splits(tmp_path, seed=1)[2] != val
    for path, _ in train[::9]:
        path.unlink()
    assert training_splits(tmp_path, seed=0)[2] == val


def test_classes_that_unicode_calls_one_are_refused(tmp_path):
    touch(tmp_path, ("caf\u00e9", "cafe\u0301", "tea"), 2)
    with pytest.raises(InputError, match=r"two classes named .*'cafe\\u0301', 'caf\\xe9'.*merge them") as error:
        training_splits(tmp_path, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], r"no folder .*train"),
        (["train/a"], "holds 1 class folders"),
        (["train/a", "train/b"], "train/a holds no image"),
    ],
)
def test_a_folder_without_images_is_refused(tmp_path, folders, message):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(InputError, match=message):
        training_splits(tmp_path, 0)


def test_one_image_a_class_leaves_none_to_validate_on(tmp_path):
    touch(tmp_path, "ab", 1)
    with pytest.raises(InputError, match="expected at least two images of some class, or a val folder"):
        training_splits(tmp_path, 0)


class Process(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return os.getpid()


def test_workers_live_on_and_batches_for_a_gpu_are_pinned():
    loader = make_loader(Process(), 2, workers=1, persistent=True)
    first, second = (next(batches(loader)) for _ in range(2))
    assert first.tolist() == second.tolist() != [os.getpid()] * 2
    for device in ("cpu", "cuda"):
        assert make_loader(Process(), 2, workers=0, device=torch.device(device)).pin_memory is (device == "cuda")


@pytest.mark.parametrize("options", [{"augment": "trivial"}, {"augment": "rand"}, {"erasing": 1.0}])
def test_what_an_epoch_draws_for_an_image_depends_on_nothing_else(tmp_path, options):
    save_noise(tmp_path, {"a": 4})
    samples = [(path, 0) for path in sorted((tmp_path / "a").iterdir())]
    plain, drawn = (TrainingDataset(samples, tiny_config(), TrainOptions(**more)) for more in ({}, options))
    keys = [(epoch, index) for epoch in range(3) for index in range(4)]
    torch.manual_seed(1)
    images = np.stack([drawn[key][0] for key in keys])
    after = torch.rand(())
    torch.manual_seed(1)
    assert after == torch.rand(())  # the process's own random numbers are left alone
    loader = make_loader(drawn, 12, workers=1, sampler=keys[::-1])
    assert np.array_equal(next(batches(loader))[0].flip(0), images)
    assert len({image.tobytes() for image in images}) == 12
    assert sum(not np.array_equal(image, plain[key][0]) for image, key in zip(images, keys, strict=True)) > 6
    assert images.shape[1:] == (64, 64, 3)


def test_a_crop_of_a_strip_needs_no_memory_for_the_whole_strip():
    gradient = np.repeat(np.linspace(0, 255, 9000).astype(np.uint8)[None, :, None], 3, axis=2)
    config = tiny_config(image_size=448, resize=512)
    crop = random_crop(Image.fromarray(gradient), config, np.random.default_rng(0))  # resized: 4,608,000 x 512 pixels
    assert crop.shape == (448, 448, 3)
    assert np.ptp(crop) <= 1  # one pixel of the strip, or two


@pytest.mark.parametrize("layout", ["rows", "batch", "tensor"])
def test_frames_are_normalized_bit_for_bit_as_one_by_one(layout):
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    config = tiny_config(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    mean, std = (np.asarray(values, np.float32) for values in (config.mean, config.std))
    wanted = ((frames.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    if layout == "rows":
        found = torch.stack([normalize(frame, config) for frame in frames])
    else:
        found = normalize(frames if layout == "batch" else torch.from_numpy(frames), config)
        assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(found, wanted)


def test_frames_travel_as_bytes(tmp_path):
    save_noise(tmp_path, {"a": 2})
    samples = [(path, 0) for path in sorted((tmp_path / "a").iterdir())]
    config = tiny_config(image_size=32, resize=40, source_size=32)
    training = TrainingDataset(samples, config, TrainOptions())
    for dataset, sampler in ((FolderDataset(samples, config), None), (training, EpochSampler(2, seed=0))):
        frames, *_ = next(batches(make_loader(dataset, 2, workers=0, sampler=sampler)))
        assert (frames.dtype, frames.shape) == (torch.uint8, (2, 32, 32, 3))
