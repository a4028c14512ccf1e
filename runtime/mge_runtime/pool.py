"""Threads around pipelines: work prefetched for a loop, and pipelines lent to threads that need one for a while."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    from mge_runtime.pipeline import Pipeline

__all__ = ["PipelinePool", "batches", "prefetch"]

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


class PipelinePool:
    """Pipelines on one bundle, made by `PipelinePool.open`, a context manager; safe to use from any thread.

    A pipeline serves one thread at a time. A server with many request threads keeps a few pipelines and lends them:

        with PipelinePool.open("mge.plan", 2) as pool:
            ...
            with pool.lend() as pipeline:      # in any thread; waits until one is free
                prediction = pipeline.predict(image)

    Each pipeline holds a copy of the model on its device. On a CPU two or more share the processors (`threads`).
    """

    def __init__(self, pipelines: list[Pipeline], resources: ExitStack) -> None:
        self._size = len(pipelines)
        self._resources = resources
        self._free: queue.Queue[Pipeline | None] = queue.Queue()
        for pipeline in pipelines:
            self._free.put(pipeline)

    @classmethod
    def open(cls, path: str | os.PathLike[str], size: int, **options: Any) -> PipelinePool:
        """Open a bundle several times.

        Args:
            path: the `mge.plan` file.
            size: how many pipelines.
            options: what `Pipeline.open` takes: device, backend, threads, ...

        Raises:
            BundleError: as for `Pipeline.open`; those that are open already are closed again.
            BackendError: as for `Pipeline.open`, or `size` is below 1.
        """
        from mge_runtime.pipeline import Pipeline  # which itself works ahead

        if size < 1:
            raise BackendError(f"asked for a pool of {size} pipelines; expected at least 1")
        with ExitStack() as stack:
            pipelines = [stack.enter_context(Pipeline.open(path, **options)) for _ in range(size)]
            return cls(pipelines, stack.pop_all())

    @contextmanager
    def lend(self, timeout: float | None = None) -> Generator[Pipeline]:
        """Lend a pipeline to this thread; others wait for one that is free.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.

        Raises:
            BackendError: none became free in time, or the pool is closed.
        """
        try:
            pipeline = self._free.get(timeout=timeout)
        except queue.Empty:
            raise BackendError(
                f"none of {self._size} pipelines became free within {timeout:g} s; open a larger pool, or wait longer"
            ) from None
        if pipeline is None:
            self._free.put(None)  # for the next one that waits
            raise BackendError("the pool of pipelines is closed; open it again with PipelinePool.open")
        try:
            yield pipeline
        finally:
            self._free.put(pipeline)

    def __enter__(self) -> PipelinePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every pipeline once it has come back; closing twice does nothing."""
        for _ in range(self._size):
            self._free.get()
        self._size = 0
        self._free.put(None)
        self._resources.close()
