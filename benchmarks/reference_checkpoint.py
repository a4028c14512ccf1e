"""Write a checkpoint of the size that docs/performance.md is about: ResNet-50, 448 px, 200 classes.

    python benchmarks/reference_checkpoint.py r50.pt [--arch resnet50] [--image-size 448] [--classes 200]

Weights are random, since speed does not ask what they say; with `--init FILE` (timm's ImageNet weights) the trunks' are
real ones.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from mge.checkpoint import save_checkpoint
from mge.config import MGEConfig
from mge.model import MGENet, initialize_trunks
from mge_runtime.cli.common import reports_errors


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--arch", default="resnet50", show_default=True)
@click.option("--image-size", default=448, show_default=True)
@click.option("--classes", default=200, show_default=True)
@click.option("--init", default=None, help="File with the trunks' weights.  [default: random]")
@reports_errors
def main(output: Path, arch: str, image_size: int, classes: int, init: str | None) -> None:
    """Build and write."""
    torch.manual_seed(0)
    names = tuple(f"class {number}" for number in range(classes))
    model = MGENet(MGEConfig(arch=arch, classes=names, image_size=image_size, resize=image_size * 8 // 7))
    if init is not None:
        initialize_trunks(model, init)
    save_checkpoint(output, model.eval())


if __name__ == "__main__":
    main()
