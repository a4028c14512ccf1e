"""How far FP16 is from FP32: the typed PyTorch modules, every activation rounded, against the checkpoint's own model.

ONNX Runtime's CPU provider widens FP16 graphs to FP32, so it cannot tell; these modules run in half.

    python benchmarks/fp16_agreement.py --ckpt best.pt --data ../shared/data/groceries/test --images 100

Exit code 1 where a limit is not met: the chain's answer keeps its class on at least 99 % of at least 100 photographs,
and no activation is above a tenth of 65504. The experts' own answers are shown, not judged.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import numpy as np

from mge.checkpoint import load_checkpoint
from mge_export.activations import FP16_MAX, ActivationWatch, Peak
from mge_export.differences import ChainDifferences
from mge_export.experts import build_graphs
from mge_export.images import find_verify_images
from mge_export.parity import HEADROOM
from mge_export.precision import Precision
from mge_export.runners import reference_tensors, run_chain, torch_runner
from mge_export.tolerances import FEW_IMAGES
from mge_runtime.cli.common import reports_errors


@click.command(help=__doc__)
@click.option("--ckpt", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of photographs.")
@click.option("--images", default=100, show_default=True, help="How many, evenly spaced; 0: all.")
@click.option("--native", is_flag=True, help="PyTorch's own FP16 kernels; slow on a CPU without FP16 arithmetic.")
@click.option("--limit", default=0.99, show_default=True, help="Least share of photographs that keep their class.")
@reports_errors
def main(ckpt: Path, data: Path, images: int, native: bool, limit: float) -> None:
    """Run, print and judge."""
    model = load_checkpoint(ckpt)
    config = model.config
    graphs = build_graphs(model, Precision.FP16)
    specs = [graph.spec for graph in graphs]
    watches = {graph.spec.name: ActivationWatch(Precision.FP16.dtype) for graph in graphs}
    runner = torch_runner(graphs, watches, fast_half=not native)
    photographs = find_verify_images(data, config.preprocess, images, click.echo)
    answers = ["logits"] if config.experts > 1 else []
    answers += [f"logits_{k}" for k in range(1, config.experts + 1)]
    boxes = [f"box_{k}" for k in range(1, config.experts)]
    differences = {name: ChainDifferences(name, boxes, config.image_size) for name in answers}
    margins: list[float] = []
    begin = time.perf_counter()
    for index in range(photographs.count):
        frame = photographs.load(index)[None]
        reference = reference_tensors(model, frame)
        found = run_chain(specs, runner, frame)
        for difference in differences.values():
            difference.add(found, reference)
        second, best = np.sort(reference[answers[0]][0])[-2:]
        margins.append(float((best - second) / np.abs(reference[answers[0]]).max()))
    seconds = time.perf_counter() - begin
    click.echo(f"{photographs.source}; {config.arch} at {config.image_size} px, {seconds:.0f} s")
    for name, difference in differences.items():
        same = photographs.count - sum(difference.class_changes)
        click.echo(
            f"{name:10} same class {same}/{photographs.count} ({100 * same / photographs.count:.1f} %), "
            f"rel diff median {np.median(difference.relative):.1e}, worst {max(difference.relative):.1e}"
        )
    changed = [index for index, change in enumerate(differences[answers[0]].class_changes) if change]
    for index in changed:
        click.echo(
            f"  image {index} changed its class; its margin was {100 * margins[index]:.2f} % of the largest logit"
        )
    for name, values in differences[answers[0]].box_iou.items():
        click.echo(f"{name:10} IoU median {np.median(values):.3f}, 1st percentile {np.percentile(values, 1):.3f}")
    for name, watch in watches.items():
        share = 100 * watch.peak.value / FP16_MAX
        click.echo(
            f"{name:10} largest activation {watch.peak.value:.4g} ({share:.2g} % of 65504), {watch.peak.operator}"
        )
    missed = judge(differences[answers[0]].class_changes, {name: watch.peak for name, watch in watches.items()}, limit)
    for line in missed:
        click.echo(f"not met: {line}")
    sys.exit(int(bool(missed)))


def judge(class_changes: list[bool], peaks: dict[str, Peak], limit: float) -> list[str]:
    """What is not met, a line each."""
    missed: list[str] = []
    share = 1 - sum(class_changes) / len(class_changes)
    if not share >= limit:
        missed.append(f"the class stays on {100 * share:.1f} %; expected at least {100 * limit:g} %")
    if len(class_changes) < FEW_IMAGES:
        missed.append(f"{len(class_changes)} photographs; expected at least {FEW_IMAGES}, fewer say little")
    for name, peak in peaks.items():
        if not peak.value <= FP16_MAX / HEADROOM:
            missed.append(
                f"{name}: an activation of {peak.value:.4g} ({peak.operator}); expected at most a tenth of 65504"
            )
    return missed


if __name__ == "__main__":
    main()
