"""Work ahead of a loop in threads: in order, and never far ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["batches", "map_ahead"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_ahead(
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
