"""Compare our model with the authors' published code, on the same weights and photographs.

Both models get the same seeded weights: ImageNet ResNet-50 backbones, disturbed differently for each expert and the
gate, the global heads ImageNet's own class vectors, the other heads random. The weights travel as a checkpoint in the
authors' layout through `mge.checkpoint.load_checkpoint`, so the loader is checked too. Exit code 1: out of tolerance.

    git clone https://github.com/lbzhang/MGE-CNN ../MGE-CNN
    python -m benchmarks.authors_parity --authors ../MGE-CNN --resnet50 resnet50.safetensors --images DIR

The authors' code has no license, so nothing of it is here: it is imported from the user's own clone. It was written for
a GPU and PyTorch 1; on a CPU it runs once `.cuda()` is an identity, the packages that it imports without need are empty
modules, and its ImageNet download gives the weights of `--resnet50` instead.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import platform
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms import v2

from mge.checkpoint import load_checkpoint
from mge.model import MGENet, MGEOutput
from mge_runtime.sources import list_folder

SIZE, RESIZE = 448, 512  # pixels, the authors' test transform; their code has 448 and 14 built in
# The figures to hold: logits relative to the largest of the image, boxes in pixels, gate absolute.
LOGITS, BOXES, GATE = 1e-3, 1.0, 1e-4
HEADS = ("global", "part", "concat")


@contextlib.contextmanager
def importable(authors: Path, weights: dict[str, Tensor]) -> Iterator[Any]:
    """Yield the authors' module `models.local_cam`, made to run on a CPU and without a download."""
    build = torchvision.models.resnet50

    def resnet50(**_: Any) -> torch.nn.Module:  # their argument is pretrained=True
        net = build()
        # Converted weights may lack BatchNorm's counters, which change nothing.
        missing, unexpected = net.load_state_dict(weights, strict=False)
        if unexpected or not all(name.endswith("num_batches_tracked") for name in missing):
            raise SystemExit(f"error: --resnet50 does not hold torchvision's names: {[*missing, *unexpected][:3]}")
        return net

    def identity(self: Any, *_: Any, **__: Any) -> Any:
        return self

    with contextlib.ExitStack() as stack:
        for name in ("pretrainedmodels", "cv2"):
            if importlib.util.find_spec(name) is None:
                sys.modules[name] = types.ModuleType(name)
                stack.callback(sys.modules.pop, name)
        for owner, name, value in (
            (torch.Tensor, "cuda", identity),
            (torch.nn.Module, "cuda", identity),
            (torchvision.models, "resnet50", resnet50),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        sys.path.insert(0, str(authors.resolve()))
        stack.callback(sys.path.remove, str(authors.resolve()))
        yield importlib.import_module("models.local_cam")


def seed_weights(net: Any, fc: Tensor, bias: Tensor, seed: int) -> None:
    """Make the experts differ and give their heads logits of a trained network's size (a spread of some units)."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    rows = torch.randperm(fc.shape[0], generator=generator)[: net.num_classes]
    with torch.no_grad():
        for name, parameter in sorted(net.named_parameters()):
            module = name.partition(".")[0]
            if module.startswith(("conv4", "conv5")):
                parameter.mul_(1 + 0.02 * noise(parameter))
            elif module.startswith("classifier"):
                own = fc[rows] if parameter.ndim == 2 else bias[rows]
                parameter.copy_(own * (1 + 0.1 * noise(parameter)))
            elif module.startswith("conv6"):
                parameter.copy_(0.05 * noise(parameter))
            elif module.startswith("cls_gate"):
                parameter.copy_(0.03 * noise(parameter))
            else:
                # Each concatenated half has length 10; part features are in the tens, many and of one sign.
                parameter.copy_((0.2 if module.startswith("cls_cat") else 0.02) * noise(parameter))


def read_images(folder: Path, count: int) -> tuple[list[Path], Tensor]:
    """`count` photographs spread over all of a folder, as the authors' test transform gives them: [N, 3, S, S]."""
    found = [image.path for image in list_folder(folder).whole()]
    if not found:
        raise SystemExit(f"error: no photographs in {folder}; expected image files")
    picked = [found[i * len(found) // count] for i in range(count)] if len(found) > count else found
    transform = v2.Compose(
        [
            v2.Resize(RESIZE),
            v2.CenterCrop(SIZE),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    images = []
    for path in picked:
        with Image.open(path) as image:
            images.append(transform(ImageOps.exif_transpose(image).convert("RGB")))
    return picked, torch.stack(images)


def run_theirs(module: Any, net: Any, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Their ten logits, gate [B, 3] and the boxes of experts 2 and 3, [B, 2, 4] as (x0, y0, x1, y1)."""
    boxes: list[Tensor] = []
    get_bbox = module.get_bbox

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = get_bbox(*args, **kwargs)
        found = torch.tensor([[int(x0), int(y0), int(x1), int(y1)] for x0, x1, y0, y1 in result[1]]).float()
        empty = (found[:, 0] == found[:, 2]) | (found[:, 1] == found[:, 3])
        found[empty] = torch.tensor([0.0, 0.0, SIZE, SIZE])  # their code then takes the whole image
        boxes.append(found)
        return result

    module.get_bbox = recorded
    try:
        outputs = net(images)
    finally:
        module.get_bbox = get_bbox
    return [logits.detach() for logits in outputs["logits"]], outputs["pr_gate"].detach(), torch.stack(boxes, 1)


def our_logits(output: MGEOutput) -> list[Tensor]:
    """Our ten logits in the order of theirs."""
    experts = [(e.global_logits, e.part_logits, e.logits) for e in output.experts]
    return [logits for expert in experts for logits in expert] + [output.logits]


def compare(module: Any, net: Any, ours: MGENet, images: Tensor, threshold: float, batch: int) -> bool:
    """Print one table; whether everything is within the figures."""
    names = [f"expert {k} {head}" for k in (1, 2, 3) for head in HEADS] + ["mixture"]
    rows: list[list[Tensor]] = [[] for _ in names]  # of each batch [B, 4]
    gates, box_gaps, areas, same, seconds = [], [], [], 0, [0.0, 0.0]
    net.box_thred = threshold
    for chunk in images.split(batch):
        start = time.perf_counter()
        theirs, their_gate, their_boxes = run_theirs(module, net, chunk)
        middle = time.perf_counter()
        with torch.no_grad():
            output = ours(chunk)
        seconds[0] += middle - start
        seconds[1] += time.perf_counter() - middle
        for row, mine, reference in zip(rows, our_logits(output), theirs, strict=True):
            gap, size = (mine - reference).abs(), reference.abs()
            relative, elementwise = gap / size.amax(1, keepdim=True), gap / size
            row.append(torch.stack([*(x.amax(1) for x in (relative, elementwise, gap)), reference.std(1)], 1))
        gates.append((output.gate - their_gate).abs().amax(1))
        our_boxes = torch.stack([e.box for e in output.experts if e.box is not None], 1)
        box_gaps.append((our_boxes - their_boxes).abs().amax(2))
        sides = their_boxes[..., 2:] - their_boxes[..., :2]
        areas.append(sides.prod(2) / SIZE**2)
        same += int((output.logits.argmax(1) == theirs[-1].argmax(1)).sum())
    print(f"\nthreshold {threshold:g}, {len(images)} photographs")
    print(f"{'logits':18} {'relative':>10} {'elementwise':>12} {'absolute':>10} {'their spread':>13}")
    worst = 0.0
    for name, row in zip(names, rows, strict=True):
        values = torch.cat(row)
        relative, elementwise, absolute = values[:, :3].amax(0).tolist()
        worst = max(worst, relative)
        print(f"{name:18} {relative:10.1e} {elementwise:12.1e} {absolute:10.1e} {float(values[:, 3].mean()):13.2f}")
    gap, area = torch.cat(box_gaps), torch.cat(areas)
    for k in (0, 1):
        low, median, high = (100 * area[:, k].quantile(q).item() for q in (0.0, 0.5, 1.0))
        print(
            f"box of expert {k + 2}    worst {float(gap[:, k].max()):.0f} px; "
            f"area of its image: median {median:.0f} % ({low:.0f} to {high:.0f} %)"
        )
    gate = float(torch.cat(gates).max())
    print(f"gate               worst {gate:.1e}")
    print(f"same class         {same} of {len(images)}")
    print(f"time an image      theirs {seconds[0] / len(images):.2f} s, ours {seconds[1] / len(images):.2f} s")
    good = worst <= LOGITS and float(gap.max()) <= BOXES and gate <= GATE
    print(
        f"{'within' if good else 'OUT OF'} tolerance "
        f"(logits {LOGITS:g} of the image's largest, boxes {BOXES:g} px, gate {GATE:g})"
    )
    return good


def main() -> int:
    """Run the comparison; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, required=True, help="a clone of github.com/lbzhang/MGE-CNN")
    parser.add_argument("--resnet50", type=Path, required=True, help=".safetensors with torchvision's names")
    parser.add_argument("--images", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--count", type=int, default=16, help="how many of them (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=200, help="CUB-200-2011 has 200 (default: %(default)s)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="(default: 0.2 0.5 0.8)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    args = parser.parse_args()
    if not (args.authors / "models" / "local_cam.py").is_file():
        raise SystemExit(f"error: {args.authors} holds no models/local_cam.py; expected a clone of lbzhang/MGE-CNN")
    torch.manual_seed(args.seed)
    weights = load_file(args.resnet50)
    picked, images = read_images(args.images, args.count)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, seed {args.seed}")
    print(f"{len(picked)} photographs of {args.images.name}, {picked[0].name} to {picked[-1].name}")
    # Their code warns about what PyTorch has deprecated since 2020.
    with warnings.catch_warnings(), importable(args.authors, weights) as module:
        warnings.simplefilter("ignore")
        options = types.SimpleNamespace(num_classes=args.classes, arch="resnet50", box_thred=0.2)
        net = module.LocalCamNet(options).eval()
        seed_weights(net, weights["fc.weight"], weights["fc.bias"], args.seed)
        good = True
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pth"
            torch.save({"epoch": 100, "state_dict": net.state_dict()}, path)
            for threshold in args.thresholds:
                ours = load_checkpoint(path, box_threshold=threshold)
                good &= compare(module, net, ours, images, threshold, args.batch)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
