"""The logits of labeled images after each graph of a chain."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mge_calibration.images import LabeledImage, short_digest
from mge_runtime.batching import prefetch
from mge_runtime.errors import InputError
from mge_runtime.pipeline import Pipeline

FEWEST = 50  # images that may set temperatures
TEMPERATURE_SHARE = 1 / 3  # of one folder's images; thresholds need more of them than a temperature does
_DECODERS = 2  # threads at least


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

    def split(
        self, known: frozenset[str], seed: int, share: float = TEMPERATURE_SHARE
    ) -> tuple[ChainLogits, ChainLogits]:
        """Split into a third for temperatures and the others for exits, by a seeded hash of each image's bytes.

        Args:
            known: digests of images that may set temperatures alone; they count toward their third.
            seed: another one gives another split.
            share: of the first part, instead of a third.
        """
        hashes = [image.sha256 for image in self.images]
        free = [row for row, sha256 in enumerate(hashes) if short_digest(sha256) not in known]
        free.sort(key=lambda row: hashlib.sha256(f"{seed}:{hashes[row]}".encode()).digest())
        wanted = round(share * len(self)) - (len(self) - len(free))
        testing = np.sort(np.array(free[max(0, wanted) :], np.intp))
        return self.take(np.setdiff1d(np.arange(len(self)), testing)), self.take(testing)


def collect(
    pipeline: Pipeline,
    images: Sequence[LabeledImage],
    *,
    problem: Callable[[InputError], None],
    step: Callable[[], None] = lambda: None,
) -> ChainLogits:
    """Run the whole chain on every image, each by itself as `Pipeline.predict` does, and keep the logits.

    Args:
        pipeline: opened with any number of streams; as many images are computed side by side.
        images: to run.
        problem: is told of each image that cannot be read; it is passed over.
        step: is called after every image.

    Raises:
        InputError: no image could be read.
        BackendError: a graph failed, or logits are not finite.
    """
    names = [graph.logits for graph in pipeline.manifest.graphs]

    def load(image: LabeledImage) -> NDArray[np.uint8] | InputError:
        try:
            return pipeline.prepare(image.path).frame
        except InputError as error:
            return error.with_traceback(None)  # the traceback would keep the decoder's buffers

    def run(loaded: tuple[LabeledImage, NDArray[np.uint8] | InputError]) -> NDArray[np.float32] | InputError:
        _, frame = loaded
        if isinstance(frame, InputError):
            return frame
        tensors = pipeline.run(frame[None], exit="never", outputs=names)
        return np.concatenate([tensors[name] for name in names]).astype(np.float32)

    kept: list[LabeledImage] = []
    rows: list[NDArray[np.float32]] = []  # [graphs, C] each
    streams = pipeline.streams
    decoders = max(_DECODERS, streams)
    with (
        closing(prefetch(load, images, threads=decoders, ahead=2 * decoders)) as loaded,
        closing(prefetch(run, loaded, threads=streams, ahead=2 * streams)) as found,
    ):
        for (image, _), row in found:
            step()
            if isinstance(row, InputError):
                problem(row)
            else:
                kept.append(image)
                rows.append(row)
    if not rows:
        raise InputError(f"none of the {len(images)} images could be read; expected files such as .jpg or .png")
    logits = dict(zip(names, np.stack(rows, 1), strict=True))
    labels = np.array([image.label for image in kept], np.int64)
    return ChainLogits(tuple(kept), labels, logits, unreadable=len(images) - len(kept))
