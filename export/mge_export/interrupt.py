"""An interrupted export ends in one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from mge_runtime.errors import ExportError

__all__ = ["interruptible"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a scheduler's stop, a closed terminal


@contextmanager
def interruptible(consequence: str) -> Generator[Callable[[], None]]:
    """Let a signal unwind the block, so that its temporary files go, and become one error.

    The first signal raises `KeyboardInterrupt` in the block; later ones do not disturb the unwinding. On its way up the
    exception may become another one (an interrupted import) or get lost (Python ignores what is raised in a
    destructor), so anything that leaves the block after a signal counts as the interrupt. Signals that the caller
    ignores, as `nohup` does, stay ignored; outside the main thread no handler is set.

    Args:
        consequence: what the error says of the result.

    Yields:
        A function for the block to call now and then, which raises an interrupt that got lost.

    Raises:
        ExportError: a signal came.
    """
    received: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(signal.Signals(number).name)
        if len(received) == 1:
            raise KeyboardInterrupt

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():
            kept = (signal.SIG_IGN, None)  # None: set by other than Python code
            previous = {number: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) not in kept}
            for number in previous:
                signal.signal(number, stop)
        yield check
    except BaseException as error:
        if not received:
            raise
        raise ExportError(f"the export was interrupted ({received[0]}): {consequence}") from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
