"""Write the model that docs/lab/performance.md is about (ResNet-50, 448 px, 200 classes), and time its export.

    python -m benchmarks.reference OUT [--arch resnet50] [--image-size 448] [--classes 200] [--precision fp32 ...]

OUT gets model.pt and a bundle for each precision. Weights are random, since speed does not ask what they say; with
`--init FILE` (timm's ImageNet weights) the backbones' are real ones.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import click
import torch

from mge.checkpoint import save_checkpoint
from mge.config import MGEConfig
from mge.model import MGENet, initialize_backbones
from mge_runtime.cli.common import reports_errors

EXPORT = "from mge_export.cli import main; main()"


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option("--arch", default="resnet50", show_default=True)
@click.option("--image-size", default=448, show_default=True)
@click.option("--classes", default=200, show_default=True)
@click.option("--init", default=None, help="File with the backbones' weights.  [default: random]")
@click.option(
    "--precision", "precisions", type=click.Choice(["fp32", "fp16"]), multiple=True, help="To export; none: no export."
)
@reports_errors
def main(output: Path, arch: str, image_size: int, classes: int, init: str | None, precisions: tuple[str, ...]) -> None:
    """Build, write and export."""
    torch.manual_seed(0)
    names = tuple(f"class {number}" for number in range(classes))
    model = MGENet(MGEConfig(arch=arch, classes=names, image_size=image_size, resize=image_size * 8 // 7))
    if init is not None:
        initialize_backbones(model, init)
    output.mkdir(parents=True, exist_ok=True)
    ckpt = output / "model.pt"
    save_checkpoint(ckpt, model.eval())
    click.echo(f"{ckpt}: {ckpt.stat().st_size / 1e6:.0f} MB")
    for precision in precisions:
        bundle = output / f"{precision}.plan"
        options = ["--ckpt", str(ckpt), "-o", str(bundle), *(["--fp16"] if precision == "fp16" else [])]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", EXPORT, *options], check=True)
        seconds = time.perf_counter() - start
        # Of all children so far: with several precisions the first one's may be the larger.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        click.echo(f"{bundle}: {bundle.stat().st_size / 1e6:.0f} MB, {seconds:.1f} s, peak memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
