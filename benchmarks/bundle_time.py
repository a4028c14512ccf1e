"""How long one bundle takes beside another of the same model on this CPU, INT8 beside FP32 say, run in turn.

    python benchmarks/bundle_time.py fp32.plan int8.plan --batch 1 --batch 8 --threads 1 --threads 2

Reported are medians, and the median of the ratios within a round, with their 10th and 90th percentile. Frames are
noise: what they show makes no difference to the time. Whether the CPU has VNNI is printed (Linux).
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from mge_runtime.cli.common import reports_errors
from mge_runtime.pipeline import Pipeline

PATH = click.Path(path_type=Path)
WARM_UP = 3  # rounds: the first ones allocate


@click.command(help=__doc__)
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("--threads", "several", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--rounds", default=30, show_default=True)
@reports_errors
def main(first: Path, second: Path, batches: tuple[int, ...], several: tuple[int, ...], rounds: int) -> None:
    """Run and print."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    click.echo(f"VNNI: {'yes' if 'vnni' in flags else 'no' if flags else 'unknown'}")
    for threads in several:
        with (
            Pipeline.open(first, device="cpu", backend="onnxruntime", threads=threads) as one,
            Pipeline.open(second, device="cpu", backend="onnxruntime", threads=threads) as other,
        ):
            size = one.manifest.preprocess.size
            for batch in batches:
                frames = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
                taken: list[list[float]] = []
                for number in range(rounds + WARM_UP):
                    times = [seconds(pipeline, frames) for pipeline in ((one, other), (other, one))[number % 2]]
                    taken.append(times[:: 1 if number % 2 == 0 else -1])
                kept = np.array(taken[WARM_UP:])
                low, ratio, high = np.percentile(kept[:, 1] / kept[:, 0], [10, 50, 90])
                begin, end = 1e3 * np.median(kept, axis=0)
                click.echo(
                    f"{threads} threads, batch {batch}: {begin:.1f} ms, {end:.1f} ms, "
                    f"second / first {ratio:.3f} [{low:.3f}, {high:.3f}]"
                )


def seconds(pipeline: Pipeline, frames: np.ndarray) -> float:
    """One run."""
    begin = time.perf_counter()
    pipeline.run(frames)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
