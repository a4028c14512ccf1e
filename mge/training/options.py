"""What a training run depends on besides the model and the images, and the recipes: values that go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from mge.config import PAPER_THRESHOLD, MGEConfig, nearest_side

CROP_AREA = 0.5  # share of its image that the median crop keeps, unless asked for another
OPTIMIZERS = ("sgd", "adamw", "nadamw", "lamb", "lion")  # timm's names; "sgd" has a momentum and no Nesterov
AUGMENTATIONS = ("none", "trivial", "rand")


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained; the defaults are the paper's."""

    epochs: int = 100
    batch_size: int = 10  # images
    optimizer: str = "sgd"  # one of `OPTIMIZERS`
    head_lr: float = 0.01  # of all layers outside the backbones; the peak rate under "onecycle"
    backbone_lr: float = 0.001
    layer_decay: float = 1.0  # in (0, 1]: a backbone's rate falls by it from each layer to the one before
    freeze: int = 0  # stride of the features up to which backbones keep their weights and statistics; 0: none
    momentum: float = 0.9  # of optimizers that have one
    weight_decay: float = 1e-4
    schedule: str = "step"  # "step", "onecycle" or "cosine"
    step_epochs: int = 30  # under "step": rates fall tenfold every so many epochs
    warmup_epochs: float = 0.0  # over which rates rise from nearly 0; "onecycle" has a warm-up of its own
    ema: float = 0.0  # decay of the moving average of the weights, in [0, 1); 0: none
    label_smoothing: float = 0.0  # in [0, 1)
    diversity: str = "code"  # form of the KL terms: "code", "paper" (see `diversity`) or "none"
    distill: float = 0.0  # weight, in the last third of the epochs, of the terms by which experts follow the mixture
    clip_norm: float | None = None  # largest norm of the gradient; None: not clipped
    gate_balance: float = 0.0  # weight of the term that keeps a gate from trusting one expert alone (`balance`)
    flip: bool = True  # random horizontal flips
    augment: str = "none"  # one of `AUGMENTATIONS`
    erasing: float = 0.0  # probability that a random rectangle of an image is erased
    # Target share of each crop, in (0, 1], or one for all: thresholds follow; (): they stay.
    crop_area: tuple[float, ...] = ()
    seed: int = 0
    workers: int = 2  # processes that decode images
    precision: str = "32-true"  # Lightning Fabric's name
    compile: bool = False  # torch.compile for the backbones


# After ConvNeXt (Liu et al. 2022, appendix A: AdamW, cosine, layer-wise rates, label smoothing, erasing, EMA), with the
# augmentation that has nothing to tune (Müller and Hutter 2021, TrivialAugment), with rates and a batch for the few
# steps that a small data set has: half the rates learned too little in four epochs. The chain is what measured best for
# its cost (docs/lab/worth.md).
_MODERN: Mapping[str, Any] = {
    "gate": "none",
    "sharing": "backbone",
    "crop_area": (CROP_AREA,),
    "epochs": 30,
    "batch_size": 16,
    "optimizer": "adamw",
    "head_lr": 4e-3,
    "backbone_lr": 1e-3,
    "layer_decay": 0.9,
    "weight_decay": 0.05,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "ema": 0.998,
    "label_smoothing": 0.1,
    "clip_norm": 5.0,
    "augment": "trivial",
    "erasing": 0.25,
}
_PAPER: Mapping[str, Any] = asdict(TrainOptions()) | {"gate": MGEConfig.gate, "sharing": MGEConfig.sharing}
# Values of options of mge-train that are not given; the first recipe's are the defaults.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "modern": _MODERN,
        "paper": {name: _PAPER[name] for name in _MODERN} | {"box_threshold": (PAPER_THRESHOLD,)},
    }
)


def smaller_later(size: int, experts: int) -> tuple[int, ...]:
    """The sides of the experts' images in pixels by default: later ones see a part of it, at about half the cost.

    Five sevenths of the first's, the nearest multiple of 32 (of the backbones' stride): 448, 320, 320.
    """
    return (size, *(nearest_side(size * 5 / 7),) * (experts - 1))
