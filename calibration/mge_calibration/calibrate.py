"""Calibrate a bundle: answer the images, learn temperatures and exits, and put them into the bundle."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mge_calibration.collect import Answers, collect
from mge_calibration.cost import Cost, Times, chain_cost, measure_times
from mge_calibration.exits import fewest_images
from mge_calibration.folder import data_sha256, short_digest
from mge_calibration.judge import ExitOutcome, TemperatureOutcome, learn_exits, learn_temperatures
from mge_calibration.parts import TEMPERATURE_SHARE, Chosen, choose_images, split_answers
from mge_calibration.temperature import with_temperature
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.calibrated import Calibrated, Promise, RunsOn
from mge_runtime.decode import MAX_PIXELS
from mge_runtime.errors import InputError
from mge_runtime.fields import JsonValue
from mge_runtime.manifest import Manifest
from mge_runtime.pipeline import Pipeline

__all__ = ["FEWEST", "Learned", "Part", "Request", "bundle_values", "learn", "publish"]

FEWEST = 50  # images that may set temperatures
_TIMED = 64  # images


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    bundle: Path
    data: Path  # labelled images
    exit_data: Path | None  # others for the exits; None: a part of `data`
    promise: Promise
    seed: int
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    mmap: bool = True  # as for `Pipeline.open`, and so is the next
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class Part:
    """The images that taught one thing."""

    folder: Path
    images: int
    sha256: str
    digests: tuple[str, ...]  # of each image, sorted


@dataclass(frozen=True)
class Learned:
    """What was learned, and from what."""

    request: Request
    manifest_sha256: str
    runs_on: RunsOn
    temperatures: Mapping[str, TemperatureOutcome]
    temperature_part: Part
    judged_apart: bool  # whether images other than those that set the temperatures judge them
    exits: ExitOutcome | str  # or why there are none
    exit_part: Part | None
    cost: Cost
    times: Times
    unreadable: int  # images passed over


def learn(
    request: Request,
    *,
    say: Callable[[str], None],
    problem: Callable[[InputError], None],
    progress: Callable[[int], Callable[[], None]],
) -> Learned:
    """Answer the images and learn from the answers; nothing is written.

    Args:
        request: what is asked for.
        say: is told what is noteworthy, a line each.
        problem: is told of each image that cannot be read.
        progress: is called with the number of images; what it returns is called after each.

    Raises:
        InputError: a folder without usable images, or too few of them.
        BundleError: no bundle, or a damaged one.
        BackendError: it cannot run here, or a graph failed.
    """
    with Bundle.open(request.bundle) as bundle:
        manifest, manifest_sha256, cost = bundle.manifest, bundle.manifest_sha256, chain_cost(bundle.manifest)
    chosen = choose_images(request.data, request.exit_data, manifest, say)
    _require_enough(len(chosen.fitting), chosen.folders[0], "are in")
    # What is there already is about to be replaced; it may be damaged.
    opened = functools.partial(
        Pipeline.open,
        request.bundle,
        request.device,
        request.backend,
        request.threads,
        calibration=False,
        mmap=request.mmap,
        max_pixels=request.max_pixels,
    )
    with opened("auto") as pipeline:
        runs_on = RunsOn(pipeline.choice.backend, pipeline.choice.device)
        step = progress(len(chosen.fitting) + len(chosen.testing or []))
        fitted = collect(pipeline, chosen.fitting, problem=problem, step=step)
        tested = collect(pipeline, chosen.testing, problem=problem, step=step) if chosen.testing else None
    unreadable = fitted.unreadable + (tested.unreadable if tested else 0)
    _require_enough(len(fitted), chosen.folders[0], "could be read in")
    if tested is None:
        fitted, tested = _divided(fitted, chosen, manifest, request)
    temperatures = learn_temperatures(fitted, tested or fitted, seed=request.seed)
    for name, outcome in temperatures.items():
        if outcome.fit.bounded:
            say(f"the temperature of {name} ended at its bound, {outcome.fit.temperature:.3g}: add harder images")
    exits = _exits(request, manifest, fitted, tested, temperatures, cost)
    with opened() as pipeline:
        times = _measure(pipeline, tested or fitted, temperatures, exits, request)
    return Learned(
        request=request,
        manifest_sha256=manifest_sha256,
        runs_on=runs_on,
        temperatures=temperatures,
        temperature_part=_part(chosen.folders[0], fitted),
        judged_apart=tested is not None,
        exits=exits,
        exit_part=_part(chosen.folders[1], tested) if tested else None,
        cost=cost,
        times=times,
        unreadable=unreadable,
    )


def bundle_values(learned: Learned, report: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The values of the bundle's `calibration.json`, with free figures to keep beside them."""
    promise, exits = learned.request.promise, learned.exits
    parts = {"temperatures": learned.temperature_part, "exits": learned.exit_part}
    return {
        "temperatures": {name: outcome.fit.temperature for name, outcome in learned.temperatures.items()},
        "exits": None
        if isinstance(exits, str)
        else {"epsilon": promise.epsilon, "delta": promise.delta, "thresholds": dict(exits.thresholds)},
        "data": {name: None if part is None else _recorded(part) for name, part in parts.items()},
        "runs_on": asdict(learned.runs_on),
        "seed": learned.request.seed,
        "made_by": f"mge {version('mge')}",
        "report": report,
    }


