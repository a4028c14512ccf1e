"""Threads around a pipeline: work prefetched for a loop, and images of many callers in common runs of the chain."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from mge_runtime.errors import BackendError, InputError

if TYPE_CHECKING:
    from mge_runtime.decode import ImageSource
    from mge_runtime.pipeline import Pipeline, Prepared
    from mge_runtime.prediction import Prediction


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def prefetch(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int, ahead: int
) -> Generator[tuple[_Item, _Result]]:
    """Apply a function to items in threads, and yield each item with its result, in order.

    `Executor.map` takes all items at once; here at most `ahead` are taken before the one that is asked for, so that
    memory stays flat. Where the generator is closed early, or an item or the function raises, no thread is left behind.
    """
    pending: deque[tuple[_Item, Future[_Result]]] = deque()
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="mge-ahead")
    try:
        while True:
            for item in islice(remaining, ahead - len(pending)):
                pending.append((item, pool.submit(function, item)))
            if not pending:
                return
            item, future = pending.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(items: Iterable[_Item], size: int) -> Generator[list[_Item]]:
    """Lists of `size` items, the last of what is left."""
    remaining = iter(items)
    while group := list(islice(remaining, size)):
        yield group


class _Ready(NamedTuple):
    """A decoded image that waits for a run."""

    image: Prepared
    future: Future[Prediction]
    since: float  # `time.monotonic`


class Batcher:
    """Predicts images as they come, from any thread, with one pipeline, also on a GPU; close it.

        with closing(Batcher(Pipeline.open("mge.plan"))) as batcher:
            ...
            prediction = batcher.submit(image).result()     # in any thread

    A run of the chain begins as soon as `batch` images are decoded, the oldest has waited for `wait` seconds, or no
    other image is being decoded, so that an image alone waits for nobody. While the chain computes the next batch
    gathers. As many runs are in flight as the pipeline has streams.

    Args:
        pipeline: open; closed with the batcher.
        batch: most images in one run; at most the pipeline's `max_batch` of them are taken.
        wait: seconds that a decoded image waits at most for others that are being decoded.
        decoders: threads that decode; each may need the memory of one image, see `open_image`.
        on_run: is called in the computing thread with the number of images of each run.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        batch: int = 8,
        wait: float = 0.005,
        decoders: int = 2,
        on_run: Callable[[int], None] = lambda _: None,
    ) -> None:
        if batch < 1 or decoders < 1:
            raise BackendError(f"asked for batches of {batch} and {decoders} decoders; expected at least 1 of each")
        self.pipeline = pipeline
        self.batch: int = min(batch, pipeline.max_batch or batch)
        self._wait = wait
        self._on_run = on_run
        self._changed = threading.Condition()  # guards the three below
        self._ready: deque[_Ready] = deque()
        self._sources: dict[Future[Prediction], ImageSource] = {}  # whose decoding has not begun
        self._decoding = 0  # images submitted and not yet decoded
        self._closed = False
        self._began: dict[int, float] = {}  # `time.monotonic` of runs that are being computed, by thread
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="mge-decode")
        self._runners = [threading.Thread(target=self._run, name=f"mge-run-{n}") for n in range(pipeline.streams)]
        for thread in self._runners:
            thread.start()

    @property
    def running(self) -> float:
        """Seconds that the longest of the runs that are being computed has taken so far; 0 without one."""
        return max((time.monotonic() - began for began in list(self._began.values())), default=0.0)

    def submit(self, source: ImageSource) -> Future[Prediction]:
        """Take an image; its future may be cancelled until its run begins.

        Returns:
            The prediction to be, or what `Pipeline.predict` raises of this image: where a run of several fails, each of
            them is run alone.

        Raises:
            BackendError: the batcher is closed.
        """
        future: Future[Prediction] = Future()
        with self._changed:
            if self._closed:
                raise BackendError("the batcher is closed; expected an open one")
            self._decoding += 1
            self._sources[future] = source
            self._decoders.submit(self._decode, future)
        # One that is cancelled is let go at once; the decoders may reach it much later.
        future.add_done_callback(lambda done: self._sources.pop(done, None))
        return future

    def close(self) -> None:
        """Finish what was submitted, then close the pipeline; closing twice does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._decoders.shutdown()
        for thread in self._runners:
            thread.join()
        self.pipeline.close()

    def _decode(self, future: Future[Prediction]) -> None:
        image: Prepared | None = None
        try:
            if (source := self._sources.pop(future, None)) is not None:
                image = self.pipeline.prepare(source)
        except BaseException as error:
            # The traceback would keep the decoder's buffers alive for as long as the caller keeps the error.
            if future.set_running_or_notify_cancel():
                future.set_exception(error.with_traceback(None) if isinstance(error, InputError) else error)
        with self._changed:
            self._decoding -= 1
            if image is not None and not future.cancelled():
                self._ready.append(_Ready(image, future, time.monotonic()))
            self._changed.notify_all()

    def _run(self) -> None:
        """Predict batch after batch, until the batcher is closed and nothing is left."""
        while (batch := self._next_batch()) is not None:
            if batch := [item for item in batch if item.future.set_running_or_notify_cancel()]:
                self._predict(batch)

    def _predict(self, batch: list[_Ready]) -> None:
        try:
            self._began[threading.get_ident()] = time.monotonic()
            self._on_run(len(batch))
            found = self.pipeline.predict_prepared([item.image for item in batch])
        except BaseException as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for item in batch:  # a single one may be to blame: it overflows, or all together need too much memory
                self._predict([item])
        else:
            for item, prediction in zip(batch, found, strict=True):
                item.future.set_result(prediction)
        finally:
            self._began.pop(threading.get_ident(), None)

    def _next_batch(self) -> list[_Ready] | None:
        """Wait for a batch; it is empty where another stream was quicker, None where no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or (self._closed and not self._decoding))
            if not self._ready:
                return None
            rest = self._ready[0].since + self._wait - time.monotonic()
            self._changed.wait_for(lambda: len(self._ready) >= self.batch or not self._decoding, max(rest, 0))
            return [self._ready.popleft() for _ in range(min(self.batch, len(self._ready)))]
