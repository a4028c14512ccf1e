"""The pipeline: from images to predictions, for one bundle."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from mge_runtime.backends import Choice, Streams, choose, open_executor
from mge_runtime.batching import batches, prefetch
from mge_runtime.bundle import Bundle
from mge_runtime.calibrated import Calibrated
from mge_runtime.chain import Chain, Exit, ExitPolicy, ImageResult, by_image, resolve_exit
from mge_runtime.conformal import EXITS, Judgment
from mge_runtime.decode import MAX_PIXELS, ImageSource, load_decoders, open_image
from mge_runtime.errors import BackendError, BundleError, InputError
from mge_runtime.fields import JsonValue
from mge_runtime.manifest import Manifest
from mge_runtime.prediction import Prediction
from mge_runtime.preprocess import Viewport, compose_boxes, to_frame

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.backends.base import Array, ExecutorResult


_Source = TypeVar("_Source", bound=ImageSource)


@dataclass(frozen=True)
class Prepared:
    """One image on its way into a batch; made by `Pipeline.prepare`."""

    frame: NDArray[np.uint8]  # [S, S, 3]
    viewport: Viewport
    timings_ms: dict[str, float]


class Pipeline:
    """Predicts images with the chain of one bundle; made by `Pipeline.open`, a context manager.

    A pipeline computes in the thread that calls it and is used from one thread at a time (a call from a second one is
    refused); several threads share one through a `Batcher`. Only decoding uses threads of its own, in `predict_iter`.

    Opened with several streams it may be used from that many threads at a time (further calls wait), and `predict_iter`
    computes that many batches at once in threads of its own. On a GPU a pipeline has one stream: one run fills the
    device, and its memory and CUDA graphs belong to one run at a time. Close it there: device memory is not Python's.
    """

    def __init__(
        self,
        manifest: Manifest,
        choice: Choice,
        chain: Chain,
        calibrated: Calibrated,
        *,
        exit: Exit,
        max_pixels: int,
    ) -> None:
        self._max_pixels = max_pixels
        self.manifest: Manifest = manifest
        self.calibrated: Calibrated = calibrated  # temperatures and exits
        self.exit: Exit = exit  # of predictions that name none
        self.choice: Choice = choice  # the backend and device that run, and why not others
        self._noted = False
        self._chain: Chain | None = chain
        self.streams: int = chain.streams  # runs of the chain that may be in flight at once
        self.max_batch: int | None = chain.max_batch  # most frames in one run of the chain; None: no limit
        self._free = threading.Semaphore(self.streams)
        self._closing = threading.Lock()
        load_decoders()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        device: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        streams: Streams = 1,
        cuda_graphs: bool = True,
        exit: Exit = "never",
        calibration: bool = True,
        mmap: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> Pipeline:
        """Open a bundle and make its chain ready to run, with the best that is ready here: engines are not built.

        Where engines are missing that would run, the logger "mge_runtime" gets one line with the command to build them.

        Args:
            path: the `mge.plan` file, or `hf://owner/name[@revision][/file]` on the Hugging Face Hub (extra `hf`).
            device: "auto", "cpu" or "cuda:0".
            backend: "auto", "onnxruntime", "tensorrt" or "tensorrt-rtx".
            threads: processors to compute with; None: all that this process may use.
            streams: images (or batches) computed at once by `predict_iter`, sharing the processors. 1 predicts one
                image soonest; "auto" predicts the most images a second, at the price of several runs' memory.
            cuda_graphs: on a GPU, whether to run the chain as CUDA graphs where that is possible.
            exit: where predictions stop that do not say it themselves: "never" for the whole chain, "calibrated" to
                stop each image as soon as its logits are as confident as the calibration asks for, or the number of
                the graph to stop after, from 1.
            calibration: whether to use the bundle's calibration; without, it is not even read, so that one which is
                damaged can be made anew.
            mmap: whether the weights may be mapped from the file. A file that is overwritten in place (`cp`, `scp`)
                while a run is on may then end the process; outside a run the next one refuses to predict. False loads
                them: opening takes up to twice the largest graph's weights more memory, running about none.
            max_pixels: the most that an image may have, as for `open_image`.

        Raises:
            BundleError: the file is missing, no bundle, damaged or of a newer schema, or its calibration is damaged.
            BackendError: the device or the backend is unknown or cannot run here, or there is no such exit.
        """
        if threads is not None and threads < 1:
            raise BackendError(f"asked to compute with {threads} threads; expected at least 1, or None for all")
        if streams != "auto" and streams < 1:
            raise BackendError(f'asked for {streams} streams; expected at least 1, or "auto"')
        with Bundle.open(path, maps_weights=mmap) as bundle:
            choice = choose(device, backend, bundle=bundle)
            choice.warn_of_missing_engines()
            calibrated = _calibrated(bundle) if calibration else Calibrated()
            resolve_exit(exit, calibrated, bundle.manifest)
            executor = open_executor(choice, bundle, threads=threads, streams=streams, cuda_graphs=cuda_graphs)
            chain = Chain(bundle, executor)
            return cls(bundle.manifest, choice, chain, calibrated, exit=exit, max_pixels=max_pixels)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the model; closing twice does nothing.

        Raises:
            BackendError: another thread is using the pipeline.
        """
        with self._closing, ExitStack() as stack:
            if self._chain is not None:
                chains = [stack.enter_context(self._lent()) for _ in range(self.streams)]
                chains[0].close()  # there is one, lent once for each stream: no run is in flight now
                self._chain = None

    def predict(self, source: ImageSource, *, exit: Exit | None = None) -> Prediction:
        """Predict one image.

        Args:
            source: a path, the bytes of an image file, a binary file object, a Pillow image, or a uint8 RGB array
                [H, W, 3].
            exit: as for `open`; None: what was said there.

        Raises:
            InputError: the image cannot be read.
            BundleError: the file was overwritten in place, or its graphs are not what its manifest says.
            BackendError: the pipeline is closed or in use, there is no such exit, or a graph failed or an output is
                not finite.
        """
        return self.predict_batch([source], exit=exit)[0]

    def predict_batch(self, sources: Sequence[ImageSource], *, exit: Exit | None = None) -> list[Prediction]:
        """Predict several images in one run of the chain, in their order; in several where they exceed `max_batch`.

        With calibrated exits images that are done leave the run, the others go on.

        Raises:
            InputError: one of the images cannot be read; none is predicted then.
            BundleError, BackendError: as for `predict`.
        """
        return self.predict_prepared([self.prepare(source) for source in sources], exit=exit)

    def prepare(self, source: ImageSource) -> Prepared:
        """Decode one image for `predict_prepared`; safe in any thread, also while the chain runs.

        Raises:
            InputError: as for `predict`.
        """
        start = time.perf_counter()
        image = open_image(source, self._max_pixels)
        decoded = time.perf_counter()
        frame, viewport = to_frame(image, self.manifest.preprocess)
        done = time.perf_counter()
        timings = {"decode": (decoded - start) * 1e3, "preprocess": (done - decoded) * 1e3}
        return Prepared(frame, viewport, timings)

    def predict_prepared(self, images: Sequence[Prepared], *, exit: Exit | None = None) -> list[Prediction]:
        """As `predict_batch`, for images that were prepared elsewhere: a server decodes in threads of its own."""
        policy = self._policy(exit)
        return self._predict(images, policy) if images else []

    def predict_iter(
        self, sources: Iterable[_Source], *, batch: int = 1, workers: int = 2, exit: Exit | None = None
    ) -> Iterator[tuple[_Source, Prediction | InputError]]:
        """Predict many images, decoding the next ones while the chain computes.

        Memory stays flat: at most 2 * `workers` + `batch` frames are decoded ahead; with several streams at most twice
        that many batches are taken. Where the iterator is closed early, no thread is left behind.

        Args:
            sources: any number of what `predict` takes.
            batch: images in one run of the chain, at most `max_batch` of them; it may hold fewer.
            workers: threads that decode; several streams decode for themselves instead.
            exit: as for `predict`.

        Yields:
            Each source with its prediction or, for an image that cannot be read, the error, in the order of `sources`.

        Raises:
            BundleError, BackendError: as for `predict`, or `batch` or `workers` is below 1.
        """
        if batch < 1 or workers < 1:
            raise BackendError(f"asked for batches of {batch} and {workers} workers; expected at least 1 of each")
        self._require_open()
        policy = self._policy(exit)
        batch = min(batch, self.max_batch or batch)
        if self.streams > 1:
            return self._iterate_in_streams(sources, batch, policy)
        return self._iterate(sources, batch, workers, policy)

    def run(
        self, frames: Array, *, exit: Exit = "never", outputs: Collection[str] | None = None
    ) -> Mapping[str, Array]:
        """Run the chain on frames that are ready, without any report: for parity checks and benchmarks.

        Args:
            frames: uint8 RGB [B, S, S, 3], C-contiguous.
            exit: as for `open`.
            outputs: tensors to return beside the logits; default: those that a prediction reports.

        Returns:
            Tensors by name, float32, the first axis is the batch; those of graphs that did not run are left out. With
            calibrated exits a tensor has one row for each frame that ran so far, in order.

        Raises:
            InputError: `frames` has another type or shape.
            BundleError, BackendError: as for `predict`, there is no such output, or more frames than `max_batch`.
        """
        return self.run_timed(frames, exit=exit, outputs=outputs).tensors

    def run_timed(
        self, frames: Array, *, exit: Exit = "never", outputs: Collection[str] | None = None
    ) -> ExecutorResult:
        """As `run`, with the milliseconds of each step beside the tensors."""
        size = self.manifest.preprocess.size
        is_array = isinstance(cast(object, frames), np.ndarray)
        if not is_array or frames.dtype != np.uint8 or frames.shape[1:] != (size, size, 3) or not len(frames):
            found = f"{frames.dtype} {list(frames.shape)}" if is_array else type(frames).__name__
            raise InputError(f"cannot run frames of type {found}; expected a uint8 array [B, {size}, {size}, 3]")
        return self._run(frames, self._policy(exit), outputs)

    def report(self) -> dict[str, JsonValue]:
        """Memory, CUDA graphs and copies of a chain on a GPU, as plain values; empty on a CPU.

        Raises:
            BackendError: the pipeline is closed.
        """
        return self._require_open().report()

    def _run(self, frames: Array, policy: ExitPolicy, outputs: Collection[str] | None = None) -> ExecutorResult:
        with self._lent() as chain:
            return chain.run(frames, graphs=policy.graphs, outputs=outputs, exits=policy.exits)

    def _policy(self, exit: object) -> ExitPolicy:
        policy = resolve_exit(self.exit if exit is None else exit, self.calibrated, self.manifest)
        if (policy.exits or self.calibrated.conformal) and not self._noted:
            self._noted = True  # once is enough
            if note := self.calibrated.note(self.choice.backend, self.choice.device):
                logging.getLogger("mge_runtime").warning(note)
        return policy

    def _predict(self, prepared: Sequence[Prepared], policy: ExitPolicy) -> list[Prediction]:
        if self.max_batch is not None and len(prepared) > self.max_batch:
            return [found for group in batches(prepared, self.max_batch) for found in self._predict(group, policy)]
        result = self._run(np.stack([item.frame for item in prepared]), policy)
        pairs = zip(by_image(result, self.manifest.graphs), prepared, strict=True)
        return [self._prediction(image, item, EXITS if policy.exits else image.logits) for image, item in pairs]

    def _prediction(self, image: ImageResult, item: Prepared, run: str) -> Prediction:
        manifest, tensors = self.manifest, image.tensors
        views = [view for view in manifest.views if view.logits in tensors]
        crops = [tensors[view.box] for view in views if view.box is not None]
        timings = {**item.timings_ms, **image.step_ms}
        temperature = self.calibrated.temperatures.get(image.logits)
        conformal, logits = self.calibrated.conformal, tensors[image.logits]
        judgment = conformal.judge(logits, temperature or 1.0, run) if conformal else Judgment()
        return Prediction(
            logits,
            manifest.class_names,
            expert_logits=np.stack([tensors[view.logits] for view in views]),
            gate=tensors.get(manifest.gate or ""),
            boxes=compose_boxes(np.reshape(crops, (-1, 4)), item.viewport, manifest.crops),
            heatmaps=tuple(tensors[view.heatmap] for view in views),
            width=item.viewport.width,
            height=item.viewport.height,
            timings_ms={**timings, "total": sum(timings.values())},
            temperature=temperature,
            **judgment._asdict(),
        )

    def _iterate(
        self, sources: Iterable[_Source], batch: int, workers: int, policy: ExitPolicy
    ) -> Generator[tuple[_Source, Prediction | InputError]]:
        """Decode in threads, predict in the caller's."""
        ready = prefetch(self._try_prepare, sources, threads=workers, ahead=2 * workers + batch)
        with closing(ready):
            for group in batches(ready, batch):
                yield from self._predict_group(group, policy)

    def _iterate_in_streams(
        self, sources: Iterable[_Source], batch: int, policy: ExitPolicy
    ) -> Generator[tuple[_Source, Prediction | InputError]]:
        """Decode and predict a batch in each of several threads."""

        def predict(group: list[_Source]) -> list[tuple[_Source, Prediction | InputError]]:
            return self._predict_group([(source, self._try_prepare(source)) for source in group], policy)

        streams = self.streams
        with closing(prefetch(predict, batches(sources, batch), threads=streams, ahead=2 * streams)) as done:
            for _, predictions in done:
                yield from predictions

    def _try_prepare(self, source: ImageSource) -> Prepared | InputError:
        try:
            return self.prepare(source)
        except InputError as error:
            # The traceback would keep the decoder's buffers alive for as long as the caller keeps the error.
            return error.with_traceback(None)

    def _predict_group(
        self, group: list[tuple[_Source, Prepared | InputError]], policy: ExitPolicy
    ) -> list[tuple[_Source, Prediction | InputError]]:
        good = [item for _, item in group if isinstance(item, Prepared)]
        found = iter(self._predict(good, policy) if good else [])
        return [(source, item if isinstance(item, InputError) else next(found)) for source, item in group]

    @contextmanager
    def _lent(self) -> Generator[Chain]:
        """Lend the chain to as many threads as it has streams."""
        if not self._free.acquire(blocking=self.streams > 1):
            raise BackendError("the pipeline is in use by another thread; share it through a Batcher, or open another")
        try:
            yield self._require_open()
        finally:
            self._free.release()

    def _require_open(self) -> Chain:
        if self._chain is None:
            raise BackendError("the pipeline is closed; open the bundle again with Pipeline.open")
        return self._chain


def _calibrated(bundle: Bundle) -> Calibrated:
    calibration = bundle.calibration()
    if calibration is None:
        return Calibrated()
    try:
        return Calibrated.from_values(calibration.values, bundle.manifest)
    except BundleError as error:
        raise BundleError(f"{bundle.path}: {error}") from error
