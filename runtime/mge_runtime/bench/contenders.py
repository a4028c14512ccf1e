"""What the runtime itself brings to the bench: the chain, pictures to predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mge_runtime.bench.contender import MILLISECONDS
from mge_runtime.bench.rounds import Stepped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.pipeline import Pipeline

__all__ = ["ChainContender", "PhotoContender"]


class ChainContender(Stepped):
    """The whole chain: frames in memory to answer tensors on the host. Its steps are the executor's.

    Args:
        pipeline: opened.
        frames: uint8 [B, S, S, 3].
    """

    name = "chain"
    unit = MILLISECONDS

    def __init__(self, pipeline: Pipeline, frames: NDArray[np.uint8]) -> None:
        self._pipeline = pipeline
        self._frames = frames
        self.steps_ms = {}

    def run(self) -> None:
        """Run the chain."""
        self.steps_ms = dict(self._pipeline.run_timed(self._frames).step_ms)

    def close(self) -> None:
        """The pipeline is its owner's."""


class PhotoContender(Stepped):
    """The bytes of picture files to predictions, one batch after the other: decoding is not hidden.

    Its steps are decoding, preprocessing and the executor's, summed over the batch.
    """

    name = "JPEG to Prediction"
    unit = MILLISECONDS

    def __init__(self, pipeline: Pipeline, files: Sequence[bytes]) -> None:
        self._pipeline = pipeline
        self._files = files
        self.steps_ms = {}

    def run(self) -> None:
        """Answer the files."""
        self.steps_ms = {}
        for prediction in self._pipeline.predict_batch(self._files):
            for step, ms in prediction.timings_ms.items():
                self.steps_ms[step] = self.steps_ms.get(step, 0.0) + ms

    def close(self) -> None:
        """The pipeline is its owner's."""
