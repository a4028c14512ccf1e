"""One run of the bench: what is measured, in which order."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from mge_runtime.backends import choose, open_backend
from mge_runtime.bench.contenders import ChainContender
from mge_runtime.bench.deadline import NO_TIME, Deadline, TimeUp
from mge_runtime.bench.energy import find_meter, measure_energy
from mge_runtime.bench.fresh import Fresh, measure_fresh
from mge_runtime.bench.measure import measure_batch
from mge_runtime.bench.noise import describe_cpu
from mge_runtime.bench.pipelined import measure_pipelined
from mge_runtime.bench.results import BundleFacts, Memory, NotRun, Results
from mge_runtime.bench.toolchain import check_checkpoint
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError, MGEError
from mge_runtime.machine import cpu_count
from mge_runtime.machine_probe import describe_machine
from mge_runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from mge_runtime.backends import Choice
    from mge_runtime.bench.inputs import Inputs

__all__ = ["Request", "run_bench"]

_FIRST, _MORE = 120, 60  # seconds of the whole run where nobody names them: with one batch size, for each more
# What the sections may take of the time that is left, in proportion.
_FRESH, _BATCH, _PIPELINED, _ENERGY = 20, 40, 20, 5
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
    seconds: float | None = None  # of the whole run; None: see `limit`

    @property
    def limit(self) -> float:
        """Seconds of the whole run; infinite where nobody names them and a number of iterations or images decides."""
        if self.seconds is not None:
            return self.seconds
        counted = self.iterations is not None or self.images is not None
        return math.inf if counted else _FIRST + _MORE * (len(self.batches) - 1)


def run_bench(
    request: Request,
    inputs: Callable[[Bundle, Deadline], Inputs],
    say: Callable[[str], None] = lambda _line: None,
    interrupt: Callable[[], None] = lambda: None,
) -> Results:
    """Measure a bundle.

    A `KeyboardInterrupt` ends the run, and what was measured until then is returned, once the measuring has begun.

    Args:
        request: what to measure.
        inputs: reads the pictures for a bundle until a deadline.
        say: is told what is being done.
        interrupt: raises an interrupt that got lost.

    Raises:
        BundleError: the bundle is missing or damaged.
        InputError: a picture cannot be read.
        CheckpointError: the checkpoint cannot be read, or belongs to another model.
        BackendError: nothing can run the bundle here, or not in the first batch size.
    """
    deadline = Deadline.after(request.limit)
    say(
        "this takes as long as the numbers that were named; --seconds bounds it"
        if math.isinf(request.limit)
        else f"this takes {request.limit:.0f} s at most; --seconds names another time"
    )
    with Bundle.open(request.path) as bundle:
        facts, memory = _facts(bundle), _memory(bundle)
        choice = choose(request.device, request.backend, bundle=bundle)
        if choice.remark:
            say(f"note: {choice.remark}")
        library = open_backend(choice, bundle, threads=request.threads).version
        if request.ckpt is not None:
            say("reading the checkpoint")
            check_checkpoint(request.ckpt, bundle.manifest)
        pictures = inputs(bundle, deadline.share(1, 10))
    with Pipeline.open(request.path, choice.device, choice.backend, request.threads) as pipeline:
        _check_batches(request.batches, pipeline.max_batch)
    results = Results(
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
        memory=memory,
    )
    run = _Run(request, results, deadline, say, interrupt)
    with suppress(KeyboardInterrupt):
        run.fresh(choice, pictures)
        with Pipeline.open(request.path, choice.device, choice.backend, request.threads) as pipeline:
            run.batches(pipeline, pictures)
            if results.batches:
                run.pipelined(pipeline, pictures)
                run.energy(pipeline, pictures)
            results.report = pipeline.report()
        results.interrupted = None
    return results


class _Run:
    """The sections of one run; each adds what it measured to the results, and the reason for what it did not."""

    def __init__(
        self,
        request: Request,
        results: Results,
        deadline: Deadline,
        say: Callable[[str], None],
        interrupt: Callable[[], None],
    ) -> None:
        self._request, self._results, self._deadline = request, results, deadline
        self._say, self._interrupt = say, interrupt
        self._shares = _FRESH + _BATCH * len(request.batches) + _PIPELINED + _ENERGY  # of sections to come

    def fresh(self, choice: Choice, pictures: Inputs) -> None:
        """Start-up and peak memory."""
        with self._section("process start to first answer, peak memory", _FRESH) as deadline:
            request, frame = self._request, pictures.frames[0]
            measure_fresh(
                request.path,
                choice,
                request.threads,
                frame,
                deadline,
                lambda line: self._say(f"fresh processes: {line}"),
                self._keep_fresh,
            )

    def batches(self, pipeline: Pipeline, pictures: Inputs) -> None:
        """Every batch size.

        Raises:
            MGEError: the first one failed.
        """
        request, results = self._request, self._results
        if request.ckpt is None:
            command = f"mge-bench --engine {results.bundle.name} --ckpt best.pt"
            results.not_run.append(NotRun("eager PyTorch, torch.compile", "no checkpoint was named", command))
        for number, batch in enumerate(request.batches):
            with self._section(f"batch {batch}", _BATCH, needed=not number) as deadline:
                measure_batch(
                    pipeline,
                    pictures,
                    batch,
                    threads=request.threads,
                    ckpt=request.ckpt,
                    iterations=request.iterations,
                    warmup=request.warmup,
                    deadline=deadline,
                    say=self._say,
                    keep=results.batches.append,
                )

    def pipelined(self, pipeline: Pipeline, pictures: Inputs) -> None:
        """Pictures to answers, in the first batch size that was measured."""
        first = self._results.batches[0]
        with self._section("pictures to answers, pipelined", _PIPELINED) as deadline:
            measure_pipelined(
                pipeline,
                pictures,
                first.batch,
                self._request.images,
                chain_ms=first.rows[0].times.p50,
                deadline=deadline,
                say=lambda line: self._say(f"pipelined: {line}"),
                keep=lambda found: setattr(self._results, "pipelined", found),
            )

    def energy(self, pipeline: Pipeline, pictures: Inputs) -> None:
        """Of the chain alone."""
        meter = find_meter(pipeline.choice.device)
        if isinstance(meter, str):
            self._results.not_run.append(NotRun("energy", meter))
            return
        with self._section("energy", _ENERGY) as deadline:
            deadline.check()
            batch = self._results.batches[0].batch
            chain = ChainContender(pipeline, pictures.batch(batch)[1])
            self._results.energy = measure_energy(meter, chain, batch, min(_ENERGY, deadline.left))

    def _keep_fresh(self, found: Fresh) -> None:
        self._results.fresh = found
        if found.no_reference is not None:
            name = "plain ONNX Runtime, from start to first answer"
            self._results.not_run.append(NotRun(name, found.no_reference))

    @contextmanager
    def _section(self, name: str, share: int, *, needed: bool = False) -> Generator[Deadline]:
        """Yield a section's deadline. What fails or finds no time is listed (what is needed must not fail)."""
        self._interrupt()
        results = self._results
        results.interrupted = name
        deadline = self._deadline.share(share, self._shares)
        self._shares -= share
        self._say(name if math.isinf(deadline.left) else f"{name}: {max(deadline.left, 0):.1f} s")
        before = results.fresh, len(results.batches), results.pipelined
        try:
            yield deadline
        except TimeUp:
            if before == (results.fresh, len(results.batches), results.pipelined):
                results.not_run.append(NotRun(name, NO_TIME))
        except MGEError as error:
            if needed:
                raise
            results.not_run.append(NotRun(name, " ".join(str(error).split())))


def _check_batches(batches: tuple[int, ...], most: int | None) -> None:
    if most is not None and max(batches) > most:
        raise BackendError(
            f"asked to measure batches of {max(batches)}; the engines were built for at most {most}: "
            f"name smaller ones, or build for more with `mge-build --batch 1,1,{max(batches)}`"
        )


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
    return Memory(stored)


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
