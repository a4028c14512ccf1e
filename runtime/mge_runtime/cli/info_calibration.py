"""What `mge-info` says of a calibration, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

__all__ = ["calibration_lines"]


def calibration_lines(values: dict[str, Any] | None, manifest: dict[str, Any]) -> Iterator[str]:
    """Lines about temperatures and exits.

    Args:
        values: of the calibration; None: the bundle has none.
        manifest: as plain values.
    """
    from mge_runtime.calibrated import Calibrated
    from mge_runtime.errors import BundleError
    from mge_runtime.manifest import Manifest

    if values is None:
        yield "no: probabilities are the model's own and there are no calibrated exits (mge-calibrate learns both)"
        return
    chain = Manifest.from_json(json.dumps(manifest).encode())
    try:
        calibrated = Calibrated.from_values(values, chain)
    except BundleError as error:
        yield f"cannot be read: {error}"
        return
    temperatures = ", ".join(f"{name} {value:.4g}" for name, value in calibrated.temperatures.items())
    yield f"temperatures: {temperatures}{_learned_from(calibrated.images.get('temperatures'))}"
    if not calibrated.has_exits or calibrated.promise is None:
        yield "no early exits: none was found that keeps the promise"
        return
    places = [
        f"after graph {point.graphs} where {point.answer} has a confidence of at least {point.threshold:.6g}"
        for point in calibrated.exit_points(chain)
    ]
    yield f"exits (--exit calibrated): {', '.join(places)}{_learned_from(calibrated.images.get('exits'))}"
    promise = calibrated.promise
    yield (
        f"  with probability {100 * (1 - promise.delta):.4g}% at most {100 * promise.epsilon:.4g}% of answers differ "
        "from the whole chain's, on images like those" + (f", with {calibrated.runs_on}" if calibrated.runs_on else "")
    )


def _learned_from(images: int | None) -> str:
    return "" if images is None else f" (from {images} images)"
