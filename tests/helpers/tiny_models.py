"""Tiny seeded models, and images to train, evaluate and export them on."""

from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image
from torch import nn

from mge.config import MGEConfig
from mge.data.folder import normalize
from mge.model import MGENet
from mge_runtime.decode import decode_image
from mge_runtime.preprocess import to_frame

SHARED = Path(__file__).parents[3] / "shared"  # data beside a checkout
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def tiny_config(experts=3, classes="abc", **changes):
    """The smallest network that timm has, at 64 px."""
    values = {"arch": "test_resnet", "image_size": 64, "resize": 64, "gate_width": 8}
    values |= {"box_thresholds": (0.5,) * (experts - 1)} | changes
    return MGEConfig(classes=tuple(classes), experts=experts, **values)


def make_model(experts=2, *, normalize=True, attention="own", gate="network", size=64, seed=0, **changes):
    """A ResNet-10 whose BatchNorms have statistics of their own and whose classes are clearly apart."""
    torch.manual_seed(seed)
    values = {"arch": "resnet10t", "image_size": size, "resize": size + 8, "parts_per_class": 2, "gate": gate}
    values |= {"normalize_features": normalize, "attention_head": attention}
    config = tiny_config(experts, "abcde", **values | changes)
    model = MGENet(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            # timm starts the last BatchNorm of a residual branch at zero, which would hide the branch.
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, nn.Linear):
            module.weight.data *= 4
    return model


@torch.no_grad()
def center_heads(model, frames):
    """Shift the heads' biases so that these frames fall into several classes; a random network sees one everywhere."""
    images = torch.stack([normalize(frame, model.config) for frame in frames])
    for k, expert in enumerate(model.experts):
        expert.global_head.fc.bias -= model(images).experts[k].global_logits.mean(0)
        expert.concat_head.bias -= model(images).experts[k].logits.mean(0)
    return model


def save_photographs(folder, *, groceries=None):
    """Save ten small photographs: five of scikit-image's and five of groceries, or details of the first five.

    Args:
        folder: where to.
        groceries: whether to take groceries; None: where ../shared lies beside the checkout.
    """
    source = Path(skimage.__file__).parent / "data"
    images = [Image.open(source / name).convert("RGB") for name in PHOTOGRAPHS]
    for image in images:
        image.thumbnail((160, 160))
    if SHARED.is_dir() if groceries is None else groceries:
        paths = sorted((SHARED / "data/groceries/test").rglob("*.jpg"))
        assert len(paths) >= 5, "../shared is there without data/groceries/test"
        images += [Image.open(paths[number * len(paths) // 5]).convert("RGB") for number in range(5)]
    else:
        images += [image.crop((30, 10, 110, 90)) for image in images]
    for number, image in enumerate(images):
        image.thumbnail((160, 160))
        image.save(folder / f"{number}.png")


def load_frames(folder, preprocess):
    """All photographs of a folder as frames, uint8 [B, S, S, 3]."""
    return np.stack([to_frame(decode_image(path), preprocess)[0] for path in sorted(folder.iterdir())])


def run_chain(specs, runner, frames):
    """All tensors of a chain whose graphs run in turn, each on the outputs of those before."""
    tensors = {"frame": frames}
    for spec in specs:
        tensors |= runner(spec, tensors)
    return tensors


def save_noise(folder, counts, size=(90, 70), seed=0):
    """Save images of noise, `<folder>/<name>/<number>.png`.

    Args:
        folder: where to.
        counts: by name of a folder below, how many.
        size: pixels, width and height.
        seed: of the noise.
    """
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder
