"""Is a chain worth its cost? Trains chains and single networks alike: on scenes, the field guide and groceries.

    python -m benchmarks.worth SHARED OUT close far-chain far-448 --seed 0
    python -m benchmarks.frontier OUT/far-*-s? --data OUT/data/far --out OUT/far

SHARED has `data/groceries`, `data/distractors` and `weights/tf_efficientnet_lite0.fp16.safetensors`. Runs on scenes
start from the network `close` of seed 0, which has learned the products alone, the others from ImageNet's weights. A
run that was stopped goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from benchmarks.scenes import KINDS
from benchmarks.scenes import main as scenes
from mge.cli.field_guide import main as field_guide
from mge.cli.train import main as train
from mge_runtime.cli.common import reports_errors

COMMON = "--arch tf_efficientnet_lite0 --recipe modern --freeze 4 --workers 0 --accelerator cpu"
CHAIN = "--experts 3 --gate none --sharing backbone"
FAR = "--experts 3 --gate none --source-size 1280 --crop-area 0.2 --crop-area 0.6"
SMALLER = "--experts 3 --image-sizes 224,160,160"
SCENES = "--augment none --erasing 0 --epochs 8"  # each is new: a product at a random place before something else


def _singles(*sides: int) -> dict[str, str]:
    return {str(side): f"--experts 1 --image-size {side}" for side in sides}


# By instrument: what all of its runs have, and each run. Sides in pixels.
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "close": ("--epochs 20", {"": "--experts 1 --image-size 112"}),
    "far": (
        SCENES,
        {
            "chain": f"{FAR} --image-sizes 256,192,192 --sharing none",
            "backbone": f"{FAR} --image-sizes 256,192,192 --sharing backbone",
            "larger": f"{FAR} --image-sizes 256,224,224 --sharing backbone",
            "distill": f"{FAR} --image-sizes 256,192,192 --sharing backbone --distill 1",
        }
        | _singles(320, 448, 640),
    ),
    "shelf2": (
        SCENES,
        {"backbone": f"{CHAIN} --source-size 640 --image-sizes 160,160,160 --crop-area 0.4 --crop-area 0.6"}
        | _singles(288, 448),
    ),
    "shelf3": (
        SCENES,
        {"backbone": f"{CHAIN} --source-size 960 --image-sizes 192,160,160 --crop-area 0.25 --crop-area 0.6"}
        | _singles(288, 448),
    ),
    "guide": (
        "--augment none --erasing 0 --epochs 10",  # colors decide
        {
            "backbone": f"{CHAIN} --source-size 1024 --image-sizes 256,128,128 --crop-area 0.1 --crop-area 0.3",
            "small": f"{CHAIN} --source-size 1024 --image-sizes 128,128,128 --crop-area 0.1 --crop-area 0.3",
        }
        | _singles(224, 320, 448),
    ),
    "groceries": (
        "--epochs 12",
        {
            "network": "--experts 3 --image-sizes 224,224,224 --sharing none --gate network",
            "shared": f"{SMALLER} --sharing none --gate shared",
            "none": f"{SMALLER} --sharing none --gate none",
            "backbone": f"{SMALLER} --sharing backbone --gate none",
            "distill": f"{SMALLER} --sharing none --gate none --distill 1",
            # Expert 1 costs a third of it, not a half.
            "early": "--experts 3 --image-sizes 192,192,192 --sharing backbone --gate none --distill 1",
            "paper": "--experts 1 --image-size 224 --recipe paper --freeze 0 --step-epochs 4",
        }
        | _singles(224, 320),
    ),
}
WHOLE = {"far": 1280, "shelf2": 640, "shelf3": 960, "guide": 1024}  # sides of images that are seen whole
GUIDE = "--size 1024 --species 36 --train 1080 --val 180 --test 720"


def options_of(name: str, seed: int) -> list[str]:
    """Options of mge-train for a run, "far-chain" and so on, without its folders and weights."""
    instrument, _, own = name.partition("-")
    if own not in RUNS.get(instrument, ("", {}))[1]:
        known = [f"{instrument}-{own}".rstrip("-") for instrument, (_, choices) in RUNS.items() for own in choices]
        raise click.UsageError(f"no run is called {name}; expected one of {', '.join(known)}")
    common, choices = RUNS[instrument]
    options = f"{COMMON} {common} {choices[own]} --seed {seed}".split()
    if side := WHOLE.get(instrument):
        options += ["--resize", own if own.isdecimal() else str(side)]
    return options


@click.command(help=__doc__)
@click.argument("shared", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.argument("runs", nargs=-1, required=True)
@click.option("--seed", default=0, show_default=True)
@reports_errors
def main(shared: Path, out: Path, runs: tuple[str, ...], seed: int) -> None:
    """Train what is named, in this order."""
    torch.set_num_threads(1)  # two trainings beside each other are faster than one on two cores
    for name in runs:
        options, instrument = options_of(name, seed), name.partition("-")[0]
        start = shared / "weights/tf_efficientnet_lite0.fp16.safetensors"
        data, folder = out / "data" / instrument, out / f"{name}-s{seed}"
        if instrument in KINDS:
            start = out / "close-s0/best.pt"
        elif instrument == "guide":
            field_guide.main([str(data), *GUIDE.split()], standalone_mode=False)
        else:
            data = shared / "data/groceries"
        last = folder / "last.pt"
        options = ["--resume", str(last)] if last.exists() else [*options, "--init", str(start)]
        if instrument in KINDS:
            made = [str(shared / "data"), str(data), "--kind", instrument, "--train", str(folder)]
            code = scenes.main([*made, *options], standalone_mode=False)
        else:
            code = train.main(["--data", str(data), "--out", str(folder), *options], standalone_mode=False)
        if code:  # it was stopped
            raise click.exceptions.Exit(code)


if __name__ == "__main__":
    main()
