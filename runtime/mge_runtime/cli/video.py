"""`mge-run --video`: classify the frames of a video, a camera or a stream."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.cli.common import note
from mge_runtime.draw import Canvas, draw_boxes
from mge_runtime.errors import MGEError, printable
from mge_runtime.files import echo
from mge_runtime.report import headline, json_record
from mge_runtime.video import Smoother, Video, video_writer

if TYPE_CHECKING:
    from mge_runtime.interrupt import Interrupt
    from mge_runtime.pipeline import Pipeline
    from mge_runtime.prediction import Prediction
    from mge_runtime.video import Frame


_LONGEST = 960  # pixels, the longer side of what is drawn


def run_video(
    pipeline: Pipeline,
    source: str,
    *,
    as_json: bool,
    top_k: int,
    save: Path | None,
    half_life: float | None,
    max_pixels: int,
    interrupt: Interrupt,
) -> bool:
    """Predict frame after frame until the source ends or a signal comes; returns whether it was to the end.

    A signal ends a camera as it is meant to be ended: what was drawn is whole.

    Raises:
        InputError: the source cannot be opened, or failed.
        BundleError, BackendError: a frame cannot be predicted.
        OutputError: what is drawn or printed cannot be written.
    """
    smoother = Smoother(half_life) if half_life else None
    done = 0
    failure: MGEError | None = None
    with ExitStack() as stack:
        video = stack.enter_context(Video(source, max_pixels=max_pixels))
        writer = stack.enter_context(video_writer(save)) if save else None
        try:
            for frame in video:
                with interrupt.held():  # a frame is predicted, printed and drawn, or none of it
                    prediction = pipeline.predict(frame.image)
                    if smoother is not None:
                        prediction = smoother.add(prediction, frame.seconds)
                    done += 1
                    interrupt.consequence = f"{done} frames were predicted"
                    echo(_json(video.name, frame, prediction, top_k) if as_json else _line(frame, prediction))
                    if writer is not None:
                        writer.add(_drawn(frame, prediction), frame.seconds)
        except KeyboardInterrupt:
            if not interrupt.requested:
                raise
        except MGEError as error:
            if not done:
                raise
            failure = error  # what was drawn until now stays
    note(
        f"{done} frames predicted of {video.read} read; {video.dropped} dropped for newer ones, {video.damaged} "
        f"damaged, connected again {video.reconnected} times" + (f"; drawn in {save}" if save else "")
    )
    if failure is not None:
        raise failure
    return not interrupt.requested or video.live


def _line(frame: Frame, prediction: Prediction) -> str:
    name, share = headline(prediction)
    return printable(f"{frame.seconds:9.3f} s  {share:>6}  {name}")


def _json(name: str, frame: Frame, prediction: Prediction, top_k: int) -> str:
    wall = datetime.fromtimestamp(frame.wall, timezone.utc).isoformat(timespec="milliseconds")
    times = {"frame": frame.number, "seconds": round(frame.seconds, 3), "wall": wall}
    return json.dumps({**times, **json_record(name, prediction, top_k)})


def _drawn(frame: Frame, prediction: Prediction) -> np.ndarray:
    """The frame with what each expert saw, and the class in a strip below."""
    height, width = frame.image.shape[:2]
    image = draw_boxes(frame.image, prediction.boxes, min(max(width, height), _LONGEST))
    strip = max(image.height // 14, 24)
    canvas = Canvas.blank(image.width, image.height + strip)
    canvas.paste(image, 0, 0)
    text = "  ".join(reversed(headline(prediction)))
    canvas.text(strip // 3, image.height + strip // 6, text, strip * 2 // 3, width=image.width - strip)
    return np.asarray(canvas.image)
