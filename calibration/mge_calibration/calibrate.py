"""Calibrate a bundle: run the images, learn temperatures and exits, and put them into the bundle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mge_calibration.collect import FEWEST, collect
from mge_calibration.conformal import (
    ConformalOutcome,
    ConformalRequest,
    learn_conformal,
    read_parents,
    require_enough,
)
from mge_calibration.exits import ExitOutcome, fewest_images, learn_exits
from mge_calibration.images import LabeledImage, choose_images, list_unknown
from mge_calibration.temperature import TemperatureOutcome, learn_temperatures, set_temperature
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.calibrated import Guarantee, RunsOn
from mge_runtime.errors import InputError
from mge_runtime.fields import JsonValue
from mge_runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    bundle: Path
    data: Path  # labeled images
    exit_data: Path | None  # others for the exits; None: a part of `data`
    guarantee: Guarantee
    seed: int
    opening: Mapping[str, Any]  # of `Pipeline.open`
    conformal: ConformalRequest | None = None


@dataclass(frozen=True)
class Learned:
    """What was learned, and from what."""

    request: Request
    manifest_sha256: str
    runs_on: RunsOn
    folders: tuple[Path, Path]  # of the images for temperatures and for exits
    fitted: tuple[LabeledImage, ...]  # that set the temperatures
    tested: tuple[LabeledImage, ...] | None  # others, that judge them and set the exits; None: there were too few
    temperatures: Mapping[str, TemperatureOutcome]
    exits: ExitOutcome | str  # or why there are none
    gmacs: tuple[float, ...]  # of one image, everything up to each graph; the last is the full chain's
    unreadable: int  # images passed over
    conformal: ConformalOutcome | None = None
    held: tuple[LabeledImage, ...] = ()  # that set its thresholds


def learn(
    request: Request,
    *,
    say: Callable[[str], None],
    problem: Callable[[InputError], None],
    progress: Callable[[int], AbstractContextManager[Any]],
) -> Learned:
    """Run the images and learn from what is predicted; nothing is written.

    Args:
        request: what is asked for.
        say: is told what is noteworthy, a line each.
        problem: is told of each image that cannot be read.
        progress: makes a bar for so many images, as `click.progressbar`.

    Raises:
        InputError: a folder without usable images, or too few of them.
        BundleError: no bundle, a damaged one, or one of the Hub, which cannot be written.
        OutputError: the bundle cannot be written.
        BackendError: it cannot run here, or a graph failed.
    """
    with Bundle.open(request.bundle) as bundle:
        bundle.check_writable()
        manifest, manifest_sha256 = bundle.manifest, bundle.manifest_sha256
    gmacs = tuple(np.cumsum([manifest.gmacs[graph.name] for graph in manifest.graphs]).tolist())
    guarantee, wanted = request.guarantee, request.conformal or ConformalRequest()
    parents = read_parents(wanted.hierarchy, manifest.class_names) if wanted.hierarchy else None
    unknowns = list_unknown(wanted.unknown) if wanted.unknown else []
    chosen = choose_images(request.data, request.exit_data, manifest, say)
    most = len(chosen.fitting) // 3 if chosen.testing is None else len(chosen.testing) // 2  # as they are split below
    require_enough(wanted, most, guarantee.delta)  # before they are run; fewer may be readable
    # What calibration is there already is about to be replaced; it may be damaged.
    opened = Pipeline.open(request.bundle, streams="auto", calibration=False, **request.opening)
    with opened as pipeline, progress(len(chosen.fitting) + len(chosen.testing or []) + len(unknowns)) as bar:
        runs_on = RunsOn(pipeline.choice.backend, pipeline.choice.device)
        run = functools.partial(collect, pipeline, problem=problem, step=lambda: bar.update(1))
        fitted = run(chosen.fitting)
        if len(fitted) < FEWEST:
            raise InputError(
                f"{len(fitted)} images could be read in {chosen.folders[0]}; expected at least {FEWEST} to set a "
                "temperature: add images"
            )
        tested = run(chosen.testing) if chosen.testing else None
        unknown = run(unknowns) if unknowns else None
    if unknown is not None and not len(unknown):
        raise InputError(
            f"none of the {len(unknowns)} images in {wanted.unknown} can be read; expected some of no class"
        )
    unreadable = sum(part.unreadable for part in (fitted, tested, unknown) if part)
    if tested is None and (len(gmacs) > 1 or wanted.smallest):
        parts = fitted.split(chosen.known, request.seed)
        least = 1 if wanted.smallest else fewest_images(guarantee.epsilon, guarantee.delta)
        if len(parts[0]) >= FEWEST and len(parts[1]) >= least:
            fitted, tested = parts
    held = None
    if wanted.smallest:  # how the chain is run must not depend on the images that set thresholds for it
        held, tested = (tested or fitted.take(np.arange(0))).split(frozenset(), request.seed, share=1 / 2)
    outcomes = learn_temperatures(fitted, tested or fitted, seed=request.seed)
    for name, outcome in outcomes.items():
        if outcome.fit.bounded:
            say(f"the temperature of {name} ended at its bound, {outcome.fit.temperature:.3g}: add harder images")
    temperatures = {name: outcome.fit.temperature for name, outcome in outcomes.items()}
    exits = learn_exits(fitted, tested, temperatures, gmacs, guarantee, seed=request.seed)
    conformal = None
    if held is not None:
        thresholds = None if isinstance(exits, str) else exits.thresholds
        names, delta = manifest.class_names, guarantee.delta
        conformal = learn_conformal(wanted, held, unknown, temperatures, thresholds, delta, names, parents)
    return Learned(
        request=request,
        manifest_sha256=manifest_sha256,
        runs_on=runs_on,
        folders=chosen.folders,
        fitted=fitted.images,
        tested=tested.images if tested else None,
        temperatures=outcomes,
        exits=exits,
        gmacs=gmacs,
        unreadable=unreadable,
        conformal=conformal,
        held=held.images if held else (),
    )


def publish(learned: Learned, values: Mapping[str, JsonValue]) -> None:
    """Write the calibration into the bundle; on any failure the bundle is unchanged.

    Args:
        learned: by `learn`.
        values: by `report.as_values`.

    Raises:
        BundleError: the file holds another model by now.
        OutputError: it cannot be written.
    """
    *_, last = learned.temperatures.values()  # of the whole chain

    def changed(chain: bytes) -> bytes:
        import onnx

        model = onnx.load_model_from_string(chain)  # its weights stay where they are
        set_temperature(model, last.fit.temperature)
        return model.SerializeToString(deterministic=True)

    add_calibration(learned.request.bundle, values, manifest_sha256=learned.manifest_sha256, chain=changed)
