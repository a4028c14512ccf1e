"""Time our eager PyTorch against the authors' published code, which it stands for in every comparison.

Both compute the same weights and images, in turn in one process, the order changing from pair to pair; the figure is
the median of the pairs' ratios. Timed is the network alone, normalised tensor in, logits out, under `torch.no_grad` as
in their test. What the bench adds to ours (frames to tensor, logits to the host) is printed beside it. Exit code 1: the
answers differ, or the median is more than 10 % off.

    git clone https://github.com/lbzhang/MGE-CNN ../MGE-CNN
    OMP_NUM_THREADS=1 python benchmarks/eager_against_authors.py --authors ../MGE-CNN

Weights are random: ResNet-50, three experts and the gate, 200 classes, 448 px. The authors' code has no licence, so
nothing of it is here; `authors_parity.py` says how it is made to run on a CPU. Their `.cuda()` is an identity there,
and no arithmetic of theirs is changed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from authors_parity import SIZE, importable, run_theirs, seed_weights
from torch import Tensor

from mge.checkpoint import load_checkpoint
from mge_export.eager import to_images
from mge_export.eager_chain import AuthorsChain

WITHIN = 0.10  # how far the median ratio may be from 1
LOGITS, BOXES = 1e-3, 1.0  # as authors_parity.py: relative to the largest of the image; pixels


def random_frames(count: int, seed: int) -> np.ndarray:
    """Blurred noise, uint8 [B, S, S, 3]: attention on it has a shape, unlike on white noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 8, 8), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def clock(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def same_answers(module: Any, net: Any, ours: AuthorsChain, images: Tensor) -> bool:
    """Print how far the two are apart; whether that is rounding."""
    logits, gate, boxes = run_theirs(module, net, images)
    answer = ours(images)
    gap = float(((answer.logits - logits[-1]).abs().amax(1) / logits[-1].abs().amax(1)).max())
    found = torch.tensor([[[int(side) for side in box] for box in crop] for crop in answer.boxes]).transpose(0, 1)
    moved = float((found - boxes).abs().max())
    sides = boxes[..., 2:] - boxes[..., :2]
    areas = ", ".join(f"{100 * area:.0f} %" for area in (sides.prod(2) / SIZE**2).median(0).values.tolist())
    same = int((answer.logits.argmax(1) == logits[-1].argmax(1)).sum())
    print(
        f"same class {same} of {len(images)}, logits {gap:.1e} relative, boxes {moved:.0f} px "
        f"(median area {areas}), gate {float((answer.gate - gate).abs().max()):.1e}"
    )
    return same == len(images) and gap <= LOGITS and moved <= BOXES


@torch.no_grad()
def compare(net: Any, ours: AuthorsChain, images: Tensor, pairs: int) -> float:
    """Print the times of both; the median ratio of ours to theirs."""
    calls = {"theirs": lambda: net(images), "ours": lambda: ours(images)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for pair in range(pairs):
        for name in sorted(calls, reverse=pair % 2 == 0):
            seconds[name].append(clock(calls[name]))
    ratios = sorted(mine / their for mine, their in zip(seconds["ours"], seconds["theirs"], strict=True))
    ratio = statistics.median(ratios)
    print(
        f"batch {len(images)}: theirs {1e3 * statistics.median(seconds['theirs']):.0f} ms, "
        f"ours {1e3 * statistics.median(seconds['ours']):.0f} ms, ours / theirs {ratio:.3f} "
        f"(median of {pairs} pairs, {ratios[0]:.3f} to {ratios[-1]:.3f})"
    )
    return ratio


def main() -> int:
    """Run the comparison; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--authors", type=Path, required=True, help="a clone of github.com/lbzhang/MGE-CNN")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="(default: 1 4)")
    parser.add_argument("--pairs", type=int, default=11, help="for each batch size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the boxes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: %(default)s)")
    args = parser.parse_args()
    if not (args.authors / "models" / "local_cam.py").is_file():
        raise SystemExit(f"error: {args.authors} holds no models/local_cam.py; expected a clone of lbzhang/MGE-CNN")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    weights = torchvision.models.resnet50().state_dict()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} processors, {args.threads} threads")
    # Their code warns about what PyTorch has deprecated since 2020.
    with (
        warnings.catch_warnings(),
        importable(args.authors, weights) as module,
        tempfile.TemporaryDirectory() as tmp,
    ):
        warnings.simplefilter("ignore")
        options = types.SimpleNamespace(num_classes=args.classes, arch="resnet50", box_thred=args.threshold)
        net = module.LocalCamNet(options).eval()
        seed_weights(net, weights["fc.weight"], weights["fc.bias"], args.seed)
        path = Path(tmp) / "checkpoint.pth"
        torch.save({"epoch": 100, "state_dict": net.state_dict()}, path)
        model = load_checkpoint(path, box_threshold=args.threshold)
        chain = AuthorsChain(model)
        good = True
        for batch in args.batch:
            frames = random_frames(batch, args.seed)
            images = to_images(frames, model.config)
            good &= same_answers(module, net, chain, images)
            good &= abs(compare(net, chain, images, args.pairs) - 1) <= WITHIN
            extra = statistics.median(clock(partial(to_images, frames, model.config)) for _ in range(5))
            print(f"batch {batch}: the bench's contender also turns frames into tensors, {1e3 * extra:.1f} ms")
    print("within 10 %" if good else "NOT MET: the answers differ, or the median is more than 10 % off")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
