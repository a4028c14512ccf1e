"""Calibrate a bundle: run the images, learn temperatures and exits, and put them into the bundle."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mge_calibration.collect import TEMPERATURE_SHARE, ChainLogits, Times, collect, measure_times
from mge_calibration.exits import ExitOutcome, fewest_images, learn_exits
from mge_calibration.images import choose_images, data_sha256, short_digest
from mge_calibration.quality import TemperatureOutcome, learn_temperatures
from mge_calibration.temperature import with_temperature
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.calibrated import Calibrated, Promise, RunsOn
from mge_runtime.decode import MAX_PIXELS
from mge_runtime.errors import InputError
from mge_runtime.fields import JsonValue
from mge_runtime.pipeline import Pipeline

__all__ = ["FEWEST", "Learned", "Part", "Request", "bundle_values", "learn", "publish"]

FEWEST = 50  # images that may set temperatures
_TIMED = 64  # images


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    bundle: Path
    data: Path  # labeled images
    exit_data: Path | None  # others for the exits; None: a part of `data`
    guarantee: Promise
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

    @classmethod
    def of(cls, folder: Path, found: ChainLogits) -> Part:
        """The images that were read in a folder."""
        digests = tuple(sorted(short_digest(image.sha256) for image in found.images))
        return cls(folder, len(found), data_sha256(found.images), digests)

    def to_dict(self) -> dict[str, JsonValue]:
        """Plain values for the bundle, without the path."""
        return {"images": self.images, "sha256": self.sha256, "digests": list(self.digests)}


@dataclass(frozen=True)
class Learned:
    """What was learned, and from what."""

    request: Request
    manifest_sha256: str
    runs_on: RunsOn
    temperatures: Mapping[str, TemperatureOutcome]
    temperature_part: Part
    exits: ExitOutcome | str  # or why there are none
    exit_part: Part | None  # images other than those that set the temperatures; None: these judge them, too
    gmacs: tuple[float, ...]  # of one image, everything up to each graph; the last is the full chain's
    times: Times
    unreadable: int  # images passed over


def learn(
    request: Request,
    *,
    say: Callable[[str], None],
    problem: Callable[[InputError], None],
    progress: Callable[[int], Callable[[], None]],
) -> Learned:
    """Run the images and learn from what is predicted; nothing is written.

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
        manifest, manifest_sha256 = bundle.manifest, bundle.manifest_sha256
    gmacs = tuple(np.cumsum([manifest.gmacs[graph.name] for graph in manifest.graphs]).tolist())
    guarantee, single = request.guarantee, len(gmacs) < 2
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
    least = fewest_images(guarantee.epsilon, guarantee.delta)
    if tested is None and not single:
        parts = fitted.split(chosen.known, request.seed)
        if len(parts[0]) >= FEWEST and len(parts[1]) >= least:
            fitted, tested = parts
    judged = tested or fitted
    outcomes = learn_temperatures(fitted, judged, seed=request.seed)
    for name, outcome in outcomes.items():
        if outcome.fit.bounded:
            say(f"the temperature of {name} ended at its bound, {outcome.fit.temperature:.3g}: add harder images")
    temperatures = {name: outcome.fit.temperature for name, outcome in outcomes.items()}
    if tested is None and not single:
        needed = max(math.ceil(least / (1 - TEMPERATURE_SHARE)), math.ceil(FEWEST / TEMPERATURE_SHARE))
        exits = (
            f"too few images for the guarantee: {len(fitted)}; epsilon {guarantee.epsilon:.3g} and delta "
            f"{guarantee.delta:.3g} need {least} beside those that set the temperatures, so {needed} in all: add "
            "images, name a folder with --exit-data, or allow a larger epsilon"
        )
    else:
        exits = learn_exits(fitted, judged, temperatures, gmacs, guarantee, seed=request.seed)
    with opened() as pipeline:
        picked = np.random.default_rng(request.seed).permutation(len(judged))[:_TIMED]
        frames = [pipeline.frame(judged.images[int(row)].path) for row in picked]
        if not isinstance(exits, str):
            # They are not in the bundle yet.
            thresholds = {name: value for name, value in exits.thresholds.items() if value is not None}
            pipeline.calibrated = Calibrated(temperatures, thresholds, guarantee)
        times = measure_times(pipeline, frames)
    return Learned(
        request=request,
        manifest_sha256=manifest_sha256,
        runs_on=runs_on,
        temperatures=outcomes,
        temperature_part=Part.of(chosen.folders[0], fitted),
        exits=exits,
        exit_part=Part.of(chosen.folders[1], tested) if tested else None,
        gmacs=gmacs,
        times=times,
        unreadable=unreadable,
    )


def bundle_values(learned: Learned, report: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The values of the bundle's `calibration.json`, with free figures to keep beside them."""
    guarantee, exits = learned.request.guarantee, learned.exits
    parts = {"temperatures": learned.temperature_part, "exits": learned.exit_part}
    return {
        "temperatures": {name: outcome.fit.temperature for name, outcome in learned.temperatures.items()},
        "exits": None
        if isinstance(exits, str)
        else {"epsilon": guarantee.epsilon, "delta": guarantee.delta, "thresholds": dict(exits.thresholds)},
        "data": {name: None if part is None else part.to_dict() for name, part in parts.items()},
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
    *_, last = learned.temperatures.values()  # of the whole chain
    add_calibration(
        learned.request.bundle,
        values,
        manifest_sha256=learned.manifest_sha256,
        chain=lambda chain: with_temperature(chain, last.fit.temperature),
    )


def _require_enough(count: int, folder: Path, where: str) -> None:
    if count < FEWEST:
        raise InputError(
            f"{count} images {where} {folder}; expected at least {FEWEST} to set a temperature: add images"
        )
