"""Time one batch size: the chain, pictures and PyTorch, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from mge_runtime.bench.contender import Contender
from mge_runtime.bench.contenders import ChainContender, PhotoContender
from mge_runtime.bench.deadline import NO_TIME, Deadline
from mge_runtime.bench.noise import Watch
from mge_runtime.bench.results import BatchResult, NotRun, Row, Step
from mge_runtime.bench.rounds import Series, interleave, plan_rounds, timed, warm_up
from mge_runtime.bench.stats import Percentiles, Ratio
from mge_runtime.bench.toolchain import eager_contenders
from mge_runtime.errors import MGEError, one_line
from mge_runtime.selfcheck.memory import host_memory

if TYPE_CHECKING:
    from mge_runtime.bench.inputs import Inputs
    from mge_runtime.pipeline import Pipeline

__all__ = ["COMPUTE", "measure_batch"]

COMPUTE = "chain"  # the step of a device's executor that is computing, and nothing else
_UPLOAD = "upload"
_BETWEEN = "between the steps (derived)"
_ROUNDS_SECONDS = 40.0  # where the number of iterations is left open and nothing bounds the run
_PYTORCH_SHARE = 0.4  # of a batch size's time, to open PyTorch's ways
_LEAST_RUNS = 3  # of each contender that there must be time for: one to warm up, two rounds


def measure_batch(
    pipeline: Pipeline,
    inputs: Inputs,
    batch: int,
    *,
    threads: int | None,
    ckpt: Path | None,
    iterations: int | None,
    warmup: int | None,
    deadline: Deadline,
    say: Callable[[str], None],
    keep: Callable[[BatchResult], None],
) -> None:
    """Time everything with one batch size.

    Args:
        pipeline: opened with one stream.
        inputs: the pictures.
        batch: images in a run.
        threads: as the pipeline was opened with.
        ckpt: the checkpoint for PyTorch's contenders; None: without them.
        iterations: of each contender, at least; None: as many as fit.
        warmup: runs of each before; None: until it is steady.
        deadline: what it leaves no time for is not measured.
        say: is told what is being done.
        keep: is given the times, whatever ends the rounds, if one of them was whole.

    Raises:
        BackendError: the chain failed, or cannot run this batch.
        CheckpointError: the checkpoint cannot be read.
        TimeUp: the deadline has passed before the first round.
    """
    deadline.check()
    files, frames = inputs.batch(batch)
    chain, photos = ChainContender(pipeline, frames), PhotoContender(pipeline, files)
    chain.run()  # whether this batch runs at all
    not_run: list[NotRun] = []
    with ExitStack() as stack:
        deadline.check()
        contenders: list[Contender] = [chain, photos]
        eager: list[Contender] = []
        if ckpt is not None:
            say(f"batch {batch}: opening PyTorch's ways")
            limit = deadline.share(_PYTORCH_SHARE, 1)
            eager, missing = eager_contenders(ckpt, frames, threads, pipeline.choice.device, limit)
            not_run += [NotRun(name, reason) for name, reason in missing.items()]
        for contender in (*contenders, *eager):
            stack.callback(contender.close)
        say(f"batch {batch}: warming up")
        contenders = _fitting(contenders, eager, deadline, not_run)
        count, estimates = warm_up(contenders, warmup, deadline)
        seconds = deadline.seconds(_ROUNDS_SECONDS) if iterations is None else deadline.left
        plan = plan_rounds(list(estimates.values()), iterations, seconds)
        total = plan.rounds * ((plan.runs + (plan.runs > 1)) * sum(estimates.values())) / 1e3
        say(f"batch {batch}: {plan.rounds} rounds of {plan.runs} runs, about {min(total, deadline.left):.0f} s")
        before, watch = host_memory(), Watch()
        series: dict[str, Series] = {}
        ended: BaseException | None = None
        try:
            interleave(
                contenders,
                plan,
                lambda line: say(f"batch {batch}: {line}"),
                deadline=deadline,
                series=series,
            )
        except BaseException as error:  # a signal, or a failure: the whole rounds before it count all the same
            ended = error
        after = host_memory()
    if series[chain.name].rounds:
        reference = series[chain.name]
        on_device = any(_UPLOAD in steps for block in series[chain.name].steps for steps in block)
        keep(
            BatchResult(
                batch=batch,
                warm_up=count,
                rounds=len(series[chain.name].rounds),
                runs=plan.runs,
                rows=tuple(_rows(series, on_device, batch)),
                steps=tuple(_steps(series[chain.name])),
                ratios=tuple(_ratios(series, eager)),
                copies=_copies(on_device),
                growth=None if before is None or after is None else after - before,
                noise=watch.stop(reference.contender.name, reference.medians),
                not_run=tuple(not_run),
                pytorch_threads=_pytorch_threads(eager),
            )
        )
    if ended is not None:
        raise ended


def _fitting(
    contenders: Sequence[Contender], eager: Sequence[Contender], deadline: Deadline, not_run: list[NotRun]
) -> list[Contender]:
    """Run each once and keep those that there is time for, the first in any case; of PyTorch's also those that work."""
    kept: list[Contender] = []
    seconds = 0.0  # of one run of each that is kept
    for contender in (*contenders, *eager):
        took = 0.0
        if not kept:
            deadline.check()
        fits = not kept or seconds * _LEAST_RUNS <= deadline.left
        if fits:
            try:
                took = timed(contender) / 1e3
            except MGEError as error:
                if contender not in eager:
                    raise
                not_run.append(NotRun(contender.name, one_line(error)))
                continue
        if fits and (not kept or (seconds + took) * _LEAST_RUNS <= deadline.left):
            kept.append(contender)
            seconds += took
        else:
            not_run.append(NotRun(contender.name, NO_TIME))
    return kept


