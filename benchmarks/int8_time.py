"""How long INT8 takes on this CPU beside FP32: two bundles of one model, run in turn, medians.

    python benchmarks/int8_time.py --fp32 fp32.plan --int8 int8.plan --batch 1 --batch 8

Frames are noise: what they show makes no difference to the time. Whether the CPU has VNNI is printed (Linux).
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from mge_runtime.cli.common import reports_errors
from mge_runtime.pipeline import Pipeline

PATH = click.Path(path_type=Path)


@click.command(help=__doc__)
@click.option("--fp32", "wide", type=PATH, required=True)
@click.option("--int8", "narrow", type=PATH, required=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("--threads", "several", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--rounds", default=30, show_default=True)
@reports_errors
def main(wide: Path, narrow: Path, batches: tuple[int, ...], several: tuple[int, ...], rounds: int) -> None:
    """Run and print."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    click.echo(f"VNNI: {'yes' if 'vnni' in flags else 'no' if flags else 'unknown'}")
    for threads in several:
        options = {"device": "cpu", "backend": "onnxruntime", "threads": threads}
        with Pipeline.open(wide, **options) as one, Pipeline.open(narrow, **options) as other:
            shape = one.manifest.stages[0].inputs[0].shape[1:]
            for batch in batches:
                frames = np.random.default_rng(0).integers(0, 256, (batch, *shape), np.uint8)
                taken: dict[str, list[float]] = {"fp32": [], "int8": []}
                for number in range(rounds + 2):
                    for name, pipeline in (("fp32", one), ("int8", other)):
                        begin = time.perf_counter()
                        pipeline.run(frames)
                        if number > 1:  # the first ones allocate
                            taken[name].append(1e3 * (time.perf_counter() - begin))
                full, small = (float(np.median(taken[name])) for name in ("fp32", "int8"))
                click.echo(
                    f"{threads} threads, batch {batch}: FP32 {full:.1f} ms, INT8 {small:.1f} ms, "
                    f"ratio {small / full:.2f}"
                )


if __name__ == "__main__":
    main()
