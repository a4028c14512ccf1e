"""What a bundle predicts for labeled images, after each graph of its chain, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mge_calibration.images import LabeledImage, short_digest, split_by_content
from mge_runtime.errors import InputError
from mge_runtime.pipeline import Pipeline
from mge_runtime.pool import batches, map_ahead

if TYPE_CHECKING:
    from mge_runtime.chain import Exit

__all__ = ["TEMPERATURE_SHARE", "ChainLogits", "Times", "collect", "measure_times"]

TEMPERATURE_SHARE = 1 / 3  # of one folder's images; thresholds need more of them than a temperature does
_BATCH = 8  # frames in one run where runs are not computed side by side
_DECODERS = 2  # threads


@dataclass(frozen=True, eq=False)
class ChainLogits:
    """Logits of N images after each graph."""

    images: tuple[LabeledImage, ...]  # N, those that could be read
    labels: NDArray[np.int64]  # [N]
    logits: Mapping[str, NDArray[np.float32]]  # tensor -> [N, C], in the order of the chain; the last is the chain's
    unreadable: int = 0  # images passed over

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray[np.integer]) -> ChainLogits:
        """The same for some of the images."""
        images = tuple(self.images[int(row)] for row in rows)
        return ChainLogits(images, self.labels[rows], {name: values[rows] for name, values in self.logits.items()})

    def split(self, known: frozenset[str], seed: int) -> tuple[ChainLogits, ChainLogits]:
        """Split by a seeded hash of the images: a third for temperatures, the others for exits.

        Args:
            known: digests of images that may set temperatures alone; they count towards their third.
            seed: another one gives another split.
        """
        free = [image for image in self.images if short_digest(image.sha256) not in known]
        wanted = round(TEMPERATURE_SHARE * len(self)) - (len(self) - len(free))
        testing = {i.sha256 for i in split_by_content(free, max(0.0, wanted / max(len(free), 1)), seed)[1]}
        apart = np.array([image.sha256 in testing for image in self.images])
        return self.take(np.flatnonzero(~apart)), self.take(np.flatnonzero(apart))


@dataclass(frozen=True)
class Times:
    """Measured milliseconds of one image through the chain, decoding not counted."""

    images: int  # that were timed
    stops: tuple[float, ...]  # median over images, by the graph they are stopped after; the last is the full chain
    full: float  # mean over images of the full chain
    exits: float | None  # the same with calibrated exits; None: there are none


def collect(
    pipeline: Pipeline,
    images: Sequence[LabeledImage],
    *,
    problem: Callable[[InputError], None],
    step: Callable[[], None] = lambda: None,
) -> ChainLogits:
    """Run every image through the whole chain, and keep the logits of each graph.

    Args:
        pipeline: with several streams, that many images are computed side by side.
        images: to run.
        problem: is told of each image that cannot be read; it is passed over.
        step: is called after every image.

    Raises:
        InputError: no image could be read.
        BackendError: a graph failed, or logits are not finite.
    """
    names = [graph.logits for graph in pipeline.manifest.graphs]
    kept: list[LabeledImage] = []
    rows: list[NDArray[np.float32]] = []  # [graphs, C] each
    for image, row in _run(pipeline, images, names):
        step()
        if isinstance(row, InputError):
            problem(row)
            continue
        kept.append(image)
        rows.append(row)
    if not rows:
        raise InputError(
            f"none of the {len(images)} images could be read; expected photographs such as .jpg or .png files"
        )
    logits = dict(zip(names, np.stack(rows, 1), strict=True))
    labels = np.array([image.label for image in kept], np.int64)
    return ChainLogits(tuple(kept), labels, logits, unreadable=len(images) - len(kept))


def _run(
    pipeline: Pipeline, images: Sequence[LabeledImage], names: Sequence[str]
) -> Iterator[tuple[LabeledImage, NDArray[np.float32] | InputError]]:
    def load(image: LabeledImage) -> NDArray[np.uint8] | InputError:
        try:
            return pipeline.frame(image.path)
        except InputError as error:
            return error.with_traceback(None)  # the traceback would keep the decoder's buffers

    def run(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        tensors = pipeline.run(np.stack(frames), exit="never", outputs=names)
        return np.stack([tensors[name] for name in names], 1).astype(np.float32)

    def predict(image: LabeledImage) -> NDArray[np.float32] | InputError:
        frame = load(image)
        return frame if isinstance(frame, InputError) else run([frame])[0]

    if pipeline.streams > 1:
        with closing(map_ahead(predict, images, threads=pipeline.streams, ahead=2 * pipeline.streams)) as results:
            yield from results
        return
    size = min(_BATCH, pipeline.max_batch or _BATCH)
    with closing(map_ahead(load, images, threads=_DECODERS, ahead=2 * size)) as loaded:
        for group in batches(loaded, size):
            frames = [frame for _, frame in group if not isinstance(frame, InputError)]
            found = iter(run(frames) if frames else [])
            for image, frame in group:
                yield image, frame if isinstance(frame, InputError) else next(found)


def measure_times(pipeline: Pipeline, frames: Sequence[NDArray[np.uint8]], *, rounds: int = 3) -> Times:
    """Time the chain frame by frame, stopped after each graph and, where it has them, with calibrated exits.

    All ways are taken in turn on every frame, from round to round in another order, so that a machine that slows down
    slows all of them.

    Args:
        pipeline: opened with one stream.
        frames: uint8 RGB [S, S, 3].
        rounds: in which each frame is timed; another one before is not.

    Raises:
        BackendError: a graph failed.
    """
    count = len(pipeline.manifest.graphs)
    ways: list[Exit] = [*range(1, count), "never", *(["calibrated"] if pipeline.calibrated.has_exits else [])]
    taken = np.zeros((rounds, len(frames), len(ways)))
    for turn in range(-1, rounds):
        for number, frame in enumerate(frames):
            for place in range(len(ways)):
                way = (place + number + turn) % len(ways)
                start = time.perf_counter()
                pipeline.run(frame[None], exit=ways[way], outputs=[])
                if turn >= 0:
                    taken[turn, number, way] = (time.perf_counter() - start) * 1e3
    usual = np.median(taken, axis=0)  # [frames, ways]
    means = usual.mean(0).tolist()
    stops = tuple(np.median(usual[:, :count], axis=0).tolist())
    return Times(len(frames), stops, means[count - 1], means[count] if len(ways) > count else None)