def _pytorch_threads(eager: Sequence[Contender]) -> dict[str, int]:
    """How many threads PyTorch says that it computed with, by contender."""
    said = ((contender.name, getattr(contender, "threads", None)) for contender in eager)
    return {name: threads for name, threads in said if isinstance(threads, int)}


def _rows(series: dict[str, Series], on_device: bool, batch: int) -> list[Row]:
    rows: list[Row] = []
    for name, found in series.items():
        if on_device and name == COMPUTE:
            alone = [[steps.get(COMPUTE, 0.0) for steps in block] for block in found.steps]
            rows.append(_row("chain, compute alone (inputs on the device)", alone, batch))
            rows.append(_row("chain, with host-device copies", found.rounds, batch))
        else:
            rows.append(_row("chain, compute alone" if name == COMPUTE else name, found.rounds, batch))
    return rows


def _row(name: str, rounds: Sequence[Sequence[float]], batch: int) -> Row:
    times = Percentiles.of([ms for block in rounds for ms in block])
    return Row(name, times, batch / times.p50 * 1e3, tuple(tuple(block) for block in rounds))


def _steps(chain: Series) -> list[Step]:
    names = list(dict.fromkeys(step for block in chain.steps for run in block for step in run))
    runs = {name: [run.get(name, 0.0) for block in chain.steps for run in block] for name in names}
    runs[_BETWEEN] = [ms - sum(parts) for ms, *parts in zip(chain.times_ms, *runs.values(), strict=True)]
    whole = chain.medians
    rounds = {name: chain.step_medians(name) for name in names}
    rounds[_BETWEEN] = [ms - sum(parts) for ms, *parts in zip(whole, *rounds.values(), strict=True)]
    return [
        Step(name, median(ms), Percentiles.of(runs[name]), Ratio.of(name, ms, whole).median)
        for name, ms in rounds.items()
    ]


def _ratios(series: dict[str, Series], eager: Sequence[Contender]) -> list[Ratio]:
    chain = series[COMPUTE]
    ratios: list[Ratio] = []
    for contender in eager:
        if contender.name in series:
            ratios.append(Ratio.of(f"{contender.name} / chain", series[contender.name].medians, chain.medians))
    if (photos := series.get(PhotoContender.name)) is not None:
        ratios.append(Ratio.of("JPEG to Prediction, not pipelined / chain", photos.medians, chain.medians))
    return ratios


def _copies(on_device: bool) -> str:
    if on_device:
        return "copies between host and device are the difference between the chain's two rows, and steps of their own"
    return "on a CPU nothing is copied between host and device: there is no figure with copies beside compute alone"
