"""Calibrate a bundle: answer the images, learn temperatures and exits, and put them into the bundle."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mge_calibration.collect import Answers, collect, load_frame
from mge_calibration.cost import Cost, chain_cost, measure_times
from mge_calibration.exits import fewest_images
from mge_calibration.folder import LabelledImage, data_sha256, list_labelled, split_by_content, without
from mge_calibration.judge import ExitOutcome, TemperatureOutcome, learn_exits, learn_temperatures
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.calibrated import Promise
from mge_runtime.errors import BundleError, InputError
from mge_runtime.fields import JsonValue
from mge_runtime.manifest import Manifest
from mge_runtime.pipeline import Pipeline

__all__ = ["FEWEST", "Learned", "Part", "Request", "bundle_values", "learn", "publish"]

FEWEST = 50  # images that may set temperatures
_TEMPERATURE_SHARE = 1 / 3  # of one folder's images; thresholds need more of them than a temperature does
_TIMED_FRAMES = 8


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


@dataclass(frozen=True)
class Part:
    """The images that taught one thing."""

    folder: Path
    images: int
    sha256: str


@dataclass(frozen=True)
class Learned:
    """What was learned, and from what."""

    request: Request
    manifest_sha256: str
    runs_on: str  # backend and device
    temperatures: Mapping[str, TemperatureOutcome]
    temperature_part: Part
    judged_apart: bool  # whether images other than those that set the temperatures judge them
    exits: ExitOutcome | str  # or why there are none
    exit_part: Part | None
    cost: Cost
    times_ms: tuple[float, ...]  # median of one image's chain, by where it stops
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
        BackendError: it cannot run here, or a stage failed.
    """
    with Bundle.open(request.bundle) as bundle:
        manifest, manifest_sha256, cost = bundle.manifest, bundle.manifest_sha256, chain_cost(bundle)
    fitting, testing, folders = _choose(request, manifest, say)
    # What is there already is about to be replaced; it may be damaged.
    opened = functools.partial(Pipeline.open, request.bundle, request.device, request.backend, request.threads)
    with opened("auto", calibration=False) as pipeline:
        step = progress(len(fitting) + len(testing))
        fitted = collect(pipeline, fitting, problem=problem, step=step)
        tested = collect(pipeline, testing, problem=problem, step=step) if testing else None
    _require_enough(len(fitted), folders[0], "could be read in")
    with opened(calibration=False) as pipeline:
        runs_on = f"{pipeline.choice.backend} on {pipeline.choice.device}"
        times_ms = measure_times(pipeline, [load_frame(pipeline, image) for image in fitted.images[:_TIMED_FRAMES]])
    temperatures = learn_temperatures(fitted, tested or fitted, seed=request.seed)
    for name, outcome in temperatures.items():
        if outcome.fit.bounded:
            say(f"the temperature of {name} ended at its bound, {outcome.fit.temperature:.3g}: add harder images")
    return Learned(
        request=request,
        manifest_sha256=manifest_sha256,
        runs_on=runs_on,
        temperatures=temperatures,
        temperature_part=_part(folders[0], fitted),
        judged_apart=tested is not None,
        exits=_exits(request, manifest, fitted, tested, temperatures, cost),
        exit_part=_part(folders[1], tested) if tested else None,
        cost=cost,
        times_ms=times_ms,
        unreadable=fitted.unreadable + (tested.unreadable if tested else 0),
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
        "data": {name: None if p is None else {"images": p.images, "sha256": p.sha256} for name, p in parts.items()},
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
    path = learned.request.bundle
    with Bundle.open(path) as bundle:
        if bundle.manifest_sha256 != learned.manifest_sha256:
            raise BundleError(
                f"{path} was replaced while it was calibrated: found manifest {bundle.manifest_sha256[:12]}, expected "
                f"{learned.manifest_sha256[:12]}, which the images were answered with; calibrate it again"
            )
    add_calibration(path, values)


def _choose(
    request: Request, manifest: Manifest, say: Callable[[str], None]
) -> tuple[list[LabelledImage], list[LabelledImage], tuple[Path, Path]]:
    """Images for the temperatures and others for the exits, and the folders they lie in."""
    root, images = list_labelled(request.data, manifest.class_names)
    _require_enough(len(images), root, "are in")
    if request.exit_data is not None:
        exit_root, exit_images = list_labelled(request.exit_data, manifest.class_names)
        others = without(exit_images, images)
        if not others:
            raise InputError(
                f"every image in {exit_root} is also in {root}; exits need images other than those that set the "
                "temperatures"
            )
        if shared := len(exit_images) - len(others):
            say(f"{shared} of {len(exit_images)} images in {exit_root} are also in {root}: they set no exits")
        return images, others, (root, exit_root)
    fitting, testing = split_by_content(images, _TEMPERATURE_SHARE, request.seed)
    enough = len(fitting) >= FEWEST and len(testing) >= fewest_images(request.promise.epsilon, request.promise.delta)
    if len(manifest.segments) < 2 or not enough:
        return images, [], (root, root)  # no exits: all of them serve the temperatures
    return fitting, testing, (root, root)


def _exits(
    request: Request,
    manifest: Manifest,
    fitted: Answers,
    tested: Answers | None,
    temperatures: Mapping[str, TemperatureOutcome],
    cost: Cost,
) -> ExitOutcome | str:
    if len(manifest.segments) < 2:
        return "the chain has a single answer, there is nowhere to stop before it"
    if tested is None:
        least = fewest_images(request.promise.epsilon, request.promise.delta)
        needed = max(math.ceil(least / (1 - _TEMPERATURE_SHARE)), math.ceil(FEWEST / _TEMPERATURE_SHARE))
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
    return Part(folder, len(answers), data_sha256(answers.images))
