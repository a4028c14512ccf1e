"""Tiny seeded models and real photographs to export."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from mge.config import MGEConfig
from mge.data.folder import normalize
from mge.model import MGENet

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def make_model(experts=2, *, normalize=True, attention="own", size=64, seed=0):
    """A model whose BatchNorms have statistics of their own and whose classes are clearly apart."""
    torch.manual_seed(seed)
    config = MGEConfig(
        arch="resnet10t",
        classes=tuple("abcde"),
        experts=experts,
        image_size=size,
        resize=size + 8,
        box_thresholds=(0.5,) * (experts - 1),
        parts_per_class=2,
        gate_width=8,
        normalize_features=normalize,
        attention_head=attention,
    )
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


def save_photographs(folder):
    """Copy some of scikit-image's photographs out of its wheel."""
    import skimage

    source = Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        image = Image.open(source / name).convert("RGB")
        image.thumbnail((160, 160))
        image.save(folder / f"{Path(name).stem}.png")
        image.crop((30, 10, 110, 90)).save(folder / f"{Path(name).stem}_detail.png")


def load_frames(folder, preprocess):
    """All photographs of a folder as frames, uint8 [B, S, S, 3]."""
    from mge_runtime.decode import decode_image
    from mge_runtime.preprocess import to_frame

    return np.stack([to_frame(decode_image(path), preprocess)[0] for path in sorted(folder.iterdir())])
