"""The chain of a bundle side by side with others: its bare backbones, PyTorch, another bundle.

    python -m benchmarks.chain mge.plan --ckpt best.pt                  # chain / bare backbones
    python -m benchmarks.chain mge.plan --ckpt best.pt --pytorch        # PyTorch's ways / chain, too
    python -m benchmarks.chain mge.plan --other int8.plan --batch 8     # other / first

Timed is a batch of frames in memory to outputs on the host. What the frames show makes no difference to the time; they
are noise. Let nothing else run beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.rounds import ratio, time_rounds
from mge_runtime.cli.common import reports_errors
from mge_runtime.errors import InputError
from mge_runtime.files import file_sha256
from mge_runtime.machine import cpu_count
from mge_runtime.manifest import Manifest
from mge_runtime.pipeline import Pipeline

PATH = click.Path(path_type=Path, dir_okay=False)


@click.command(help=__doc__)
@click.argument("engine", type=PATH)
@click.option("--ckpt", type=PATH, help="The checkpoint that the bundle was exported from: adds its bare backbones.")
@click.option("--pytorch", is_flag=True, help="Also PyTorch on this checkpoint: eager, the authors' way, compiled.")
@click.option("--other", type=PATH, help="Another bundle.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda:0.")
@click.option("--batch", "batches", type=int, multiple=True, default=(1,), show_default=True)
@click.option("--threads", type=int, default=cpu_count(), show_default="all processors")
@click.option("--rounds", default=24, show_default=True)
@reports_errors
def main(
    engine: Path,
    ckpt: Path | None,
    pytorch: bool,
    other: Path | None,
    device: str,
    batches: tuple[int, ...],
    threads: int,
    rounds: int,
) -> None:
    """Run and print."""
    if pytorch and ckpt is None:
        raise click.UsageError("--pytorch needs --ckpt")
    with ExitStack() as stack:
        chain = stack.enter_context(Pipeline.open(engine, device, threads=threads))
        second = None if other is None else stack.enter_context(Pipeline.open(other, device, threads=threads))
        if ckpt is not None:
            require_same_model(ckpt, chain.manifest)
        click.echo(f"{engine.name} on {chain.choice}, {threads} threads, load {os.getloadavg()[0]:.1f}")
        for batch in batches:
            frames = noise(chain, batch)
            ways: dict[str, Callable[[], object]] = {"chain": lambda frames=frames: chain.run(frames)}
            if second is not None and other is not None:
                others = noise(second, batch)
                ways[other.name] = lambda others=others: second.run(others)
            if ckpt is not None:
                ways |= checkpoint_ways(ckpt, chain, frames, threads, pytorch)
            show(batch, time_rounds(ways, rounds))


def noise(chain: Pipeline, batch: int) -> np.ndarray:
    """Frames of the size that a bundle reads, uint8 [batch, N, N, 3]."""
    size = chain.manifest.preprocess.size
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)


def checkpoint_ways(
    ckpt: Path, chain: Pipeline, frames: np.ndarray, threads: int, pytorch: bool
) -> dict[str, Callable[[], object]]:
    """The bare backbones of a checkpoint, and PyTorch's ways; those that do not work here are printed and left out."""
    from benchmarks.backbones import BareBackbones
    from benchmarks.pytorch import Unavailable, pytorch_ways
    from mge.checkpoint import load_checkpoint

    model, device = load_checkpoint(ckpt), chain.choice.device
    half = device != "cpu" and any(plan.get("type") == "fp16" for plan in chain.manifest.precision.values())
    backbones = BareBackbones(model, len(frames), threads=threads, device=device, half=half)
    ways: dict[str, Callable[[], object]] = {f"{len(backbones)} bare backbones": backbones}
    if pytorch:
        # Another copy: on FP16 the first one's weights are in half.
        for name, way in pytorch_ways(load_checkpoint(ckpt), frames, threads, device):
            if isinstance(way, Unavailable):
                click.echo(f"{name}: {way}")
            else:
                ways[name] = way
    return ways


def show(batch: int, taken: dict[str, list[float]]) -> None:
    """Print the medians and the ratios of one batch size."""
    click.echo(f"batch {batch}, load {os.getloadavg()[0]:.1f}")
    for name, times in taken.items():
        line = f"  {name:<44} {median(times):9.2f} ms"
        if "bare backbones" in name:
            line += f"   chain / this {ratio(taken['chain'], times)}"
        elif name != "chain":
            line += f"   this / chain {ratio(times, taken['chain'])}"
        click.echo(line)


def require_same_model(ckpt: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint that the bundle was not exported from.

    Raises:
        InputError: it is another file, or cannot be read.
    """
    try:
        found = file_sha256(ckpt)
    except OSError as error:
        raise InputError(f"cannot read {ckpt}: {error.strerror}; expected a checkpoint") from error
    if manifest.checkpoint_sha256 not in (None, found):
        raise InputError(f"{ckpt} is not the checkpoint that the bundle was exported from; name that one")


if __name__ == "__main__":
    main()
