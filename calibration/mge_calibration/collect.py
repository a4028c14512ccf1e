"""What a bundle answers on labelled images, after each graph of its chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge_calibration.folder import LabelledImage
from mge_runtime.errors import InputError
from mge_runtime.manifest import Manifest
from mge_runtime.pipeline import Pipeline
from mge_runtime.pool import batches, map_ahead

__all__ = ["Answers", "answer_names", "collect"]

_BATCH = 8  # frames in one run where runs are not computed side by side
_DECODERS = 2  # threads


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits of N images after each graph."""

    images: tuple[LabelledImage, ...]  # N, those that could be read
    labels: NDArray[np.int64]  # [N]
    logits: Mapping[str, NDArray[np.float32]]  # answer tensor -> [N, C], in the order of the chain; the last is whole
    unreadable: int = 0  # images passed over

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray[np.integer]) -> Answers:
        """The same answers for some of the images."""
        images = tuple(self.images[int(row)] for row in rows)
        return Answers(images, self.labels[rows], {name: values[rows] for name, values in self.logits.items()})


def answer_names(manifest: Manifest) -> tuple[str, ...]:
    """The answer tensor of every graph, in the order they run."""
    return tuple(graph.logits for graph in manifest.graphs)


def collect(
    pipeline: Pipeline,
    images: Sequence[LabelledImage],
    *,
    problem: Callable[[InputError], None],
    step: Callable[[], None] = lambda: None,
) -> Answers:
    """Answer every image with the whole chain, and keep what each graph said.

    Args:
        pipeline: with several streams, that many images are computed side by side.
        images: to answer.
        problem: is told of each image that cannot be read; it is passed over.
        step: is called after every image.

    Raises:
        InputError: no image could be read.
        BackendError: a graph failed, or an answer is not finite.
    """
    names = answer_names(pipeline.manifest)
    kept: list[LabelledImage] = []
    rows: list[NDArray[np.float32]] = []  # [answers, C] each
    for image, row in _answered(pipeline, images, names):
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
    stacked = np.stack(rows, 1)  # [answers, N, C]
    labels = np.array([image.label for image in kept], np.int64)
    logits = dict(zip(names, stacked, strict=True))
    return Answers(tuple(kept), labels, logits, unreadable=len(images) - len(kept))


def _answered(
    pipeline: Pipeline, images: Sequence[LabelledImage], names: tuple[str, ...]
) -> Iterator[tuple[LabelledImage, NDArray[np.float32] | InputError]]:
    def load(image: LabelledImage) -> NDArray[np.uint8] | InputError:
        try:
            return pipeline.frame(image.path)
        except InputError as error:
            return error.with_traceback(None)  # the traceback would keep the decoder's buffers

    def run(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        tensors = pipeline.run(np.stack(frames), exit="never", outputs=names)
        return np.stack([tensors[name] for name in names], 1).astype(np.float32)

    def answer(image: LabelledImage) -> NDArray[np.float32] | InputError:
        frame = load(image)
        return frame if isinstance(frame, InputError) else run([frame])[0]

    if pipeline.streams > 1:
        with closing(map_ahead(answer, images, threads=pipeline.streams, ahead=2 * pipeline.streams)) as results:
            yield from results
        return
    size = min(_BATCH, pipeline.max_batch or _BATCH)
    with closing(map_ahead(load, images, threads=_DECODERS, ahead=2 * size)) as loaded:
        for group in batches(loaded, size):
            frames = [frame for _, frame in group if not isinstance(frame, InputError)]
            answers = iter(run(frames) if frames else [])
            for image, frame in group:
                yield image, frame if isinstance(frame, InputError) else next(answers)
