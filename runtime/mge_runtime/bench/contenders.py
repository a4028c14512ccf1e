"""What the runtime itself brings to the bench: the chain, its bare trunks, pictures to predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING

from mge_runtime.backends import open_backend
from mge_runtime.backends.staged import StagedBackend
from mge_runtime.bench.contender import MILLISECONDS
from mge_runtime.bench.parts import PartBundle, TrunkChainBundle
from mge_runtime.bench.rounds import Stepped
from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mge_runtime.backends import Choice
    from mge_runtime.backends.base import Array
    from mge_runtime.pipeline import Pipeline

__all__ = ["ChainContender", "PartsContender", "PhotoContender", "TrunkChainContender"]


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
        self.steps_ms = dict(self._pipeline.run_timed(self._frames).stage_ms)

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


class PartsContender(Stepped):
    """Parts of the stages in turn, each on the image that its stage reads, on a backend that runs stage by stage.

    Args:
        name: of the contender.
        parts: opens the parts.
        choice: what runs the chain.
        path: the bundle.
        images: what each stage reads, by the tensor's name.
        threads: as for `Pipeline.open`.
        mmap: likewise.

    Raises:
        BackendError: the backend runs no stages by themselves, or no trunk can be told.
        BundleError: the bundle is damaged.
    """

    unit = MILLISECONDS

    def __init__(
        self,
        name: str,
        parts: type[PartBundle],
        choice: Choice,
        path: str,
        images: Mapping[str, Array],
        threads: int | None,
        *,
        mmap: bool = True,
    ) -> None:
        self.name = name
        self.steps_ms = {}
        with parts.open(path, maps_weights=mmap) as bundle:
            backend = open_backend(choice, bundle, threads=threads)
            if not isinstance(backend, StagedBackend):
                raise BackendError(f"{choice} does not run stages by themselves")
            self._backend = backend
            self.trunks = bundle.trunks
            self.stages = [stage.name for stage in bundle.manifest.stages]
            inputs = {stage.name: stage.inputs[0].name for stage in bundle.manifest.stages}
            self._feeds = {name: {tensor: backend.upload(images[tensor])} for name, tensor in inputs.items()}
            self._runners = backend.open_stages(bundle)

    def run(self) -> None:
        """Run every part."""
        for name, runner in self._runners.items():
            start = perf_counter()
            runner.run(self._feeds[name])
            self._backend.synchronize()
            self.steps_ms[name] = (perf_counter() - start) * 1e3

    def close(self) -> None:
        """Release every part."""
        for runner in self._runners.values():
            runner.close()
        self._runners = {}


class TrunkChainContender(Stepped):
    """The bare trunks as one segment on a device, behind the copy of the frames and `ingest`; nothing is copied out.

    Raises:
        BackendError: the backend cannot run ONNX graphs, or no trunk can be told.
        BundleError: the bundle is damaged.
    """

    unit = MILLISECONDS

    def __init__(self, name: str, choice: Choice, path: str, frames: NDArray[np.uint8], *, mmap: bool) -> None:
        self.name = name
        self.steps_ms = {}
        if choice.backend != "onnxruntime":
            raise BackendError(f"{choice} runs engines, and none was built for the bare trunks; ONNX Runtime runs them")
        with ExitStack() as stack, TrunkChainBundle.open(path, maps_weights=mmap) as bundle:
            self._frames = frames
            self.trunks = bundle.trunks
            self._executor = open_backend(choice, bundle).open_chain(bundle)
            stack.callback(self._executor.close)
            self._executor.run(frames, 1, ())
            self._close: Callable[[], None] = stack.pop_all().close

    def run(self) -> None:
        """Run every trunk."""
        self.steps_ms = dict(self._executor.run(self._frames, 1, ()).times_ms)

    def close(self) -> None:
        """Release the device's memory."""
        self._close()
