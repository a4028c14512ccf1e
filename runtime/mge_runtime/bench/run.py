"""One run of the bench: what is measured, in which order."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from mge_runtime.backends import choose, open_backend
from mge_runtime.bench.arithmetic import open_yardstick
from mge_runtime.bench.contenders import ChainContender
from mge_runtime.bench.energy import Energy, find_meter, measure_energy
from mge_runtime.bench.fresh import Fresh, measure_fresh
from mge_runtime.bench.measure import measure_batch
from mge_runtime.bench.noise import describe_cpu
from mge_runtime.bench.pipelined import measure_pipelined
from mge_runtime.bench.results import BundleFacts, Memory, NotRun, Results
from mge_runtime.bench.toolchain import check_checkpoint
from mge_runtime.bench.weights import fp32_bytes
from mge_runtime.bundle import Bundle
from mge_runtime.cpus import cpu_count
from mge_runtime.errors import BackendError, MGEError
from mge_runtime.machine_probe import describe_machine
from mge_runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from mge_runtime.backends import Choice
    from mge_runtime.bench.arithmetic import Yardstick
    from mge_runtime.bench.inputs import Inputs

__all__ = ["Request", "run_bench"]

# Seconds to spend where the number of iterations is left open: on one batch size's rounds, and so on.
_ROUNDS, _FRESH, _PIPELINED, _RATES = 40.0, 20.0, 20.0, 2.0
_QUICK = 0.2  # of all of them
_PACKAGES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx", "cuda-core")


@dataclass(frozen=True)
class Request:
    """What to measure."""

    path: Path
    device: str = "auto"
    backend: str = "auto"
    batches: tuple[int, ...] = (1,)
    threads: int | None = None
    iterations: int | None = None  # of each contender; None: as many as fit
    warmup: int | None = None  # runs before; None: until steady
    images: int | None = None  # of the pipelined rounds together; None: as many as fit
    ckpt: Path | None = None  # for PyTorch's contenders
    quick: bool = False  # a fifth of the time


def run_bench(
    request: Request,
    inputs: Callable[[Bundle], Inputs],
    say: Callable[[str], None] = lambda _line: None,
) -> Results:
    """Measure a bundle.

    Args:
        request: what to measure.
        inputs: reads the pictures for a bundle.
        say: is told what is being done.

    Raises:
        BundleError: the bundle is missing or damaged.
        InputError: a picture cannot be read.
        CheckpointError: the checkpoint cannot be read, or belongs to another model.
        BackendError: nothing can run the bundle here, or not in this batch size.
    """
    factor = _QUICK if request.quick else 1.0
    not_run: list[NotRun] = []
    with Bundle.open(request.path) as bundle:
        facts, memory = _facts(bundle), _memory(bundle)
        choice = choose(request.device, request.backend, bundle=bundle)
        if choice.build:
            Pipeline(bundle, choice).close()
            choice = choose(choice.device, choice.backend, bundle=bundle)
        library = open_backend(choice, bundle, threads=request.threads).version
        if request.ckpt is not None:
            say("reading the checkpoint")
            check_checkpoint(request.ckpt, bundle.manifest)
        pictures = inputs(bundle)
    with Pipeline.open(request.path, choice.device, choice.backend, request.threads) as pipeline:
        _check_batches(request.batches, pipeline.max_batch)
    say("fresh processes")
    fresh = _fresh(request, choice, pictures, _FRESH * factor, say, not_run)
    if request.ckpt is None:
        names = "eager PyTorch, torch.compile"
        not_run.append(NotRun(names, "no checkpoint was named", f"mge-bench --engine {facts.name} --ckpt best.pt"))
    with Pipeline.open(request.path, choice.device, choice.backend, request.threads) as pipeline, ExitStack() as stack:
        say("the device's matrix rate")
        yardstick = _yardstick(request, choice, _RATES * factor, not_run)
        if yardstick is not None:
            stack.callback(yardstick.rates.close)
        batches = tuple(
            measure_batch(
                pipeline,
                request.path,
                pictures,
                batch,
                threads=request.threads,
                ckpt=request.ckpt,
                iterations=request.iterations,
                warmup=request.warmup,
                seconds=_ROUNDS * factor,
                say=say,
                yardstick=yardstick,
            )
            for batch in request.batches
        )
        stack.close()
        say("pictures to answers, pipelined")
        first = batches[0]
        pipelined = measure_pipelined(
            pipeline,
            pictures,
            first.batch,
            request.images,
            chain_ms=first.rows[0].times.p50,
            seconds=_PIPELINED * factor,
            say=lambda line: say(f"pipelined: {line}"),
        )
        energy = _energy(pipeline, pictures, first.batch, not_run)
        report = pipeline.report()
    return Results(
        mge=importlib.metadata.version("mge"),
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        bundle=facts,
        backend=choice.backend,
        device=choice.device,
        library=library,
        threads=(request.threads or cpu_count()) if choice.device == "cpu" else None,
        images=pictures.source,
        machine=describe_machine(always=True),
        cpu=describe_cpu(),
        versions=_versions(),
        batches=batches,
        pipelined=pipelined,
        fresh=fresh,
        memory=memory,
        report=report,
        energy=energy,
        not_run=tuple(not_run),
    )


def _check_batches(batches: tuple[int, ...], most: int | None) -> None:
    if most is not None and max(batches) > most:
        raise BackendError(
            f"asked to measure batches of {max(batches)}; the engines were built for at most {most}: "
            f"name smaller ones, or build for more with `mge-build --batch 1,1,{max(batches)}`"
        )


def _fresh(
    request: Request,
    choice: Choice,
    pictures: Inputs,
    seconds: float,
    say: Callable[[str], None],
    not_run: list[NotRun],
) -> Fresh | None:
    """Start-up and peak memory; what fails here is listed, and the rest is measured all the same."""
    name = "process start to first answer, peak memory"
    try:
        fresh = measure_fresh(
            request.path,
            choice,
            request.threads,
            pictures.frames[0],
            seconds,
            lambda line: say(f"fresh processes: {line}"),
        )
    except MGEError as error:
        not_run.append(NotRun(name, " ".join(str(error).split())))
        return None
    if fresh.no_reference is not None:
        not_run.append(NotRun("plain ONNX Runtime, from start to first answer", fresh.no_reference))
    return fresh


def _yardstick(request: Request, choice: Choice, seconds: float, not_run: list[NotRun]) -> Yardstick | None:
    """The matrix rate; where it cannot be measured that is listed, and the rest is measured all the same."""
    try:
        return open_yardstick(request.path, choice, request.threads, seconds)
    except BackendError as error:
        not_run.append(NotRun("share of the device's matrix rate", " ".join(str(error).split())))
        return None


def _energy(pipeline: Pipeline, pictures: Inputs, batch: int, not_run: list[NotRun]) -> Energy | None:
    meter = find_meter(pipeline.choice.device)
    if isinstance(meter, str):
        not_run.append(NotRun("energy", meter))
        return None
    return measure_energy(meter, ChainContender(pipeline, pictures.batch(batch)[1]), batch)


def _facts(bundle: Bundle) -> BundleFacts:
    manifest = bundle.manifest
    kinds = {str(plan.get("type", "unknown")) for plan in manifest.precision.values()}
    return BundleFacts(
        name=bundle.path.name,
        manifest_sha256=bundle.manifest_sha256,
        arch=str(manifest.model.get("arch", "unknown")),
        image_size=manifest.preprocess.size,
        classes=len(manifest.class_names),
        experts=len(manifest.views),
        precision=" and ".join(sorted(kinds)) or "unknown precision",
        targets=bundle.targets,
        calibrated=bundle.calibration() is not None,
    )


def _memory(bundle: Bundle) -> Memory:
    stored = sum(size for name, size in bundle.sizes.items() if name.endswith(".weights"))
    return Memory(fp32_bytes(bundle), stored)


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