def publish(learned: Learned, values: Mapping[str, JsonValue]) -> None:
    """Write the calibration into the bundle; on any failure the bundle is unchanged.

    Args:
        learned: by `learn`.
        values: by `bundle_values`.

    Raises:
        BundleError: the file holds another model by now.
        OutputError: it cannot be written.
    """
    last = list(learned.temperatures.values())[-1]  # of the whole chain
    add_calibration(
        learned.request.bundle,
        values,
        manifest_sha256=learned.manifest_sha256,
        chain=lambda chain: with_temperature(chain, last.fit.temperature),
    )


def _divided(answers: Answers, chosen: Chosen, manifest: Manifest, request: Request) -> tuple[Answers, Answers | None]:
    """One folder's answers for temperatures and for exits; all for temperatures where there can be no exits."""
    if len(manifest.graphs) < 2:
        return answers, None
    fitted, tested = split_answers(answers, chosen.known, request.seed)
    least = fewest_images(request.promise.epsilon, request.promise.delta)
    return (fitted, tested) if len(fitted) >= FEWEST and len(tested) >= least else (answers, None)


def _measure(
    pipeline: Pipeline,
    judged: Answers,
    temperatures: Mapping[str, TemperatureOutcome],
    exits: ExitOutcome | str,
    request: Request,
) -> Times:
    """Time the chain, with and without exits, on some of the images that set them."""
    picked = np.random.default_rng(request.seed).permutation(len(judged))[:_TIMED]
    frames = [pipeline.frame(judged.images[int(row)].path) for row in picked]
    if not isinstance(exits, str):
        # They are not in the bundle yet.
        pipeline.calibrated = Calibrated(
            {name: outcome.fit.temperature for name, outcome in temperatures.items()},
            {name: threshold for name, threshold in exits.thresholds.items() if threshold is not None},
            request.promise,
        )
    return measure_times(pipeline, frames)


def _exits(
    request: Request,
    manifest: Manifest,
    fitted: Answers,
    tested: Answers | None,
    temperatures: Mapping[str, TemperatureOutcome],
    cost: Cost,
) -> ExitOutcome | str:
    if len(manifest.graphs) < 2:
        return "the chain has a single answer, there is nowhere to stop before it"
    if tested is None:
        least = fewest_images(request.promise.epsilon, request.promise.delta)
        needed = max(math.ceil(least / (1 - TEMPERATURE_SHARE)), math.ceil(FEWEST / TEMPERATURE_SHARE))
        return (
            f"too few images for the promise: {len(fitted)}; epsilon {request.promise.epsilon:.3g} and delta "
            f"{request.promise.delta:.3g} need {least} beside those that set the temperatures, so {needed} in all: add "
            "images, name a folder with --exit-data, or allow a larger epsilon"
        )
    values = {name: outcome.fit.temperature for name, outcome in temperatures.items()}
    return learn_exits(fitted, tested, values, cost, request.promise, seed=request.seed)


def _require_enough(count: int, folder: Path, where: str) -> None:
    if count < FEWEST:
        raise InputError(
            f"{count} images {where} {folder}; expected at least {FEWEST} to set a temperature: add images"
        )


def _part(folder: Path, answers: Answers) -> Part:
    digests = tuple(sorted(short_digest(image.sha256) for image in answers.images))
    return Part(folder, len(answers), data_sha256(answers.images), digests)


def _recorded(part: Part) -> dict[str, JsonValue]:
    return {"images": part.images, "sha256": part.sha256, "digests": list(part.digests)}
